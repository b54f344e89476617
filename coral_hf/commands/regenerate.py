"""`coral-hf regenerate`: the target's own answers, computed on this machine or by a serving engine."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoTokenizer

from .loading import DEMO, DrafterOptions, load_drafter, require
from .outputs import check_output_file, check_output_folder, finished
from .rendering import FORMATS_HELP, DataOptions, RenderingOptions


_SLOTS = 128
_PROMPT_TOKENS = 2048  # the key-value buffer of every slot is as long as the longest prompt


@dataclass
class RegenerateCommand(RenderingOptions, DrafterOptions, DataOptions):
    """Make the target answer prompts; resumes where an earlier run stopped.

    Examples:
        coral-hf regenerate --target your/model --prompts prompts.jsonl --output responses.jsonl
        coral-hf regenerate --target your/model --prompts prompts.jsonl --output responses.jsonl --temperature 0.7 --shards shards
        coral-hf regenerate --endpoint http://host:8000/v1 --endpoint-model your/model --prompts prompts.jsonl --output responses.jsonl
    """

    output: str = field(metadata={"aliases": ["--output_dir"], "help": "JSONL file to append the responses to."})
    prompts: str | None = field(
        default=None,
        metadata={"help": f"Prompts to answer: {FORMATS_HELP}. From conversations, the user's turns are used."},
    )
    self_prompts: int | None = field(
        default=None,
        metadata={
            "help": "Instead of --prompts: let the target write this many prompts. They are kept next to --output in NAME.prompts.jsonl; "
            "prompts that are also in a file of --check_overlap are dropped."
        },
    )
    text: bool | None = field(
        default=None,
        metadata={"help": "Write texts next to the token ids (default: if the file stays below 1 GB)."},
    )
    dtype: str = field(
        default="auto", metadata={"help": "Dtype of the target; auto: bfloat16 where it is computed natively."}
    )
    max_new_tokens: int = field(default=512, metadata={"help": "Tokens per response, at most."})
    max_prompt_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Skip and count longer prompts (default: 2048, or what --max_new_tokens leaves of the "
            "target's positions)."
        },
    )
    slots: int | None = field(
        default=None, metadata={"help": "Conversations decoded at the same time (default: 128)."}
    )
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature; 0 is greedy."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampled responses."})
    max_turns: int | None = field(default=None, metadata={"help": "Turns to answer per conversation, at most."})
    exclude: list[str] = field(default_factory=list, metadata={"help": "Response files whose prompts are skipped."})
    shards: str | None = field(default=None, metadata={"help": "Also write all rows as Parquet to this folder."})
    check_overlap: list[str] = field(
        default_factory=list, metadata={"help": "Evaluation prompts: warn if a prompt is among them."}
    )
    drafter: str | None = field(
        default=None,
        metadata={
            "help": "Path or Hub id of a drafter, or 'demo'. Slots draft if measured costs show that it saves time. The answers "
            "stay the same."
        },
    )
    endpoint: str | None = field(
        default=None,
        metadata={
            "help": "URL of an OpenAI-compatible server (http://host:8000/v1; vLLM, SGLang, TGI) that answers instead of "
            "--target. The target's tokenizer then checks that training can use the answers. OPENAI_API_KEY is sent if set."
        },
    )
    endpoint_model: str | None = field(default=None, metadata={"help": "Name of the target on the server."})
    endpoint_token_ids: bool = field(
        default=False, metadata={"help": "Keep the token ids that the server returns (vLLM) instead of texts."}
    )
    endpoint_concurrency: int = field(default=64, metadata={"help": "Requests at the same time."})
    endpoint_attempts: int = field(
        default=6, metadata={"help": "Attempts per request, with growing pauses, before the run stops."}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: torch's)."})

    def run(self) -> int:
        from ..data.overlap import warn_of_overlap
        from ..responses.response_files import iter_prompts, write_shards

        if (self.prompts is None) == (self.self_prompts is None):
            raise ValueError(
                "Give the prompts to answer with --prompts FILE, or let the target write N of its own with --self_prompts N: one of "
                "the two."
            )
        if self.self_prompts is not None and self.self_prompts < 1:
            raise ValueError(f"--self_prompts {self.self_prompts} must be at least 1.")
        if self.endpoint is not None and self.self_prompts is not None:
            raise ValueError(
                f"--self_prompts {self.self_prompts} needs the target on this machine, not at --endpoint: write the prompts with --target "
                "first, and give the endpoint the file NAME.prompts.jsonl with --prompts."
            )
        if (self.endpoint is None) != (self.endpoint_model is None):
            raise ValueError(
                f"--endpoint {self.endpoint} and --endpoint_model {self.endpoint_model} go together: give both or none."
            )
        if self.shards is not None and self.endpoint is not None and not self.endpoint_token_ids:
            raise ValueError(
                f"--shards {self.shards} contains token ids: add --endpoint_token_ids true, or leave it out."
            )
        if self.endpoint is not None:
            here: dict[str, Any] = {"dtype": None if self.dtype == "auto" else self.dtype, "device": self.device}
            here |= {
                "text": self.text,
                "drafter": self.drafter,
                "slots": self.slots,
                "max_prompt_tokens": self.max_prompt_tokens,
            }
            for name, value in {**self.loading_arguments, **here}.items():
                if value is not None and value is not False:
                    option = "target_revision" if name == "revision" else name
                    raise ValueError(
                        f"--{option} {value} is for --target, but --endpoint {self.endpoint} answers: set it when you start "
                        "the server, and leave it out here."
                    )
        check_output_file(self.output, "output", make_folder=True)
        if self.shards is not None:
            check_output_folder(self.shards, "shards")
            require("pyarrow", extra="train")
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        prompts = list(iter_prompts(self.prompts, **self.reading)) if self.prompts is not None else []
        if self.check_overlap and prompts:
            warn_of_overlap(prompts, self.check_overlap)
        common = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "max_turns": self.max_turns,
            "exclude": {name for path in self.exclude for name in _ids(path)},
        }
        stats = self._ask_endpoint(prompts, common) if self.endpoint else self._ask_target(prompts, common)
        print(json.dumps(stats))
        if stats["n_resumed"]:
            print(
                f"{stats['n_resumed']} answers to these prompts were on file already; {stats['n_responses']} are new."
            )
        if self.shards is not None:
            write_shards(self.output, self.shards)
        target = "" if self.endpoint else f"--target {self.target} "
        finished(
            self.output,
            self.shards,
            then=f"coral-hf train {target or '--target TARGET '}--data {self.output} --output FOLDER",
        )
        return 0

    def after_interrupt(self) -> str:
        """How to resume after Ctrl-C."""
        return f"finished answers are in {self.output}, and the same command resumes"

    def _ask_target(self, prompts: list[dict[str, Any]], common: dict[str, Any]) -> dict[str, Any]:
        from ..responses.regenerate import regenerate

        drafter = None if self.drafter is None else load_drafter(self.drafter, self.drafter_revision)
        target, tokenizer = self.load_target(self.dtype)
        if drafter is not None:
            drafter.to(device=target.device, dtype=target.dtype)
        longest = self.max_prompt_tokens
        if longest is None:
            positions = getattr(target.config.get_text_config(), "max_position_embeddings", None)
            longest = _PROMPT_TOKENS if positions is None else min(_PROMPT_TOKENS, positions - self.max_new_tokens)
            longest = max(longest, 1)
        slots = _SLOTS if self.slots is None else self.slots
        if self.self_prompts is not None:
            prompts = self._write_prompts(target, tokenizer, slots)
        return regenerate(
            target,
            tokenizer,
            prompts,
            self.output,
            max_prompt_tokens=longest,
            slots=slots,
            text=self.text,
            drafter=drafter,
            **common,
        )

    def _write_prompts(self, target: Any, tokenizer: Any, slots: int) -> list[dict[str, Any]]:
        from ..data.overlap import EvaluationPrompts
        from ..responses.self_prompts import self_prompts_path, write_self_prompts

        evaluation = EvaluationPrompts.read(self.check_overlap, tokenizer) if self.check_overlap else None
        path = self_prompts_path(self.output)
        return write_self_prompts(
            target, tokenizer, self.self_prompts or 0, path, seed=self.seed, slots=slots, evaluation=evaluation
        )

    def _ask_endpoint(self, prompts: list[dict[str, Any]], common: dict[str, Any]) -> dict[str, Any]:
        from ..data.chat import check_template_kwargs
        from ..responses.endpoint import regenerate_from_endpoint

        return regenerate_from_endpoint(
            self.endpoint or "",
            self.endpoint_model or "",
            prompts,
            self.output,
            concurrency=self.endpoint_concurrency,
            token_ids=self.endpoint_token_ids,
            attempts=self.endpoint_attempts,
            template_kwargs=check_template_kwargs(self.chat_template_kwargs, "--chat_template_kwargs"),
            tokenizer=None if self.endpoint_token_ids else self._tokenizer(),
            **common,
        )

    def _tokenizer(self) -> Any:
        """The target's tokenizer, to check a server's answers; None if it is not found under any name."""
        if self.target != DEMO:
            return AutoTokenizer.from_pretrained(self.target)
        name = self.endpoint_model or ""
        # the server may know a name that is unknown here
        with contextlib.suppress(OSError, ValueError):
            if "/" in name:
                return AutoTokenizer.from_pretrained(name)
        print(
            f"note: no tokenizer was found under the name {name!r}, so the answers are not checked. With --target "
            "NAME, answers that training cannot use are reported immediately.",
            flush=True,
        )
        return None


def _ids(path: str) -> Iterator[str]:
    """The ids of a response file's rows."""
    from ..data.sources import iter_source

    for where, row in iter_source(path):
        if not isinstance(row.get("id"), str):
            raise ValueError(
                f"--exclude {where}: the row's id is {row.get('id')!r}; give response files of `coral-hf regenerate`, whose "
                "rows have the ids of their prompts."
            )
        yield row["id"]
