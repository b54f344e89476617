"""The records for a card: measurements, the drafter that they belong to, and its training.

A drafter's folder contains them under `training/`:

- `benchmark*.json`: `coral-hf benchmark --output FOLDER/training` (`benchmark.json` gives the figures of the metadata)
- `check_*.json`: `coral-hf verify --output FOLDER/training`
- `compare_heads*.json`: `benchmarks/compare_heads.py --json`
- `ablation.json`: `benchmarks/ablate_training.py`, on small drafters trained for comparison, not this one
- `training.json`, `log.jsonl`: written by [`CoralTrainer`]; `training-N.json`: earlier stages; `commands.sh`, `curve.png`: manual
- `card.json`: facts that a program cannot know (see `STATED`), without figures
- `TRAINING.md`: written with the card from these records
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..drafter.weight_files import WEIGHTS_FILE, file_sha256
from ..utils.jsonl import read_json, read_jsonl


RECORD_FOLDER = "training"
# keys of card.json and their contents
STATED = {
    "title": "heading and model name",
    "license": "licence of the weights",
    "language": "list of language codes",
    "datasets": "list of Hub ids",
    "tags": "list of further tags",
    "target": "sentence on where the target's weights come from",
    "load": "Python that loads target, tokenizer and drafter",
    "load_published": "the same in a repository of the Hub, $drafter for its id",
    "data": "sentences on the training data",
    "limits": "list of sentences",
}


@dataclass
class Records:
    """The records of the drafter in a folder.

    Args:
        folder (`Path`), sha256 (`str`): the folder, and the hash of the weights.
        benchmarks, checks, heads (`list[tuple[str, dict]]`): name and content of records of this drafter.
        anonymous (`list[str]`): records that do not name their drafter.
        foreign (`list[str]`): records of other drafters.
        unusable (`list[str]`): incomplete or damaged files.
        ablation (`dict`, *optional*): a comparison of recipes.
        stages (`list[dict]`): one per training run.
        log (`list[dict]`): the training log.
        stated (`dict`): see `STATED`.
    """

    folder: Path
    sha256: str
    benchmarks: list[tuple[str, dict]] = field(default_factory=list)
    checks: list[tuple[str, dict]] = field(default_factory=list)
    heads: list[tuple[str, dict]] = field(default_factory=list)
    anonymous: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    ablation: dict | None = None
    stages: list[dict] = field(default_factory=list)
    log: list[dict] = field(default_factory=list)
    stated: dict[str, Any] = field(default_factory=dict)


def read_records(folder: str | Path, unmeasured: bool = False, strict: bool = True) -> Records:
    """Reads the records of a drafter's folder, and checks that they belong to this drafter.

    Args:
        folder (`str` or `Path`): a folder with `config.json` and `model.safetensors`.
        unmeasured (`bool`): accept a folder without a benchmark record.
        strict (`bool`): reject incomplete or damaged files, and benchmarks and checks of another drafter. False skips them.

    Raises:
        ValueError: with the file and a remedy.
    """
    folder = Path(folder)
    for name in ("config.json", WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} contains no {name}: give the folder of a drafter, as save_pretrained writes it."
            )
    records = Records(folder, file_sha256(folder / WEIGHTS_FILE))
    training = folder / RECORD_FOLDER
    benchmarks = sorted(training.glob("benchmark*.json"), key=lambda path: (path.name != "benchmark.json", path.name))
    for path in benchmarks:
        record = _read(records, path, strict)
        if record is None or "runs" not in record:  # a benchmark of something other than decoding
            continue
        if record.get("partial"):
            if strict:
                raise ValueError(f"{path} is incomplete; {_remedy(folder)}.")
            records.unusable.append(path.name)
            continue
        _sort_in(records, path, _own_part(record, records.sha256), records.benchmarks, strict)
    # skipped records exist, and records without a drafter do not count as this drafter's
    if not (records.benchmarks or records.foreign or records.unusable or unmeasured):
        which = " that says which drafter it measured" if records.anonymous else ""
        raise ValueError(
            f"{training} contains no benchmark.json{which}: {_remedy(folder)}, or write a card without figures with "
            "--unmeasured true."
        )
    for path in sorted(training.glob("check_*.json")):
        if (record := _read(records, path, strict)) is not None:
            _sort_in(records, path, record, records.checks, strict)
    for path in sorted(training.glob("compare_heads*.json")):
        # unpublished candidates are compared too, and their records are not an error
        record = _read(records, path, strict)
        if record is not None and record.get("drafter_sha256") == records.sha256:
            records.heads.append((path.name, record))
    if (training / "ablation.json").is_file():
        records.ablation = _read(records, training / "ablation.json", strict)
    stages = [_read(records, path, strict) for path in _in_order(training)]
    records.stages = [stage for stage in stages if stage is not None]
    if (training / "log.jsonl").is_file():
        records.log = [row for _, row in read_jsonl(training / "log.jsonl")]
    if (training / "card.json").is_file():
        records.stated = _read(records, training / "card.json", strict) or {}
        check_stated(records.stated, str(training / "card.json"))
    return records


def _in_order(training: Path) -> list[Path]:
    """`training-1.json`, `training-2.json`, ... and last `training.json`."""
    paths = training.glob("training*.json")
    return sorted(paths, key=lambda path: (path.stem == "training", len(path.stem), path.stem))


def _read(records: Records, path: Path, strict: bool) -> dict[str, Any] | None:
    """The object in a file. If it is damaged and may be skipped, returns None and adds a line to the card."""
    try:
        return read_json(path)
    except ValueError:
        if strict:
            raise
    records.unusable.append(path.name)
    return None


def check_stated(stated: dict[str, Any], where: str) -> None:
    """Raises `ValueError` for unknown keys of `card.json`."""
    unknown = sorted(set(stated) - set(STATED))
    if unknown:
        raise ValueError(f"{where}: unknown key(s) {unknown}; the keys are {list(STATED)}.")
    for key, value in stated.items():
        listed = STATED[key].startswith("list")
        if not (
            isinstance(value, list) and all(isinstance(item, str) for item in value)
            if listed
            else isinstance(value, str)
        ):
            raise ValueError(f"{where}: {key}={value!r} must be a {'list of strings' if listed else 'string'}.")


def _own_part(record: dict, sha256: str) -> dict:
    """A benchmark of several drafters, reduced to the rows of one and to those without a drafter."""
    drafters, runs = record.get("drafters"), record["runs"]
    if record.get("drafter_sha256") is not None or not (isinstance(drafters, dict) and isinstance(runs, list)):
        return record
    hashes = {name: of.get("drafter_sha256") if isinstance(of, dict) else None for name, of in drafters.items()}
    own = [name for name, digest in hashes.items() if digest == sha256]
    if not own:
        # a record of a known other drafter is not anonymous
        return record if None in hashes.values() else {**record, "drafter_sha256": next(iter(hashes.values()), None)}
    others = [name for name in drafters if name not in own]
    runs = [row for row in runs if not (isinstance(row, dict) and row.get("method") in others)]
    return {**record, "drafter_sha256": sha256, "drafters": {name: drafters[name] for name in own}, "runs": runs}


def _sort_in(records: Records, path: Path, record: dict, measured: list, strict: bool) -> None:
    found = record.get("drafter_sha256")
    if found is None:
        records.anonymous.append(path.name)
    elif found == records.sha256:
        measured.append((path.name, record))
    elif strict:
        raise ValueError(
            f"{path} measured another drafter ({WEIGHTS_FILE} sha256 {str(found)[:12]}..., this one has "
            f"{records.sha256[:12]}...): {_remedy(records.folder)}, or delete that record."
        )
    else:
        records.foreign.append(path.name)


def _remedy(folder: Path) -> str:
    return (
        f"measure this drafter with `coral-hf benchmark --target TARGET --drafter {folder} --data PROMPTS.jsonl --output "
        f"{folder / RECORD_FOLDER} --overwrite true`"
    )


__all__ = ["RECORD_FOLDER", "STATED", "Records", "check_stated", "read_records"]
