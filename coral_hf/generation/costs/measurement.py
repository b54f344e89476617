"""Measures the costs of a step once per target, drafter, device, dtype and number of threads, and keeps them.

There is one table for each batch size and context that calls come near to (`tables.py`). A measurement takes at most 20
seconds and is announced in the log. It is repeated when the machine's speed has clearly changed.
"""

import hashlib
import json
import logging
import platform
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm  # silent when Transformers' progress bars are

from ...drafter.configuration_coral import FC_NORMS, LOW_RANK_SETTINGS
from ...drafter.few_rows import few_row_linears
from ...drafter.modeling_coral import CoralDraftModel
from ...drafter.target_adapter import active_adapters
from ...utils.hardware import cpu_name, device_name, synchronized_clock
from ..settings import DraftSettings
from ..tree_size import DraftCosts, smooth_times
from .bench import NEW_ROWS, Bench
from .files import KeptCosts, costs_folder, file_name, read_costs, write_costs


logger = logging.getLogger(__name__)

PREFIX_LENGTH = 256  # tokens before the root in an ordinary chat
MOST_LEVELS = 4  # levels of a timed draft; each level after the first costs about the same
LARGE_BATCH = 16  # from this many rows, fewer rounds and only two levels are timed: deeper drafts rarely pay there
LONGEST_SECONDS = 20.0  # most time for a measurement, because the user waits for it
PLAIN_CHANGE = 2.0  # measure again if the machine is this many times faster or slower
CHECK_SECONDS, KEEP_SECONDS = 60.0, 600.0  # between two speed checks; shortest life of a measurement
MOST_NODES = 128  # most nodes over all rows of a timed forward pass; costs of more are extrapolated in proportion
_FEW_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 60, 64)
_MIN_ROUNDS, _MAX_ROUNDS = 3, 12
_MIN_LARGE_ROUNDS = 2
_measured: dict[str, KeptCosts] = {}  # this process's measurements, by file name, rows and prefix length
_checked: dict[str, float] = {}  # when the speed was last compared
_lock = threading.Lock()  # two simultaneous measurements would disturb each other, and the results are kept


def cost_table(
    target: PreTrainedModel,
    drafter: CoralDraftModel,
    settings: DraftSettings,
    rows: int = 1,
    context: int | None = None,
    refresh: bool = False,
    seconds: float = LONGEST_SECONDS,
    key: dict[str, Any] | None = None,
) -> DraftCosts | None:
    """The costs of drafting and verifying with these settings: from the cache, or measured now, which takes seconds.

    Cached costs are measured again if the machine is clearly faster or slower than it was.

    Args:
        target (`PreTrainedModel`), drafter ([`CoralDraftModel`]), settings ([`DraftSettings`])
        rows (`int`): batch size.
        context (`int`, *optional*): tokens before the root; None: as in an ordinary chat.
        refresh (`bool`): measure again.
        seconds (`float`): the most time for a measurement; 0 measures nothing.
        key (`dict`, *optional*): their [`costs_key`], if the caller has it.

    Returns:
        [`DraftCosts`]; None if they are unknown and may not be measured.
    """
    key = costs_key(target, drafter, settings) if key is None else key
    prefix = context or prefix_length(target, settings)
    name = f"{file_name(key)} {rows} {prefix}"
    if not refresh and name in _measured and time.monotonic() - _checked[name] < CHECK_SECONDS:
        return _measured[name].costs
    with _lock:
        # again: another thread may have measured while this one waited
        if refresh or name not in _measured or time.monotonic() - _checked[name] >= CHECK_SECONDS:
            nodes = settings.draft_total_tokens
            kept = None if refresh else _measured.get(name) or read_costs(key, prefix, nodes, rows)
            if kept is None or _speed_changed(target, kept):
                if not seconds:
                    return None
                kept = _measure_now(target, drafter, settings, rows, prefix, seconds)
                write_costs(key, prefix, kept, rows)
            _measured[name], _checked[name] = kept, time.monotonic()
        return _measured[name].costs


def _measure_now(
    target: PreTrainedModel,
    drafter: CoralDraftModel,
    settings: DraftSettings,
    rows: int,
    context: int,
    seconds: float,
) -> KeptCosts:
    logger.warning(
        "Measuring once what a draft of %s costs on this machine%s (at most %.0f seconds; kept in %s, see `coral-hf cache`).",
        type(target).__name__,
        "" if rows == 1 and context <= PREFIX_LENGTH else f", for {rows} x {context} tokens",
        seconds,
        costs_folder(),
    )
    where = {} if rows == 1 and context == prefix_length(target, settings) else {"rows": rows, "context": context}
    costs = measure_costs(target, drafter, settings, most_seconds=seconds, **where)
    return KeptCosts(costs, min(probe_ms(target) for _ in range(3)), time.time())


def _speed_changed(target: PreTrainedModel, kept: KeptCosts) -> bool:
    """Whether all of three forward passes differ clearly from the kept time. Stops at the first that does not."""
    if 0 <= time.time() - kept.measured_at < KEEP_SECONDS:
        return False
    return all(not 1 / PLAIN_CHANGE < probe_ms(target) / kept.probe_ms < PLAIN_CHANGE for _ in range(3))


@torch.inference_mode()
def probe_ms(target: PreTrainedModel) -> float:
    """Milliseconds of a target forward pass over one token without a prefix."""
    device = target.get_input_embeddings().weight.device
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    before = synchronized_clock({device})
    target(input_ids=ids, use_cache=False)
    return 1e3 * (synchronized_clock({device}) - before)


def costs_key(target: PreTrainedModel, drafter: CoralDraftModel, settings: DraftSettings) -> dict[str, Any]:
    """Models, settings and machine as JSON values. Equal keys and prefixes have equal costs."""
    device = target.get_input_embeddings().weight.device
    parameter = next(drafter.parameters())
    architecture = target.config.to_json_string(use_diff=False)
    sizes = ("shape", "hidden_size", "intermediate_size", "target_feature_layers", "draft_vocab_size")
    attention = ("num_attention_heads", "num_key_value_heads", "head_dim")
    heads = ("router_groups", "router_active_groups", "router_hidden_size", "router_grouping", "shortlist_size")
    names = ("draft_top_k", "draft_total_tokens", "draft_head", "draft_active_groups", "draft_groups_per_row")
    return {
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
        "drafter": {
            "dtype": str(parameter.dtype),
            "device": device_name(parameter.device),
            "beside_target": parameter.device == device,
            **{name: getattr(drafter.config, name, None) for name in (*sizes, *attention, *heads)},
            # only where set, so that the files of other drafters keep their names
            **{name: True for name in FC_NORMS if getattr(drafter.config, name, False)},
            **{name: size for name in LOW_RANK_SETTINGS if (size := getattr(drafter.config, name, None))},
        },
        "settings": {
            "levels": _levels(settings),
            **{name: getattr(settings, name) for name in (*names, "draft_scoring")},
        },
    }


def _active_adapters(target: PreTrainedModel) -> str | None:
    """Hash over the shapes of all active, unmerged PEFT adapters; None if there are none."""
    shapes = [
        (name, part, list(weight.shape), str(weight.dtype))
        for name, module in target.named_modules()
        for part, weight in active_adapters(module).items()
    ]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest() if shapes else None


@torch.inference_mode()
def measure_costs(
    target: PreTrainedModel,
    drafter: CoralDraftModel,
    settings: DraftSettings,
    seconds: float = 8.0,
    most_seconds: float = LONGEST_SECONDS,
    rows: int = 1,
    context: int | None = None,
) -> DraftCosts:
    """Times the parts of a step in turn, so that a drift in speed affects all alike. Returns monotone medians.

    A slow machine measures less. After `most_seconds`, only the indispensable parts still run, once each: one node, the
    largest tree, one level and the deepest draft. A size that was not timed gets the time of the next larger one.

    Args:
        target (`PreTrainedModel`), drafter ([`CoralDraftModel`]), settings ([`DraftSettings`])
        seconds (`float`): stop after this long, but not before three rounds (two for a large batch).
        most_seconds (`float`): stop after this long in any case.
        rows (`int`): batch size. Every row has the same number of nodes. More than one needs a target that the store
            supports.
        context (`int`, *optional*): tokens before the root; None: as in an ordinary chat.
    """
    deadline = time.perf_counter() + most_seconds
    depth, total = _levels(settings), settings.draft_total_tokens
    min_rounds = _MIN_ROUNDS
    if rows >= LARGE_BATCH:
        depth, min_rounds, seconds = min(depth, 2), _MIN_LARGE_ROUNDS, seconds / 2
    usual = prefix_length(target, settings)
    bench = Bench(target, drafter, settings, rows, context or usual, usual, depth)
    sizes = measured_sizes(total)
    if rows > 1 or context not in (None, usual):  # fewer: it is one table of several
        sizes = [size for size in sizes if size in _FEW_SIZES or size == total]
        sizes = [size for size in sizes if size <= 2 or size * rows <= MOST_NODES]
        seconds /= 2
    parts: dict[tuple[str, int], Callable[[], Any]] = {}
    for levels in sorted({1, depth}):
        parts["levels", levels] = partial(bench.propose, levels)
    for size in _ends_first(sizes):
        parts["target", size] = partial(bench.verify, bench.star(size))
    needed = [("levels", 1), ("levels", depth), ("target", 1), ("target", sizes[-1])]
    with few_row_linears(target, drafter):
        devices = {bench.device, next(drafter.parameters()).device}
        times = _take_turns(parts, needed, devices, seconds, deadline, min_rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = medians["levels", 1]
    level = max(0.0, medians["levels", depth] - first) / (depth - 1) if depth > 1 else 0.0
    found = {size: value for (kind, size), value in medians.items() if kind == "target"}
    for size in sizes:
        found[size] = found[min(other for other in found if other >= size)]
    if sizes[-1] < total:
        # this many nodes keep a device busy: each further node costs as much as those before it
        last, middle = sizes[-1], max(size for size in sizes if size <= sizes[-1] / 2)
        slope = max(0.0, found[last] - found[middle]) / (last - middle)
        found[total] = found[last] + slope * (total - last)
    return DraftCosts(smooth_times(found, total), first, level)


def _take_turns(
    parts: dict[tuple[str, int], Callable[[], Any]],
    needed: list[tuple[str, int]],
    devices: set[torch.device],
    seconds: float,
    deadline: float,
    min_rounds: int,
) -> dict[tuple[str, int], list[float]]:
    """Milliseconds of every part in every round after a warm-up. Parts that ran only in the warm-up return that time."""
    times: dict[tuple[str, int], list[float]] = {}
    start = time.perf_counter()
    with tqdm(total=len(parts) * (1 + _MAX_ROUNDS), desc="draft costs", leave=False) as progress:
        for round_ in range(1 + _MAX_ROUNDS):
            if round_ > min_rounds and time.perf_counter() - start > seconds:
                break
            for name, part in parts.items():
                before = synchronized_clock(devices)
                known = times.get(name)
                # a part is expected to take as long as before, and a part that has not run as long as the longest
                expected = known[-1] if known else max((taken[-1] for taken in times.values()), default=0.0)
                late = before + expected / 1e3 > deadline
                if late and (known or name not in needed):
                    continue
                part()
                elapsed = 1e3 * (synchronized_clock(devices) - before)
                times[name] = [elapsed] if round_ < 2 else [*times[name], elapsed]
                progress.update()
    return times


def _ends_first(sizes: list[int]) -> list[int]:
    """The smallest and the largest size, then repeatedly those halfway between, so that missing sizes have neighbours."""
    order, gaps = [0, len(sizes) - 1], [(0, len(sizes) - 1)]
    for left, right in gaps:  # the loop appends to it
        middle = (left + right) // 2
        if left < middle < right:
            order.append(middle)
            gaps += [(left, middle), (middle, right)]
    return [sizes[place] for place in dict.fromkeys(order)]


def measured_sizes(total: int) -> list[int]:
    """Every size up to 8, then both sides of every multiple of four, where the times of matmuls jump, and the largest."""
    return [size for size in range(1, total + 1) if size <= 8 or size % 4 <= 1 or size == total]


def _levels(settings: DraftSettings) -> int:
    """Levels of the deepest timed draft."""
    return min(settings.draft_depth, MOST_LEVELS)


def prefix_length(target: PreTrainedModel, settings: DraftSettings) -> int:
    """Tokens before the root in an ordinary chat, or fewer if the target supports fewer positions."""
    draft = settings.draft_total_tokens + settings.draft_depth
    limit = getattr(target.config.get_text_config(), "max_position_embeddings", None) or PREFIX_LENGTH + draft
    return max(1 + NEW_ROWS, min(PREFIX_LENGTH, limit - draft))


__all__ = ["cost_table", "costs_key", "measure_costs", "measured_sizes", "prefix_length", "probe_ms"]
