"""`coral-hf make`: from a target's name to a drafter that is trained, tuned, verified and measured."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..loading import require
from ..outputs import check_output_folder
from ..rendering import FORMATS_HELP, DataOptions, RenderingOptions


@dataclass
class MakeCommand(RenderingOptions, DataOptions):
    """Make a drafter for a target, from prompts to card. The same command resumes an interrupted run.

    Examples:
        coral-hf make --target your/model --data prompts.jsonl --output outputs/made --hours 2
        coral-hf make --target your/model --data prompts.jsonl --output outputs/made --tokens 2000000 --yes
        coral-hf make --target demo --output outputs/made --hours 0.5 --yes
    """

    output: str = field(
        metadata={"aliases": ["--output_dir"], "help": "Folder for all stages; the drafter is in OUTPUT/drafter."}
    )
    data: list[str] = field(
        default_factory=list,
        metadata={"help": f"Prompts to answer and train on: {FORMATS_HELP} (default: the target writes its own)."},
    )
    hours: float | None = field(
        default=None,
        metadata={"help": "Hours for everything, kept within a tenth (default: as long as data and recipe need)."},
    )
    tokens: int | None = field(
        default=None, metadata={"help": "Response tokens to generate, at most (default: answers to all prompts)."}
    )
    yes: bool = field(default=False, metadata={"help": "Do not ask before a run of more than an hour."})
    dtype: str = field(
        default="auto", metadata={"help": "Dtype of the target; auto: bfloat16 where it is computed natively."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the order of prompts, of new weights and of training."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: torch's)."})

    def run(self) -> int:
        from .display import Display
        from .plan import confirmed
        from .stages import Making
        from .state import MakeState

        for name in ("hours", "tokens"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"--{name} {value} must be above 0.")
        if not self.data and self.hours is None and self.tokens is None:
            raise ValueError(
                "Without --data, the target writes its own prompts. Set their amount with --hours or --tokens."
            )
        require("rich")
        check_output_folder(self.output)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        settings = {
            name: getattr(self, name) for name in ("target", "target_revision", "data", "columns", "tokens", "seed")
        }
        state = MakeState(self.output, settings)
        if state.of("card") is not None:
            self._report(state)
            return 0
        target, tokenizer = self.load_target(self.dtype)
        seconds = None if self.hours is None else 3600 * self.hours
        display = Display(seconds or 1.0)
        making = Making(state, display, target, tokenizer, seconds, self.tokens, self.seed)
        try:
            making.read_prompts(self.data, self.reading)
            if state.of("training") is None:
                display.show("measuring for the plan")
                plan = making.plan()
                state.finish("plan", prompts=plan.prompts, measuring_seconds=plan.measuring_seconds)
                display.seconds = plan.seconds
                display.bar.clear()
                print("\n".join(plan.lines()), flush=True)
                if not confirmed(plan, self.yes):
                    print("Nothing was started; the first answers are kept.")
                    return 1
                making.answer(None if seconds is None else plan.answers_seconds - making.first_seconds)
                left = making.left
                making.train(None if left is None else max(1.0, left - plan.measuring_seconds))
            count = (state.of("plan") or {})["prompts"]
            making.measure("tuning", lambda: making.tune(count))
            check = making.measure("verification", lambda: making.verify(count))
            making.measure("benchmark", lambda: making.benchmark(count, making.left))
            making.measure("card", making.card)
        finally:
            display.close()
        self._report(state)
        return 1 if check["different"] else 0

    def after_interrupt(self) -> str:
        """How to resume after Ctrl-C."""
        return f"finished stages are kept in {self.output}, and the same command resumes"

    def _report(self, state) -> None:
        """The summary in five lines."""
        drafter = Path(self.output) / "drafter"
        check, speeds = state.of("verification"), state.of("benchmark")
        own, chain = speeds["coral"], speeds["chain_of_5"]
        equal = (
            "all equal to plain generate"
            if not check["different"]
            else f"{check['different']} DIFFER from plain generate"
        )
        print(
            f"Drafter: {drafter} (trained on {state.of('answers')['response_tokens']:,} response tokens, {state.of('training')['steps']:,} steps)\n"
            f"On this machine: {own['speedup']:.2f}x plain generate, {own['acceptance_length']:.2f} tokens per forward pass of the target (a chain of 5: "
            f"{chain['speedup']:.2f}x, {chain['acceptance_length']:.2f})\n"
            f"Verified: {check['answers']} answers in float32, {equal}\n"
            f'Use: import coral_hf; target.generate(**inputs, assistant_model=AutoModel.from_pretrained("{drafter}"))\n'
            f"Publish: coral-hf push {drafter} org/name"
        )
