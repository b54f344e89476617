"""`coral-hf tune`: finds the draft size that pays for a target and a drafter on this machine."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import demo
from .loading import DEMO, DrafterOptions, load_drafter, require
from .outputs import OutputOptions, check_output_folder, finished
from .rendering import FORMATS_HELP, DataOptions, RenderingOptions


@dataclass
class TuneCommand(RenderingOptions, DrafterOptions, DataOptions, OutputOptions):
    """Measure step times and acceptance on this machine, predict the best draft size, and write tune.json.

    The costs that generate keeps for cost-aware drafts with the drafter's own sizes are measured again.

    Examples:
        coral-hf tune --target your/model --drafter outputs/drafter --data prompts.jsonl --output outputs/tune --save true
        coral-hf tune --data mt_bench.jsonl gsm8k.jsonl --limit 8 --dtype float32 --output outputs/tune
        coral-hf tune --data prompts.jsonl --draft-depth 12 --draft-total-tokens 60 --output outputs/tune
    """

    output: str = field(metadata={"aliases": ["--output_dir"], "help": "Folder for tune.json."})
    data: list[str] = field(metadata={"help": f"Prompts to answer, first turns only: {FORMATS_HELP}."})
    drafter: str = field(default=DEMO, metadata={"help": "Path or Hub id of the drafter, or 'demo'."})
    dtype: str = field(
        default="auto", metadata={"help": "Dtype of the models; auto: bfloat16 where it is computed natively."}
    )
    limit: int | None = field(default=8, metadata={"help": "Prompts per file."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens generated per prompt."})
    temperature: float = field(default=0.0, metadata={"help": "Temperature of the answers; 0 is greedy."})
    seed: int = field(default=0, metadata={"help": "Seed of sampled answers."})
    draft_depth: int = field(default=8, metadata={"help": "Deepest draft to try."})
    draft_top_k: int = field(default=4, metadata={"help": "Most branches per node to try."})
    draft_total_tokens: int = field(default=32, metadata={"help": "Most nodes to try, including the root."})
    save: bool = field(default=False, metadata={"help": "Write the best settings to the drafter's config.json."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: torch's)."})

    def run(self) -> int:
        from ..data.prompts import read_prompts
        from ..evaluation.methods import check_temperatures, other_mode
        from ..evaluation.tune import (
            RECORD_FILE,
            chosen_settings,
            describe_run,
            print_record,
            save_settings,
            slower_than_plain,
            tune,
            write_record,
        )
        from ..generation.costs.measurement import cost_table
        from ..generation.settings import DraftSettings

        require("rich")
        check_output_folder(self.output)
        box = DraftSettings(
            draft_depth=self.draft_depth, draft_top_k=self.draft_top_k, draft_total_tokens=self.draft_total_tokens
        )
        if self.max_new_tokens < 2:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens} must be at least 2.")
        check_temperatures([self.temperature])
        folder = Path(self.drafter)
        if self.save and self.drafter == DEMO:
            raise ValueError(
                f"--save would change the shipped drafter of this installation: copy its folder, {demo.drafter_path()}, and "
                "name the copy with --drafter, or leave --save out."
            )
        if self.save and not folder.is_dir():
            raise ValueError(
                f"--save writes to a drafter's folder, but {self.drafter!r} is not a folder. Save the drafter first."
            )
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        prompts = read_prompts(self.data, self.limit, **self.reading)
        drafter = load_drafter(self.drafter, self.drafter_revision)
        target, tokenizer = self.load_target(self.dtype)
        drafter.to(device=target.device, dtype=target.dtype)
        if (line := other_mode(drafter, tokenizer)) is not None:
            print(line, file=sys.stderr)
        how = (self.max_new_tokens, self.temperature)
        self.check_record(Path(self.output) / RECORD_FILE, describe_run(target, tokenizer, drafter, prompts, *how))
        record = tune(target, tokenizer, drafter, prompts, box, *how, self.seed)
        print_record(record)
        path = write_record(record, self.output)
        settings = chosen_settings(record)
        shown = ", ".join(f"{name}={value}" for name, value in settings.items() if name != "draft_calibration")
        print(f"best by prediction: {shown}")
        if (warning := slower_than_plain(record)) is not None:
            print(warning)
        if self.save:
            save_settings(folder, settings)
            for name, value in settings.items():
                setattr(drafter.config, name, value)
        # the kept costs may come from a busier time, or from before a change of this machine that the key does not show
        cost_table(target, drafter, DraftSettings.resolve(drafter.config), refresh=True)
        bench = f"coral-hf benchmark --target {self.target} --drafter {self.drafter} --data PROMPTS --output FOLDER"
        finished(path, folder / "config.json" if self.save else None, then=bench)
        return 0
