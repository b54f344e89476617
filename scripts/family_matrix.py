"""Which families of causal LMs take draft trees, chains or no drafts: tried on tiny targets, and written to the docs.

    python scripts/family_matrix.py                 # all of them, a quarter of an hour on one core
    python scripts/family_matrix.py --only llama mamba

A family takes trees (chains) if greedy text with random drafts and with mostly right ones is plain `generate`'s. A tiny
target of every family is built from its config, with random weights in float64, which has no near-ties. Where the texts
differ the script says so and its status is 1.
"""

import argparse
import sys
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any


sys.path.insert(
    0, str(Path(__file__).parents[1] / "tests")
)  # the helpers: an oracle drafter, tiny sizes, the comparison

import torch
import transformers
from helpers.parity import CHAIN, TREES, compare, prompt_of
from helpers.recurrent_targets import CONVOLUTIONS, HYBRIDS
from helpers.tiny_models import COMMON, FAMILIES, make_drafter, make_target, randomize
from helpers.unusual_targets import CHAINS_ONLY, GEMMA_3N, INDEX, MLA, PER_LAYER, POSITIONLESS, RECURRENT, finish
from transformers import CONFIG_MAPPING, AutoModelForCausalLM


PAGE = Path(__file__).parents[1] / "docs" / "supported_models.md"
DRAFTS = {"tree": TREES["tree16"], "chain": CHAIN}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GLM_MOE = {**MOE, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "head_dim": 8}
SHARED = {**MOE, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1}
GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512}
WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
OPT = {"word_embed_proj_dim": 32, "ffn_dim": 64}


@dataclass(frozen=True)
class Family:
    """One family: what its tiny config says beside the sizes that all have, and what is special about it."""

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
        **{name: Family(settings, "recurrent layers alone") for name, settings in RECURRENT.items()},
        **{name: Family(settings, _special(settings, "recurrent layers")) for name, settings in HYBRIDS.items()},
        **{name: Family(settings, _special(settings, "convolutions")) for name, settings in CONVOLUTIONS.items()},
    }
    return dict(sorted(families.items()))


ALL = _families()


def build(name: str) -> Any:
    """A tiny target of a family, in float64, with weights that make it say something else at every token."""
    if name in FAMILIES:
        return make_target(name)
    torch.manual_seed(0)
    sizes = {} if name in POSITIONLESS else COMMON
    config = CONFIG_MAPPING[name](**{**sizes, **ALL[name].settings, "tie_word_embeddings": False})
    eager = {"experts_implementation": "eager"} if "MoE" in ALL[name].what else {}
    target = finish(AutoModelForCausalLM.from_config(config, attn_implementation="eager", **eager))
    target.generation_config.use_cache = True
    return randomize(target, scale=0.1)


def tried(name: str) -> dict[str, str]:
    """What comes of a tree and of a chain: "yes", "no: the refusal", or "differs"."""
    target, ids, found = build(name), prompt_of(20), {}
    for kind, size in DRAFTS.items():
        try:
            drafter = make_drafter(target)
        except ValueError as refused:
            found[kind] = f"no: {refused}"
            continue
        try:
            plain, stats = compare(target, drafter, ids, size, max_new_tokens=24, use_cache=True)
        except ValueError as refused:
            found[kind] = f"no: {refused}"
        except AssertionError:
            found[kind] = "differs"
        else:
            varied = plain[0, ids.shape[1] :].unique().numel() > 1
            found[kind] = (
                "yes" if varied and stats.n_accepted > 0 else "nothing was accepted, or the text is one token"
            )
    return found


def cells(name: str, found: dict[str, str]) -> list[str]:
    """A row of the page: family, what it is, trees, chains, why not."""
    reasons = dict.fromkeys(text.removeprefix("no: ") for text in found.values() if text.startswith("no: "))
    short = ["no" if text.startswith("no: ") else text for text in found.values()]
    return [f"`{name}`", ALL[name].what or "-", *short, " ".join(reasons) or "-"]


def page(rows: list[list[str]]) -> str:
    """The page of the docs."""
    head = ["family", "what is special", *DRAFTS, "what a refused call says"]
    table = [head, ["---"] * len(head), *rows]
    counts = {kind: sum(row[2 + index] == "yes" for row in rows) for index, kind in enumerate(DRAFTS)}
    return "\n".join(
        [
            "# Supported models",
            "",
            "Written by `python scripts/family_matrix.py`. Each family was tried on a tiny target with random weights in",
            "float64: greedy text drafted with a tree of 16 nodes and with a chain of 5, by random drafts and by mostly right",
            f"ones, equals plain `generate`'s where the table says yes. Of {len(rows)} families {counts['tree']} take trees and "
            f"{counts['chain']} take chains",
            f"(Transformers {transformers.__version__}). A family that is not listed is checked when a drafter is made for it:",
            "`CoralDraftModel.from_target` refuses a target whose logits it cannot rebuild from its features.",
            "",
            *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table),
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ALL), metavar="FAMILY", help="print these and write nothing")
    names = parser.parse_args().only
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    say = partial(print, flush=True)
    rows, wrong = [], []
    for name in names or ALL:
        if name not in CONFIG_MAPPING:
            say(f"{name}: not in Transformers {transformers.__version__}")
            continue
        started = time.process_time()
        found = tried(name)
        rows.append(cells(name, found))
        wrong += [name for text in found.values() if text != "yes" and not text.startswith("no: ")]
        say(" | ".join(rows[-1]), f"({time.process_time() - started:.1f} s)")
    if not names and not wrong:
        PAGE.write_text(page(rows), encoding="utf-8")
        say(f"{len(rows)} families: {PAGE}")
    if wrong:
        say(f"not equal to plain generate, or nothing was shown: {', '.join(sorted(set(wrong)))}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
