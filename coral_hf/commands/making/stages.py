"""The stages of `coral-hf make`. Each reads the files of the stage before and records its own results."""

import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import set_seed

from ...data.dataset import read_rows
from ...data.held_out import hold_out
from ...drafter.modeling_coral import CoralDraftModel
from ...responses.regenerate import regenerate
from ...responses.response_files import iter_prompts
from ...responses.self_prompts import write_self_prompts
from ...training.arguments import CoralTrainingArguments
from ...training.recipe import drafter_settings, shortlist_size
from ...training.report.estimate import measure_training, without_traces
from ...training.trainer import CoralTrainer
from .display import Display, ShowTraining
from .measuring import Measuring, quiet, read_lines
from .plan import ANSWERS_SHARE, Plan, prompts_within, seconds_per_token
from .state import MakeState


FIRST_ANSWERS, MORE_ANSWERS = 16, 64  # prompts answered between two time checks
SLOTS = 64
LONGEST_ANSWER, SHORTEST_CUT = 512, 128  # longest answers in tokens: normally, and with the smallest budget
SECONDS_PER_LENGTH = 7.0  # seconds of budget per token of the longest answer: all 512 from an hour on
HELD_OUT_PROMPTS = 16
# Steps are measured at the deepest K and on the longest rows. Over a whole schedule, they are faster by about this factor.
FASTER = 1.2


def longest_answer(budget: float | None) -> int:
    """The number of tokens at which answers are cut.

    The slots of a chunk wait for its longest answer. With little time, long answers would take most of it.

    Args:
        budget (`float`, *optional*): seconds for the whole make.
    """
    if budget is None:
        return LONGEST_ANSWER
    return max(min(SHORTEST_CUT, LONGEST_ANSWER), min(LONGEST_ANSWER, int(budget / SECONDS_PER_LENGTH)))


class Making(Measuring):
    """A running make: its folder, its target and its limits.

    Args:
        folder (`Path`), state ([`MakeState`]), display ([`Display`])
        target (`PreTrainedModel`), tokenizer
        seconds (`float`, *optional*): time for the whole make; None: as long as the data and the recipe need.
        tokens (`int`, *optional*): most response tokens to generate.
        seed (`int`)
    """

    def __init__(
        self,
        state: MakeState,
        display: Display,
        target: Any,
        tokenizer: Any,
        seconds: float | None,
        tokens: int | None,
        seed: int,
    ):
        self.state, self.display, self.target, self.tokenizer = state, display, target, tokenizer
        self.seconds, self.tokens, self.seed = seconds, tokens, seed
        self.folder = state.folder
        self.train_prompts, self.held_out = (
            self.folder / "prompts" / "train.jsonl",
            self.folder / "prompts" / "held_out.jsonl",
        )
        self.answers, self.drafter = self.folder / "answers" / "responses.jsonl", self.folder / "drafter"
        self.self_made = False  # whether the target writes the prompts
        self.spent_before = state.seconds
        self.started = time.monotonic()

    @property
    def left(self) -> float | None:
        """Remaining seconds of the budget; None without a budget."""
        return None if self.seconds is None else self.seconds - self.spent_before - (time.monotonic() - self.started)

    # Prompts and answers -------------------------------------------------------------------------------------------

    def read_prompts(self, data: Any, reading: dict[str, Any]) -> None:
        """Splits the prompts, in random order, into those for training and those for measuring.

        Without data, the target writes as many prompts as the answers need.
        """
        self.self_made = not data
        if self.state.of("prompts") is not None:
            return
        if self.self_made:
            self.state.begin()
            self.write_prompts(HELD_OUT_PROMPTS + FIRST_ANSWERS)
            held_out = read_lines(self.held_out)
            self.state.finish("prompts", self_made=True, held_out=len(held_out))
            return
        rows = list(iter_prompts(data, **reading))
        if len(rows) < 4:
            raise ValueError(
                f"--data contains {len(rows)} prompts; make needs at least 4, and a good drafter needs thousands."
            )
        kept, held_out = hold_out(rows, min(HELD_OUT_PROMPTS, max(2, len(rows) // 10)))
        random.Random(self.seed).shuffle(kept)
        self.state.begin()
        self.train_prompts.parent.mkdir(parents=True, exist_ok=True)
        for path, chosen in ((self.train_prompts, kept), (self.held_out, held_out)):
            path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        self.state.finish("prompts", train=len(kept), held_out=len(held_out))

    def write_prompts(self, count: int) -> list[dict[str, Any]]:
        """Lets the target write prompts until there are enough. The first ones are held out.

        Returns:
            `list[dict]`: the prompts for training.
        """
        self.display.show(f"prompts, {count:,} written by the target")
        where = self.train_prompts.with_name("self.jsonl")
        with quiet():
            rows = write_self_prompts(
                self.target, self.tokenizer, count, where, seed=self.seed, slots=SLOTS, progress=False
            )
        parts = (self.held_out, rows[:HELD_OUT_PROMPTS]), (self.train_prompts, rows[HELD_OUT_PROMPTS:])
        for path, chosen in parts:
            path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        return rows[HELD_OUT_PROMPTS:]

    def answer(self, seconds: float | None, most: int | None = None) -> None:
        """Answers prompts until the time, the tokens or the prompts are used up.

        Args:
            seconds (`float`, *optional*): time limit from now.
            most (`int`, *optional*): number of prompts in this call. The stage is then not finished.
        """
        if self.state.of("answers") is not None:
            return
        prompts = read_lines(self.train_prompts)
        positions = getattr(self.target.config.get_text_config(), "max_position_embeddings", None) or 4096
        longest = min(longest_answer(self.seconds), positions // 2)
        begun, size = time.monotonic(), FIRST_ANSWERS
        answered = {row["id"] for row in read_lines(self.answers)}
        todo = [row for row in prompts if row["id"] not in answered][:most]
        while not self._enough(begun, seconds):
            if not todo and self.self_made and most is None:
                known = len(prompts)
                prompts = self.write_prompts(HELD_OUT_PROMPTS + known + MORE_ANSWERS)
                todo = prompts[known:]
            if not todo:
                break
            chunk, todo = todo[:size], todo[size:]
            size = MORE_ANSWERS
            stats = regenerate(
                self.target,
                self.tokenizer,
                chunk,
                self.answers,
                max_new_tokens=longest,
                max_prompt_tokens=min(2048, positions - longest),
                slots=min(SLOTS, len(chunk)),
                seed=self.seed,
                progress=False,
            )
            speed = {"tokens/s": f"{stats['tokens_per_second']:,.0f}"}
            self.display.show(f"answers, {self.response_tokens():,} tokens", **speed)
        if most is None:
            taken = self.first_seconds + time.monotonic() - begun
            self.state.finish("answers", seconds=taken, response_tokens=self.response_tokens())

    def _enough(self, begun: float, seconds: float | None) -> bool:
        late = seconds is not None and time.monotonic() - begun >= seconds
        return late or (self.tokens is not None and self.response_tokens() >= self.tokens)

    def response_tokens(self) -> int:
        """Number of response tokens in the answers on file."""
        return sum(len(row["response_ids"]) for row in read_lines(self.answers))

    first_seconds = 0.0  # time for the answers that the plan is based on

    # Training ------------------------------------------------------------------------------------------------------

    def trainer(self, folder: str | Path, **settings: Any) -> CoralTrainer:
        """A trainer for a new drafter on the answers so far."""
        rows, held_out = hold_out(read_rows(str(self.answers)))
        args = CoralTrainingArguments(
            str(folder),
            report_to="none",
            disable_tqdm=True,
            seed=self.seed,
            logging_steps=5,
            save_total_limit=1,
            use_cpu=self.target.device.type == "cpu",
            **settings,
        )
        set_seed(self.seed)
        drafter = CoralDraftModel.from_target(self.target, self.tokenizer, **drafter_settings(self.target.config))
        if settings.get("max_steps") == 0:
            without_traces(args, str(folder))
        trainer = CoralTrainer(
            drafter,
            self.target,
            args,
            train_dataset=rows,
            eval_dataset=held_out or None,
            processing_class=self.tokenizer,
        )
        trainer.data_names = [self.answers.name]
        size = shortlist_size(drafter.config.vocab_size) if trainer.adapter.has_rows else 0
        if size:
            drafter.add_shortlist(trainer.train_dataset.response_counts(drafter.config.vocab_size), size)
        return trainer

    def plan(self) -> Plan:
        """Answers the first prompts, runs two real training steps on them, and extrapolates."""
        begun = time.monotonic()
        self.answer(None, most=FIRST_ANSWERS)
        first, first_tokens = time.monotonic() - begun, max(1, self.response_tokens())
        self.first_seconds = first
        rows = read_lines(self.answers)
        token = seconds_per_token(self.target, rows[0]["prompt_ids"][-64:])
        with tempfile.TemporaryDirectory() as folder, quiet():
            trainer = self.trainer(folder, max_steps=0, save_strategy="no")
            estimate = measure_training(trainer, 1.0)
        n_prompts = prompts_within(self.seconds, token)
        measuring = token * n_prompts * 64 * 12
        total = len(read_lines(self.train_prompts))
        found = self.state.of("answers") or {}
        all_tokens = int(first_tokens * total / max(1, len({row["id"] for row in rows})))
        if self.self_made:  # the target can write more
            all_tokens = self.tokens or 10**12
        if self.seconds is None:
            tokens = min(all_tokens, self.tokens or all_tokens)
            answers = first * tokens / first_tokens
        else:
            answers = min(ANSWERS_SHARE * max(0.0, self.seconds - measuring), first * all_tokens / first_tokens)
            tokens = min(all_tokens, self.tokens or all_tokens, int(answers * first_tokens / first))
        tokens = found.get("response_tokens", tokens)
        speed = estimate.tokens_per_second or 1.0
        training = tokens * trainer.args.num_train_epochs / speed
        if self.seconds is not None:
            training = max(1.0, self.seconds - measuring - answers)
        disk = 3 * estimate.checkpoint_bytes + 12 * tokens
        return Plan(answers, training, measuring, tokens, n_prompts, disk, estimate.memory["peak"])

    def train(self, seconds: float | None) -> None:
        """Trains until the recipe's steps or the time are used up. Resumes from the last checkpoint."""
        if self.state.of("training") is not None:
            return
        begun = time.monotonic()
        settings = self.state.of("training_plan")
        if settings is None:
            steps = -1
            if seconds is not None:
                with tempfile.TemporaryDirectory() as folder, quiet():
                    trainer = self.trainer(folder, max_steps=0, save_strategy="no")
                    measured = measure_training(trainer, 1.0)
                per_step = trainer._global_batch() * measured.tokens / len(trainer.train_dataset)
                steps = max(1, int(FASTER * seconds * (measured.tokens_per_second or 1.0) / per_step))
            settings = self.state.finish("training_plan", max_steps=steps)
        left = None if seconds is None else max(1.0, seconds - (time.monotonic() - begun))
        steps = settings["max_steps"]
        saving = (
            {"save_strategy": "steps", "save_steps": max(1, steps // 10)} if steps > 0 else {"save_strategy": "epoch"}
        )
        with quiet():
            trainer = self.trainer(self.drafter, max_steps=steps, **saving)
        trainer.add_callback(ShowTraining(self.display, left))
        with quiet():
            trainer.train(resume_from_checkpoint="last" if any(self.drafter.glob("checkpoint-*")) else None)
            trainer.save_model()
        for path in self.drafter.glob("checkpoint-*"):
            shutil.rmtree(path)
        self.state.finish("training", seconds=time.monotonic() - begun, steps=trainer.state.global_step)


__all__ = ["Making"]
