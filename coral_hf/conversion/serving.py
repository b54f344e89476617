"""Serving an exported drafter: the engine's command, and how the engine differs."""

import json
import shlex
from pathlib import Path

from ..drafter.configuration_coral import CoralDraftConfig, most_draft_tokens
from .checkpoint_files import HOT_TOKENS_FILE


# Engines that always draft a chain, and their names
CHAIN_ENGINES = {"vllm": "vLLM", "speculators": "vLLM", "gguf": "llama.cpp"}


def serve_command(config: CoralDraftConfig, engine: str, folder: Path, target_name: str, hot_tokens: bool) -> str:
    """The shell command that serves the target with an exported drafter."""
    quoted, target, eagle3 = shlex.quote(str(folder)), shlex.quote(target_name), config.shape == "eagle3"
    if engine == "speculators":
        return f"vllm serve {quoted}"
    if engine == "vllm":
        method = {
            "method": config.shape,
            "model": str(folder),
            "num_speculative_tokens": config.draft_depth,
        }
        return f"vllm serve {target} --speculative-config {shlex.quote(json.dumps(method))}"
    if engine == "eagle":
        return (
            f"python -m eagle.application.webui --base-model-path {target} --ea-model-path {quoted}"
            f"{'' if eagle3 else ' --no-eagle3'}"
        )
    top_k = config.draft_top_k
    # by default the whole draft, including the root; a chain has no other size
    total = (top_k > 1 and config.draft_total_tokens) or most_draft_tokens(config.draft_depth, top_k)
    token_map = f" --speculative-token-map {shlex.quote(str(folder / HOT_TOKENS_FILE))}" if hot_tokens else ""
    return (
        f"python -m sglang.launch_server --model-path {target} --speculative-algorithm {'EAGLE3' if eagle3 else 'EAGLE'} "
        f"--speculative-draft-model-path {quoted} --speculative-num-steps {config.draft_depth} "
        f"--speculative-eagle-topk {top_k} --speculative-num-draft-tokens {total}{token_map}"
    )


def llama_server_command(config: CoralDraftConfig, file: Path, target_gguf: str) -> str:
    """The shell command with which llama.cpp serves a target's GGUF file with a drafter's."""
    return (
        f"llama-server -m {shlex.quote(target_gguf)} --spec-type draft-eagle3 --spec-draft-model {shlex.quote(str(file))} "
        f"--spec-draft-n-max {config.draft_depth}"
    )


def export_notes(config: CoralDraftConfig, engine: str, hot_tokens: bool) -> list[str]:
    """One line for each difference in an engine, and for each part of a drafter that was left out."""
    notes, chain = [], CHAIN_ENGINES.get(engine)
    called = "llama.cpp" if engine == "gguf" else engine
    if config.router_groups:
        notes.append(f"Left out: the LM-head router; {called} computes the head without it.")
    if config.low_rank_size:
        notes.append(f"Left out: the low-rank head; {called} computes the full head.")
    if config.shortlist_size and hot_tokens:
        notes.append(f"The shortlist of {config.shortlist_size} ids is SGLang's token map, {HOT_TOKENS_FILE}.")
    elif config.shortlist_size:
        notes.append(f"Left out: the shortlist of {config.shortlist_size} ids; {called} computes the full head.")
    if config.draft_cost_aware:
        sizes = ("draft_depth", "draft_top_k", "draft_total_tokens")
        names = sizes[:1] if chain else sizes
        own = ", ".join(f"{name}={getattr(config, name)}" for name in names)
        notes.append(
            "Left out: cost-aware sizes; EAGLE's code chooses its own tree."
            if engine == "eagle"
            else f"Left out: cost-aware sizes, chosen at every step; {called} always drafts the largest of them, {own}. "
            f"Name smaller ones with {', '.join(f'--{name}' for name in names)}; `coral-hf tune` ranks fixed sizes."
        )
    if chain and config.draft_top_k > 1:
        notes.append(f"{chain} drafts a chain of {config.draft_depth}, not a tree (draft_top_k={config.draft_top_k}).")
    if config.target_revision:
        notes.append(f"The drafter was trained for {config.target_name_or_path} at {config.target_revision}.")
    return notes


__all__ = ["CHAIN_ENGINES", "export_notes", "llama_server_command", "serve_command"]
