"""Tries which families of causal LMs support trees, chains, batches and the static store. Writes docs/supported_models.md.

    python scripts/family_matrix.py                 # all families, less than ten minutes on one core
    python scripts/family_matrix.py --only llama mamba

A tiny target of every family is built from its config, with random weights in float64, which has no near-ties. A family
supports a way to draft if its greedy text equals plain `generate`'s, with random drafts and with mostly correct ones. If texts
differ, the exit status is 1.

Results are kept in docs/supported_models.json, by Transformers version. To add a version, run the script in an environment that
has it. The column "Transformers" of the page compares all versions on file. For the lowest supported version, use
`pip install "$(python scripts/run_matrix.py --requirement transformers floor)"`.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch


sys.path.insert(
    0, str(Path(__file__).parents[1] / "tests")
)  # the helpers: an oracle drafter, tiny sizes, the comparison

import torch
import transformers
from helpers.batches import compare_batch
from helpers.graphs import compare_graphed
from helpers.parity import CHAIN, TREES, compare, prompt_of
from helpers.recurrent_targets import CONVOLUTIONS, HYBRIDS
from helpers.tiny_models import COMMON, FAMILIES, make_drafter, make_target, randomize
from helpers.unusual_targets import CHAINS_ONLY, GEMMA_3N, INDEX, MLA, PER_LAYER, POSITIONLESS, RECURRENT, finish
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from coral_hf.generation.compiled import graphed_generator, static_forward
from coral_hf.generation.key_values.paths import layer_windows, target_obstacle
from coral_hf.generation.statistics import DraftStats
from coral_hf.utils.whole_files import write_json, write_whole


PAGE = Path(__file__).parents[1] / "docs" / "supported_models.md"
RECORD = PAGE.with_suffix(".json")
Record = dict[str, dict[str, dict[str, str]]]  # by Transformers version, family and column
DRAFTS = {"tree": TREES["tree16"], "chain": CHAIN}
STORE = ("batch", "static store")
COLUMNS = ("sliding window", *DRAFTS, *STORE)
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GLM_MOE = {**MOE, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "head_dim": 8}
SHARED = {**MOE, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1}
GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512}
WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
OPT = {"word_embed_proj_dim": 32, "ffn_dim": 64}


@dataclass(frozen=True)
class Family:
    """One family: the settings of its tiny config besides the common sizes, and what is special about it."""

    settings: dict[str, Any]
    what: str = ""


def _special(settings: dict[str, Any], layers: str) -> str:
    return f"MoE, {layers}" if any("experts" in name for name in settings) else layers


def _families() -> dict[str, Family]:
    plain = (
        "arcee",
        "cwm",
        "ernie4_5",
        "gemma",
        "helium",
        "hunyuan_v1_dense",
        "jais2",
        "nanochat",
        "nemotron",
        "olmo",
    )
    plain += (
        "persimmon",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
        "glm",
        "glm4",
        "phi",
        "apertus",
        "diffllama",
    )
    families = {
        name: Family({"head_dim": 8} if name in ("glm", "glm4", "gemma", "helium", "hunyuan_v1_dense") else {})
        for name in plain
    }
    families |= {name: Family(settings) for name, settings in FAMILIES.items()}
    families |= {
        "bitnet": Family({}),
        "cohere": Family({"logit_scale": 0.25}, "scaled logits"),
        "cohere2": Family({**WINDOWS, "logit_scale": 0.25}, "sliding windows"),
        "exaone4": Family(WINDOWS, "sliding windows"),
        "gemma2": Family({**WINDOWS, "head_dim": 8, "tie_word_embeddings": False}, "sliding windows"),
        "gemma4_text": Family({**PER_LAYER, "global_head_dim": 32}, "layers that share keys"),
        "hyperclovax": Family({"logits_scaling": 0.5}, "scaled logits"),
        "ministral": Family({**WINDOWS, "head_dim": 8}, "sliding windows"),
        "olmo3": Family(WINDOWS, "sliding windows"),
        "vaultgemma": Family({**WINDOWS, "head_dim": 8, "tie_word_embeddings": False}, "sliding windows"),
        "codegen": Family({**GPT, "rotary_dim": 4}),
        "gpt2": Family(GPT),
        "gpt_bigcode": Family(GPT),
        "gpt_neox": Family({}),
        "gptj": Family({**GPT, "rotary_dim": 4}),
        "opt": Family(OPT),
        "biogpt": Family({}),
        **{name: Family(settings) for name, settings in POSITIONLESS.items()},
        "openai-gpt": Family(GPT, "keeps no cache"),
        # mixtures of experts, computed by the eager implementation
        "afmoe": Family({**GLM_MOE, **WINDOWS, "num_dense_layers": 1}, "MoE"),
        "dots1": Family({**GLM_MOE, "first_k_dense_replace": 1}, "MoE"),
        "ernie4_5_moe": Family({**MOE, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1}, "MoE"),
        "flex_olmo": Family(MOE, "MoE"),
        "glm4_moe": Family({**GLM_MOE, "first_k_dense_replace": 1}, "MoE"),
        "gpt_oss": Family({**MOE, **WINDOWS, "head_dim": 8}, "MoE, attention sinks"),
        "granitemoe": Family(MOE, "MoE"),
        "granitemoeshared": Family({**MOE, "shared_intermediate_size": 32}, "MoE"),
        "hunyuan_v1_moe": Family({**MOE, "moe_topk": 2, "head_dim": 8}, "MoE"),
        "mixtral": Family(MOE, "MoE"),
        "olmoe": Family(MOE, "MoE"),
        "phimoe": Family(MOE, "MoE"),
        "qwen2_moe": Family(SHARED, "MoE"),
        "qwen3_moe": Family({**SHARED, "head_dim": 8}, "MoE"),
        "llama4_text": Family(CHAINS_ONLY["llama4_text"], "MoE, attention in chunks"),
        # multi-head latent attention
        "deepseek_v2": Family({**MLA, "topk_method": "greedy", "head_dim": 8}, "MLA, MoE"),
        "deepseek_v3": Family(MLA, "MLA, MoE"),
        "glm4_moe_lite": Family(MLA, "MLA, MoE"),
        "minicpm3": Family({**MLA, "dim_model_base": 32}, "MLA"),
        "deepseek_v32": Family({**MLA, **INDEX}, "MLA, MoE, indexed attention"),
        "glm_moe_dsa": Family({**MLA, **INDEX}, "MLA, MoE, indexed attention"),
        "axk2": Family({**MLA, **INDEX}, "MLA, MoE, indexed attention"),
        # several states for a token; convolutions; recurrent layers
        "gemma3n_text": Family({**PER_LAYER, **GEMMA_3N}, "AltUp"),
        **{name: Family(settings, "only recurrent layers") for name, settings in RECURRENT.items()},
        **{name: Family(settings, _special(settings, "recurrent layers")) for name, settings in HYBRIDS.items()},
        **{name: Family(settings, _special(settings, "convolutions")) for name, settings in CONVOLUTIONS.items()},
    }
    return dict(sorted(families.items()))


ALL = _families()


def build(name: str) -> Any:
    """A tiny target of a family in float64, with weights that make it generate varied tokens."""
    if name in FAMILIES:
        return make_target(name)
    torch.manual_seed(0)
    sizes = {} if name in POSITIONLESS else COMMON
    config = CONFIG_MAPPING[name](**{**sizes, **ALL[name].settings, "tie_word_embeddings": False})
    eager = {"experts_implementation": "eager"} if "MoE" in ALL[name].what else {}
    target = finish(AutoModelForCausalLM.from_config(config, attn_implementation="eager", **eager))
    target.generation_config.use_cache = True
    return randomize(target, scale=0.1)


def _result(trial: Callable[[], tuple[torch.Tensor, DraftStats]], prompt_length: int) -> str:
    """Outcome of a trial that returns plain text and statistics: "yes", "no: the refusal", or what went wrong."""
    try:
        plain, stats = trial()
    except ValueError as refused:
        return f"no: {refused}"
    except AssertionError:
        return "differs"
    varied = plain[0, prompt_length:].unique().numel() > 1
    return "yes" if varied and stats.n_accepted > 0 else "nothing was accepted, or the text is one token"


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Context in which `draft_compile` uses the static store and fixed shapes without compiling them."""
    with ExitStack() as stack:
        for module in (graphed_generator, static_forward):
            stack.enter_context(patch.object(module, "compiled", lambda function, options: function))
        yield


def _window(target: Any) -> str:
    windows = layer_windows(target)
    return "no" if not any(windows) else "all layers" if all(windows) else "some layers"


def tried(name: str) -> dict[str, str]:
    """Tries a family. Returns a cell for each of `COLUMNS`; refusals are "no: the reason"."""
    target, ids = build(name), prompt_of(20)
    found = {"sliding window": _window(target)}
    try:
        drafter = make_drafter(target)
    except ValueError as refused:
        return found | dict.fromkeys(COLUMNS[1:], f"no: {refused}")
    sizes = {"max_new_tokens": 24, "use_cache": True}
    for kind, tree in DRAFTS.items():
        found[kind] = _result(partial(compare, target, drafter, ids, tree, **sizes), ids.shape[1])
    trials = {
        # equal lengths: in float64, eager attention makes NaN of padding, also without a drafter
        "batch": partial(compare_batch, target, drafter, [ids.shape[1]] * 3, DRAFTS["tree"], **sizes),
        "static store": partial(compare_graphed, target, drafter, ids, DRAFTS["tree"], **sizes),
    }
    obstacle = target_obstacle(target)
    with _uncompiled():
        for kind, trial in trials.items():
            found[kind] = _result(trial, ids.shape[1]) if obstacle is None else f"no: {obstacle}"
    return found


def _short(text: str) -> str:
    return "no" if text.startswith("no: ") else text


def _parts(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def newest(record: Record) -> str:
    """The newest Transformers version of the record."""
    return max(record, key=_parts)


def _span(versions: list[str]) -> str:
    return versions[0] if len(versions) == 1 else f"{versions[0]} to {versions[-1]}"


def _versions(name: str, record: Record) -> str:
    """The versions in which a family gave the row's results, and the differing results of others.

    A span such as "5.17.0 to 5.24.0" ends at versions on file, without a differing one between them.
    """
    row, spans, others, previous_same = record[newest(record)][name], [], [], False
    for version in sorted(record, key=_parts):
        if (found := record[version].get(name)) is None:
            continue
        differing = [f"{kind} {_short(found[kind])}" for kind in COLUMNS if _short(found[kind]) != _short(row[kind])]
        if differing:
            others.append(f"{version}: {', '.join(differing)}")
        elif previous_same:
            spans[-1].append(version)
        else:
            spans.append([version])
        previous_same = not differing
    return "; ".join([", ".join(_span(versions) for versions in spans), *others])


def cells(name: str, record: Record) -> list[str]:
    """A row of the page."""
    found = record[newest(record)][name]
    reasons = list(
        dict.fromkeys(found[kind].removeprefix("no: ") for kind in DRAFTS if found[kind].startswith("no: "))
    )
    store = {found[kind].removeprefix("no: ") for kind in STORE if found[kind].startswith("no: ")}
    if rest := sorted(store - set(reasons)):
        reasons.append(f"Batch and static store: {'; '.join(rest)}.")
    short = [_short(found[kind]) for kind in COLUMNS]
    return [f"`{name}`", ALL[name].what or "-", *short, _versions(name, record), " ".join(reasons) or "-"]


def counts(record: Record) -> dict[str, int]:
    """The number of families in the newest version, and how many of them say yes in each column of drafts."""
    rows = record[newest(record)].values()
    return {"families": len(rows)} | {kind: sum(row[kind] == "yes" for row in rows) for kind in (*DRAFTS, *STORE)}


def page(record: Record) -> str:
    """The page of the docs."""
    head = ["family", "what is special", *COLUMNS, "Transformers", "why not"]
    names = [name for name in ALL if name in record[newest(record)]]
    table = [head, ["---"] * len(head), *(cells(name, record) for name in names)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    number, rows = counts(record), "\n".join(lines)
    listed = " and ".join(sorted(record, key=_parts))
    return f"""# Supported models

`python scripts/family_matrix.py` tries every family and writes this page. Each family was built as a tiny target with random
weights in float64. Its greedy text was drafted with random drafts and with mostly correct ones. A "yes" means that the text was
equal to plain `generate`'s in both cases.

Of {number["families"]} families, {number["tree"]} take draft trees, {number["chain"]} take chains, {number["batch"]} draft for batches, and \
{number["static store"]} use the static store. The columns mean:

- *sliding window*: whether the tiny target has layers with a sliding window. The window was shorter than the text.
- *tree* and *chain*: a tree of 16 nodes, and a chain of 5 tokens (`draft_top_k=1`).
- *batch*: three prompts at once ([batches](batches.md)). Other families draft for one sequence at a time.
- *static store*: the buffers of fixed size that `draft_compile=True` uses. They were tried without compilation here. The tests
  compile nine families (`tests/generation/compiled/test_compiled_grid.py`).
- *Transformers*: the versions that gave these results. {listed} were tried. "A to B" means that both ends were
  tried. Differing results of another version are listed. A family without an entry for a version does not exist in it.

`generation/key_values/paths.py` decides between the store, which batches and static store need, and Transformers' cache. A family
that is not listed is checked when a drafter is made for it: `CoralDraftModel.from_target` rejects a target whose logits it
cannot compute from its features.

{rows}
"""


def read_record() -> Record:
    """The results on file, by Transformers version and family."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ALL), metavar="FAMILY", help="try only these families")
    names = parser.parse_args().only
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    say = partial(print, flush=True)
    version, wrong = transformers.__version__, []
    for name in names or ALL:
        if name not in CONFIG_MAPPING:
            say(f"{name}: not in Transformers {version}")
            continue
        started = time.process_time()
        found = tried(name)
        results = ", ".join(f"{kind} {_short(text)}" for kind, text in found.items())
        say(f"{name}: {results} ({time.process_time() - started:.1f} s)")
        if not {_short(found[kind]) for kind in (*DRAFTS, *STORE)} <= {"yes", "no"}:
            wrong.append(name)
            continue
        record = read_record()
        record.setdefault(version, {})[name] = found
        record[version] = dict(sorted(record[version].items()))
        write_json(RECORD, record)
    write_whole(PAGE, page(read_record()))
    if wrong:
        say(f"not equal to plain generate, or nothing was shown: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
