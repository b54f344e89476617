"""The stages of `coral-hf make` that measure the trained drafter and write records next to its weights."""

import contextlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...data.prompts import Prompt, encode_first_turn, read_prompts
from ...drafter.modeling_coral import CoralDraftModel
from ...hub.model_card import write_card
from ...hub.records import RECORD_FOLDER
from .after_training import tune_folder
from .display import Display
from .plan import prompts_to_fill
from .state import MakeState


CHECKED_TOKENS, MEASURED_TOKENS = 32, 64
# answers to a prompt: greedy and sampled, plain and drafted; and plain, with the drafter's settings, as a chain of 5
CHECKED_ANSWERS, MEASURED_ANSWERS = 4, 3


class Measuring:
    """The stages after training. See [`Making`]."""

    state: MakeState
    display: Display
    target: Any
    tokenizer: Any
    seed: int
    held_out: Path
    drafter: Path

    def held_out_prompts(self, count: int, alike: bool = False) -> list[Prompt]:
        """Held-out prompts, the shortest first.

        Args:
            count (`int`): number of prompts.
            alike (`bool`): also return the following prompts that are at most twice as long as the last.
        """
        with quiet():
            prompts = read_prompts(str(self.held_out))
        lengths = {id(prompt): encode_first_turn(self.tokenizer, prompt).shape[1] for prompt in prompts}
        prompts.sort(key=lambda prompt: lengths[id(prompt)])
        if not alike:
            return prompts[:count]
        longest = 2 * lengths[id(prompts[:count][-1])]
        return [prompt for prompt in prompts if lengths[id(prompt)] <= longest]

    def measure(self, stage: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Runs a stage unless it is finished, and records its time."""
        if (found := self.state.of(stage)) is not None:
            return found
        self.display.show(stage)
        begun = time.monotonic()
        with quiet():
            found = run()
        return self.state.finish(stage, **found, seconds=time.monotonic() - begun)

    def tune(self, count: int) -> dict[str, Any]:
        """Finds the draft size that pays on this machine and saves it in the drafter's config."""
        return {"sizes": tune_folder(self.drafter, self.target, self.tokenizer, self.held_out_prompts(count))}

    def verify(self, count: int) -> dict[str, Any]:
        """Compares answers with plain `generate`'s in float32."""
        from ...evaluation.methods import parse_methods
        from ...evaluation.verify import verify

        dtype, target = self.target.dtype, self.target.float()
        drafter = CoralDraftModel.from_pretrained(self.drafter).eval().float().to(target.device)
        methods = parse_methods(["coral"], {str(self.drafter): drafter})
        prompts = self.held_out_prompts(max(1, count // 2))
        try:
            checks = verify(
                target,
                self.tokenizer,
                methods,
                prompts,
                CHECKED_TOKENS,
                [1.0],
                self.seed,
                self.drafter / RECORD_FOLDER,
            )
        finally:
            self.target.to(dtype)
        return {"different": sum(len(check.different) for check in checks), "answers": sum(c.n_turns for c in checks)}

    def benchmark(self, count: int, left: float | None) -> dict[str, Any]:
        """Compares the speed with plain `generate`, with the drafter's own settings and as a chain of 5.

        Args:
            count (`int`): minimum number of prompts.
            left (`float`, *optional*): seconds of the budget that more prompts may use.
        """
        from ...evaluation.benchmark import run_benchmark
        from ...evaluation.methods import parse_methods

        drafter = CoralDraftModel.from_pretrained(self.drafter, dtype=self.target.dtype).eval().to(self.target.device)
        texts = ["coral", "chain_of_5:draft_depth=5,draft_top_k=1"]
        methods = parse_methods(texts, {str(self.drafter): drafter})
        where = self.drafter / RECORD_FOLDER
        prompts = self.held_out_prompts(count, alike=True)
        check = self.state.of("verification") or {}
        prompt_seconds = check.get("seconds", 0.0) / max(1, count // 2)
        prompt_seconds *= MEASURED_ANSWERS * MEASURED_TOKENS / (CHECKED_ANSWERS * CHECKED_TOKENS)
        record = run_benchmark(
            self.target,
            self.tokenizer,
            methods,
            prompts[: prompts_to_fill(left, prompt_seconds, count, len(prompts))],
            where,
            MEASURED_TOKENS,
            [0.0],
            self.seed,
        )
        rows = {row["method"]: row for row in record["runs"] if row["benchmark"] == "all"}
        return {
            name: {key: rows[name][key] for key in ("speedup", "acceptance_length")}
            for name in ("coral", "chain_of_5")
        }

    def card(self) -> dict[str, Any]:
        """Writes the model card from these records."""
        return {"path": str(write_card(self.drafter))}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file. A last line that an interruption cut off is skipped."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines() if line]


def quiet() -> Any:
    """Hides what the stages print, so that it does not disturb the display."""
    return contextlib.redirect_stdout(io.StringIO())


__all__ = ["Measuring", "quiet", "read_lines"]
