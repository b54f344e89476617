"""Corrupted files and odd values through the public loaders and the command line: a clear error, or it works.

    python tests/fuzz/fuzz_inputs.py --count 1000 --seed 0

A clear error is a `ValueError` or `OSError` that names the file or the value (for a setting that all configs share, also
the error of huggingface_hub's dataclasses, which names field and value); on the command line one line and status 2.
Anything else, more than `LIMIT` seconds, or a file left half-written is a fault, printed with the command that shows it
alone; exit status 1 if there is any. `tests/fuzz/test_fuzz_inputs.py` runs a slice.
"""

import contextlib
import gzip
import io
import json
import random
import shutil
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))  # the helpers

from fuzz_corruption import ODD_VALUES, corrupt_file, corrupt_json
from fuzz_driver import Fault, main, quiet, run_cases
from helpers.eagle_checkpoints import LLAMA, eagle1_tensors, eagle3_tensors, write
from helpers.records import make_record
from helpers.tiny_models import make_drafter, make_target, make_tokenizer
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import GenerationConfig

from coral_hf import CoralDraftConfig, CoralDraftModel, TargetAdapter
from coral_hf.cli import main as command_line
from coral_hf.data.dataset import ConversationDataset, read_rows
from coral_hf.data.prompts import read_prompts
from coral_hf.drafter.weight_files import file_sha256
from coral_hf.evaluation.methods import parse_methods
from coral_hf.generation.settings import DraftSettings
from coral_hf.responses.response_files import iter_prompts, iter_responses, write_shards
from coral_hf.training.feature_cache import FeatureCache


LIMIT = 30  # seconds; a case takes milliseconds


class Hang(BaseException):
    """Raised by the alarm; no handler of the package catches it."""


# What is read ----------------------------------------------------------------------------------------------------


class Inputs:
    """Valid inputs of every kind in one folder, from which each case makes its copy."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.target = make_target(dtype=torch.float32)
        self.prompt = torch.tensor([[5, 9, 3, 77, 31]])
        self.plain = self.target.generate(self.prompt, max_new_tokens=8, do_sample=False)
        self.tokenizer = make_tokenizer()
        self.target.save_pretrained(folder / "target")
        self.tokenizer.save_pretrained(folder / "target")
        drafter = make_drafter(self.target, router_groups=12)
        drafter.add_shortlist(torch.arange(128).float(), 20)
        drafter.save_pretrained(folder / "drafter")
        self._card(drafter, folder / "card")
        write(folder / "eagle1", LLAMA, eagle1_tensors())
        write(folder / "eagle3", LLAMA, eagle3_tensors())
        self._text_files(folder)
        self.rows = [
            torch.tensor(row["prompt_ids"] + row["response_ids"]) for row in read_rows(folder / "ids" / "data.jsonl")
        ]
        self.adapter = TargetAdapter(self.target)
        with contextlib.redirect_stdout(io.StringIO()):
            FeatureCache(folder / "cache", self.adapter, "target").fill(self.rows)

    def _card(self, drafter, folder: Path) -> None:
        drafter.save_pretrained(folder)
        training = folder / "training"
        training.mkdir()
        digest = file_sha256(folder / "model.safetensors")
        (training / "benchmark.json").write_text(json.dumps(make_record(digest)))
        shipped = Path(__file__).parents[2] / "model_cards" / "smollm2-135m-instruct-coral" / "training"
        for path in sorted(shipped.glob("*.json*")):
            if path.name == "card.json" or path.name.startswith(("check_", "compare_heads", "training", "log.")):
                text = path.read_text()
                if path.suffix == ".json" and "drafter_sha256" in text:
                    text = json.dumps({**json.loads(text), "drafter_sha256": digest})
                (training / path.name).write_text(
                    "".join(text.splitlines(True)[:20]) if path.suffix == ".jsonl" else text
                )

    def _text_files(self, folder: Path) -> None:
        rng = random.Random(0)

        def ids(count):
            return [rng.randrange(3, 128) for _ in range(count)]

        rows = {
            "ids": [{"id": str(i), "turn": 0, "prompt_ids": ids(4), "response_ids": ids(6)} for i in range(8)],
            "masked": [{"input_ids": ids(9), "response_mask": [0] * 4 + [1] * 5} for _ in range(8)],
            "text": [{"id": str(i), "turns": ["ab", "cd"], "responses": ["ef", "gh"]} for i in range(8)],
            "prompts": [{"id": str(i), "turns": ["ab", "cd"], "benchmark": "mine"} for i in range(4)],
        }
        for name, kind in rows.items():
            text = "".join(json.dumps(row) + "\n" for row in kind)
            (folder / name).mkdir()
            (folder / name / "data.jsonl").write_text(text)
            (folder / f"{name}_gz").mkdir()
            (folder / f"{name}_gz" / "data.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        write_shards(rows["ids"], folder / "parquet")

    # each reads a corrupted copy; what it returns is what to check afterwards

    def drafter(self, path: Path) -> None:
        drafter = CoralDraftModel.from_pretrained(path).eval()
        output = self.target.generate(self.prompt, max_new_tokens=8, do_sample=False, assistant_model=drafter)
        assert torch.equal(output, self.plain), "a drafter changed the text"

    def card(self, path: Path) -> None:
        _command("card", str(path))

    def eagle1(self, path: Path) -> None:
        drafter = CoralDraftModel.from_eagle(str(path), self.target).eval()
        output = self.target.generate(self.prompt, max_new_tokens=8, do_sample=False, assistant_model=drafter)
        assert torch.equal(output, self.plain), "a drafter changed the text"

    def eagle3(self, path: Path) -> None:
        out = path.parent / "converted"
        target = str(self.folder / "target")
        _command("convert", "--from", "eagle", str(path), str(out), "--target", target, "--dtype", "float32")
        if out.exists():
            CoralDraftModel.from_pretrained(out)

    def responses(self, path: Path) -> None:
        for file in path.iterdir():
            ConversationDataset(read_rows(file), self.tokenizer, max_length=32)

    ids = masked = text = ids_gz = masked_gz = text_gz = parquet = responses

    def prompts(self, path: Path) -> None:
        for file in path.iterdir():
            read_prompts([file])
            list(iter_prompts(file))

    prompts_gz = prompts

    def shards(self, path: Path) -> None:
        for file in path.iterdir():
            list(iter_responses(file))
            write_shards(file, path.parent / "shards")

    def regenerate(self, path: Path) -> None:
        prompts, output = path / "data.jsonl", path.parent / "out.jsonl"
        target = ["--target", str(self.folder / "target"), "--device", "cpu", "--dtype", "float32"]
        _command("regenerate", "--prompts", str(prompts), "--output", str(output), *target, "--max-new-tokens", "2")
        if output.exists():
            list(iter_responses(output))

    def cache(self, path: Path) -> None:
        cache = FeatureCache(path, self.adapter, "target")
        cache.fill(self.rows)
        sound = FeatureCache(self.folder / "cache", self.adapter, "target")
        for row in self.rows:
            assert torch.equal(cache[row], sound[row]), "a damaged feature was read"


# kind -> folder it copies
FILES = {
    **{kind: kind for kind in ("drafter", "card", "eagle1", "eagle3", "parquet", "prompts", "prompts_gz", "cache")},
    **{kind: kind for kind in ("ids", "masked", "text", "ids_gz", "masked_gz", "text_gz")},
    "shards": "ids",
    "regenerate": "prompts",
}


def _command(*arguments: str) -> None:
    """The command line in this process: status 0, or one line with status 2, which is raised as `ValueError`."""
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        try:
            status = command_line(list(arguments))
        except SystemExit as stop:  # argparse: usage and one line
            status = stop.code
    lines = [line for line in error.getvalue().splitlines() if line.startswith("coral-hf")]
    assert status in (0, 2), f"status {status}: {error.getvalue()}"
    if status == 2:
        assert "Traceback" not in error.getvalue(), error.getvalue()
        assert len(lines) == 1 or "usage:" in error.getvalue(), f"not one line: {error.getvalue()}"
        raise ValueError(error.getvalue())


def odd_settings(rng: random.Random) -> None:
    """Values of configs, draft settings, methods and training arguments that nobody should give."""
    kind = rng.randrange(5)
    if kind == 0:
        settings = corrupt_json(CoralDraftConfig(hidden_size=32, num_attention_heads=4, vocab_size=128).to_dict(), rng)
        if isinstance(settings, dict):
            CoralDraftConfig(**{name: value for name, value in settings.items() if name != "model_type"})
    elif kind == 1:
        config, generation = CoralDraftConfig(), GenerationConfig()
        for name in rng.sample(list(DraftSettings.__dataclass_fields__), 2):
            setattr(generation, name, rng.choice(ODD_VALUES))
        DraftSettings.resolve(config, generation)
    elif kind == 2:
        value = rng.choice([json.dumps(rng.choice(ODD_VALUES)), "=", ",", ":", "a=b=c", "[" * 100_000, "1e999"])
        name = rng.choice(["draft_depth", "draft_top_k", "draft_head", "nonsense", ""])
        parse_methods([f"{rng.choice(['coral', 'chain', 'x'])}:{name}={value}"], {"drafter": "drafter"})
    elif kind == 3:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data.jsonl"
            data.write_text('{"prompt_ids": [5, 6, 7], "response_ids": [8, 9]}\n' * 4)
            overrides = json.dumps(rng.choice([{"shape": v} for v in ODD_VALUES] + ODD_VALUES))
            arguments = ["--config_overrides", overrides, "--eval_rows", rng.choice(["0", "-1", "99", "x"])]
            _command("train", "--data", str(data), "--output_dir", f"{folder}/out", "--target", "/nowhere", *arguments)
    else:
        names = [
            "--rollout-schedule",
            "--csra-weight",
            "--max_steps",
            "--learning_rate",
            "--loss-chunk-size",
            "--preset",
        ]
        value = rng.choice(["", "x", "-1", "nan", "inf", "1,2,3", "1e99", "[]", "0"])
        _command("train", "--data", "/nowhere.jsonl", "--output_dir", "/nowhere/out", rng.choice(names), value)


# Running ---------------------------------------------------------------------------------------------------------


def run_case(inputs: Inputs, seed: int, index: int) -> dict[str, int]:
    """`{"refused": 1}` or `{"worked": 1}`; raises [`Fault`] with what the case was and what is wrong with its outcome."""
    rng = random.Random(f"{seed}-{index}")
    kind = rng.choice([*FILES, "card", "drafter", "drafter", "eagle1", "settings", "settings"])
    with tempfile.TemporaryDirectory() as scratch:
        path, names = Path(scratch) / "given", ["value"]
        if kind != "settings":
            shutil.copytree(inputs.folder / FILES[kind], path)
            files = sorted(file for file in path.rglob("*") if file.is_file())
            damaged = rng.choice(files)
            corrupt_file(damaged, rng)
            names = [damaged.name, str(path), damaged.stem]
        label = kind if kind == "settings" else f"{kind}: {damaged.name}"
        signal.signal(signal.SIGALRM, _on_alarm)
        signal.alarm(LIMIT)
        before = sorted(Path(scratch).rglob("*"))
        try:
            if kind == "settings":
                odd_settings(rng)
            else:
                with contextlib.redirect_stdout(io.StringIO()):
                    getattr(inputs, kind)(path)
            return {"worked": 1}
        except (ValueError, OSError, StrictDataclassFieldValidationError) as error:
            text = str(error)
            if not text.strip():
                raise Fault(f"{label}: {type(error).__name__} without a message") from error
            if isinstance(error, json.JSONDecodeError | UnicodeError) or (
                kind != "settings" and not any(name in text for name in names) and not _names_a_value(text)
            ):
                raise Fault(
                    f"{label}: does not name its file or value: {type(error).__name__}: {text[:300]}"
                ) from error
            new = [file for file in sorted(Path(scratch).rglob("*")) if file not in before and file.is_file()]
            half = [
                file.name for file in new if "part" in file.name or kind in ("eagle3", "shards", "regenerate", "card")
            ]
            if half:
                raise Fault(f"{label}: left behind {half}") from error
            return {"refused": 1}
        except Hang as hang:
            raise Fault(f"{label}: more than {LIMIT} seconds") from hang
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise Fault(f"{label}: {type(error).__name__}: {str(error)[:300]}") from error
        finally:
            signal.alarm(0)


def _names_a_value(text: str) -> bool:
    """`name=value`, a quoted name, or a list of names that are missing or unknown."""
    return any(mark in text for mark in ("=", "'", '"', "`", "expected", "row "))


def _on_alarm(*_):
    raise Hang


def run(seed: int, start: int, count: int, verbose: bool = False) -> dict:
    """Runs cases of a seed and returns their counts, see [`run_cases`]."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(Path(folder))
        numbered = partial(run_case, inputs, seed)
        return run_cases(Path(__file__).name, numbered, ("refused", "worked"), seed, start, count, verbose)


if __name__ == "__main__":
    sys.exit(main(__doc__, run, count=1000))
