"""Measures what a step costs on this machine, once per target, drafter, device, dtype and threads, and keeps it."""

import hashlib
import json
import logging
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

from ..drafter.configuration_coral import FC_NORMS
from ..drafter.few_rows import few_row_linears
from ..drafter.modeling_coral import CoralDraftModel
from ..drafter.target_adapter import active_adapters
from ..utils.compat import cache_kwarg
from ..utils.hardware import cpu_name, device_name, synchronized_clock
from ..utils.user_cache import cache_dir
from .acceptance import accept_greedy
from .key_values.dynamic import compact_cache
from .candidate_generator import CoralCandidateGenerator
from .draft_tree import DraftTree, ancestors_of
from .settings import DraftSettings
from .target_forward import TargetForward
from .tree_size import DraftCosts, smooth_times


logger = logging.getLogger(__name__)

FORMAT = 3  # of the cached files; another one is measured again
PREFIX_LENGTH = 256  # tokens before the root, of an ordinary chat
MOST_LEVELS = 4  # of a draft that is timed; each level behind the first costs about the same
_NEW_ROWS = 2  # true rows that the drafter catches up on before it drafts: about what a step accepts
_MIN_ROUNDS, _MAX_ROUNDS = 3, 12
_measured: dict[str, DraftCosts] = {}  # of this process, by file name
_lock = threading.Lock()  # two measurements at once would time each other, and what they find is kept


def draft_costs(
    target: PreTrainedModel, drafter: CoralDraftModel, settings: DraftSettings, refresh: bool = False
) -> DraftCosts:
    """The costs of drafting and verifying with these settings: from the cache, or measured now (seconds).

    Args:
        target (`PreTrainedModel`), drafter ([`CoralDraftModel`]), settings ([`DraftSettings`])
        refresh (`bool`): measure again.

    Returns:
        [`DraftCosts`]
    """
    key = costs_key(target, drafter, settings)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    if not refresh and name in _measured:
        return _measured[name]
    with _lock:
        # again: another thread may have measured while this one waited
        if refresh or name not in _measured:
            path = cache_dir() / "draft_costs" / f"{name}.json"
            costs = None if refresh else _read(path, key)
            if costs is None:
                logger.info("Measuring draft costs once for %s ...", type(target).__name__)
                costs = measure_costs(target, drafter, settings)
                _write(path, key, costs)
            _measured[name] = costs
        return _measured[name]


def costs_key(target: PreTrainedModel, drafter: CoralDraftModel, settings: DraftSettings) -> dict[str, Any]:
    """What is timed and on what machine, as plain JSON values: costs of equal keys are the same."""
    device = target.get_input_embeddings().weight.device
    parameter = next(drafter.parameters())
    architecture = target.config.to_json_string(use_diff=False)
    sizes = ("shape", "hidden_size", "intermediate_size", "target_feature_layers", "draft_vocab_size")
    attention = ("num_attention_heads", "num_key_value_heads", "head_dim")
    heads = ("router_groups", "router_active_groups", "router_hidden_size", "router_grouping", "shortlist_size")
    names = ("draft_top_k", "draft_total_tokens", "draft_head", "draft_active_groups", "draft_groups_per_row")
    return {
        "format": FORMAT,
        "target": type(target).__name__,
        "target_config": hashlib.sha256(architecture.encode()).hexdigest(),
        "adapters": _active_adapters(target),
        "attention": target.config.get_text_config()._attn_implementation,
        "dtype": str(target.dtype),
        "device": device_name(device),
        "cpu": f"{platform.system()} {cpu_name()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "prefix": _prefix_length(target, settings),
        "drafter": {
            "dtype": str(parameter.dtype),
            "device": device_name(parameter.device),
            "beside_target": parameter.device == device,
            **{name: getattr(drafter.config, name, None) for name in (*sizes, *attention, *heads)},
            # named where they are, so that what was measured for other drafters is found again
            **{name: True for name in FC_NORMS if getattr(drafter.config, name, False)},
        },
        "settings": {
            "levels": _levels(settings),
            **{name: getattr(settings, name) for name in (*names, "draft_scoring")},
        },
    }


def _active_adapters(target: PreTrainedModel) -> str | None:
    """Hash over the shapes of all active PEFT adapters that are computed beside their layers; None without any."""
    shapes = [
        (name, part, list(weight.shape), str(weight.dtype))
        for name, module in target.named_modules()
        for part, weight in active_adapters(module).items()
    ]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest() if shapes else None


def _read(path: Path, key: dict[str, Any]) -> DraftCosts | None:
    """A cached measurement; None where there is none, or none that can be used: it is then measured again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] != key:
            return None
        costs = content["costs"]
        costs = DraftCosts(**{**costs, "target_ms": tuple(costs["target_ms"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return costs if len(costs.target_ms) == key["settings"]["draft_total_tokens"] else None


def _write(path: Path, key: dict[str, Any], costs: DraftCosts) -> None:
    """Beside and renamed: two processes that measure at once leave one whole file."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"key": key, "costs": asdict(costs)}, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        # Only the next process pays for it: it measures again.
        logger.warning("Draft costs were measured but not kept in %s: %s", path, error)


@torch.inference_mode()
def measure_costs(
    target: PreTrainedModel, drafter: CoralDraftModel, settings: DraftSettings, seconds: float = 8.0
) -> DraftCosts:
    """Times the parts of a step in turns, so that a drift of the machine hits all alike; medians, made monotone.

    Args:
        target (`PreTrainedModel`), drafter ([`CoralDraftModel`]), settings ([`DraftSettings`])
        seconds (`float`): stop after this long, but not before three rounds.
    """
    depth, total = _levels(settings), settings.draft_total_tokens
    verifier, generator, ids, features = _bench(target, drafter, settings)
    parts: dict[tuple[str, int], Callable[[], Any]] = {}
    for size in measured_sizes(total):
        parts["target", size] = partial(_verify, verifier, generator, _star(ids, size))
    for levels in sorted({1, depth}):
        parts["levels", levels] = partial(_propose, generator, ids, features, levels)
    with few_row_linears(target, drafter):
        times = _take_turns(parts, {ids.device, next(drafter.parameters()).device}, seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = medians["levels", 1]
    level = max(0.0, medians["levels", depth] - first) / (depth - 1) if depth > 1 else 0.0
    target_ms = smooth_times({size: value for (kind, size), value in medians.items() if kind == "target"}, total)
    return DraftCosts(target_ms, first, level)


def _take_turns(
    parts: dict[tuple[str, int], Callable[[], Any]], devices: set[torch.device], seconds: float
) -> dict[tuple[str, int], list[float]]:
    """Milliseconds of every round of every part, after a warm-up."""
    for part in parts.values():
        part()
    times: dict[tuple[str, int], list[float]] = {name: [] for name in parts}
    start = time.perf_counter()
    for round_ in range(_MAX_ROUNDS):
        if round_ >= _MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name, part in parts.items():
            before = synchronized_clock(devices)
            part()
            times[name].append(1e3 * (synchronized_clock(devices) - before))
    return times


def measured_sizes(total: int) -> list[int]:
    """Every size up to 8, then both sides of every multiple of four, where matmuls step, and the largest."""
    return [size for size in range(1, total + 1) if size <= 8 or size % 4 <= 1 or size == total]


def _levels(settings: DraftSettings) -> int:
    """The deepest draft that is timed."""
    return min(settings.draft_depth, MOST_LEVELS)


def _prefix_length(target: PreTrainedModel, settings: DraftSettings) -> int:
    """Tokens before the root: fewer where the target's positions end earlier."""
    draft = settings.draft_total_tokens + settings.draft_depth
    limit = getattr(target.config.get_text_config(), "max_position_embeddings", None) or PREFIX_LENGTH + draft
    return max(1 + _NEW_ROWS, min(PREFIX_LENGTH, limit - draft))


def _bench(target: PreTrainedModel, drafter: CoralDraftModel, settings: DraftSettings):
    """A prefilled target and a drafter that has seen the same prefix."""
    device = target.get_input_embeddings().weight.device
    vocab_size = target.config.get_text_config().vocab_size
    length = _prefix_length(target, settings)
    # whatever the total: the levels that are timed are drafted
    total = max(settings.draft_total_tokens, 1 + _levels(settings))
    fixed = replace(settings, draft_cost_aware=False, draft_total_tokens=total)
    # before any forward: it refuses what does not fit together
    generator = CoralCandidateGenerator(drafter, target, fixed, length + settings.draft_depth + 1)
    ids = (torch.arange(length, device=device) * 7919 % vocab_size)[None]
    cache = DynamicCache(config=target.config)
    cache.activate_past_recording()
    asked = generator.adapter.output_hidden_states
    outputs = target(input_ids=ids, use_cache=True, output_hidden_states=asked, **cache_kwarg(cache))
    cache.crop(0)
    verifier = TargetForward(target, cache_kwarg(cache), asked)
    features = generator.features_of(outputs.hidden_states)
    ids = torch.cat([ids, ids[:, :1]], dim=1)  # the root follows the prefix
    generator.propose(ids, features, max_depth=0)
    return verifier, generator, ids, features[:, -_NEW_ROWS:]


def _star(ids: torch.Tensor, size: int) -> DraftTree:
    """A tree of a root and leaves: times depend on the number of nodes alone."""
    parents = torch.zeros(1, size, dtype=torch.long, device=ids.device)
    parents[:, 0] = -1
    depths = (parents >= 0).long()
    return DraftTree(ids[:, :size], parents, depths, depths.float(), ancestors_of(parents, 1))


def _verify(verifier: TargetForward, generator: CoralCandidateGenerator, tree: DraftTree) -> None:
    """What a step does with a tree, from its mask to the features of what it keeps; the cache is then as before."""
    outputs = verifier.verify(tree)
    path, _ = accept_greedy(tree, outputs.logits.float().argmax(dim=-1).to(tree.tokens.device))
    generator.features_of(outputs.hidden_states, path)
    # Nothing is kept: rows that a sliding window has dropped would not come back.
    compact_cache(verifier.cache, path[:, :0], tree.num_nodes)


def _propose(generator: CoralCandidateGenerator, ids: torch.Tensor, features: torch.Tensor, levels: int) -> None:
    generator.cache.length -= features.shape[1]
    generator.propose(ids, features, max_depth=levels)


__all__ = ["costs_key", "draft_costs", "measure_costs", "measured_sizes"]
