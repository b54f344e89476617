"""Documents for training: the repository's own text, or given files."""

import gzip
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any


REPOSITORY = Path(__file__).parents[2]
_OWN_TEXT = ("*.md", "docs/*.md", "coral_hf/**/*.py", "tests/**/*.py", "benchmarks/*.py", "examples/*.py")
_LONGEST = 2000  # characters of a document: longer files are cut into several


def documents(paths: list[str], tokenizer: Any = None, prefix: str = "") -> list[str]:
    """The texts of files, in an order that depends only on them.

    Args:
        paths (`list[str]`): `.jsonl` and `.jsonl.gz` with `text`, with `turns`, or with `response_ids`; anything else is read as text and cut at blank lines. Empty: the repository's documents and code.
        tokenizer (*optional*): decodes ids.
        prefix (`str`): leaves out rows whose `id` begins otherwise.

    Raises:
        ValueError: if a file contains ids and there is no tokenizer, or rows of another kind.
    """
    files = [Path(path) for path in paths] or sorted(path for name in _OWN_TEXT for path in REPOSITORY.glob(name))
    found = [text for file in files for text in _of_file(file, tokenizer, prefix) if text.strip()]
    found = sorted(set(found))
    random.Random(0).shuffle(found)
    return found


def held_out(text: str, one_of: int = 10) -> bool:
    """Whether a document is held out for measuring, by its hash."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % one_of == 0


def _of_file(file: Path, tokenizer: Any, prefix: str) -> Iterator[str]:
    if file.suffix not in (".jsonl", ".gz"):
        yield from _parts(file.read_text(errors="replace"))
        return
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
        for number, line in enumerate(lines, start=1):
            row = json.loads(line)
            if str(row.get("id", "")).startswith(prefix):
                yield _of_row(row, f"{file}, line {number}", tokenizer)


def _of_row(row: dict[str, Any], where: str, tokenizer: Any) -> str:
    if "text" in row:
        return row["text"]
    if "turns" in row:
        return "\n".join(row["turns"])
    if "response_ids" not in row:
        raise ValueError(f"{where} has none of text, turns and response_ids: give other --text files.")
    if tokenizer is None:
        raise ValueError(f"{where} contains ids: name the tokenizer that made them with --text_tokenizer.")
    # not the prompt, because a chat template begins all of them in the same way
    return tokenizer.decode(row["response_ids"], skip_special_tokens=True)


def _parts(text: str) -> Iterator[str]:
    part = ""
    for paragraph in text.split("\n\n"):
        if part and len(part) + len(paragraph) > _LONGEST:
            yield part
            part = ""
        part += paragraph + "\n\n"
    yield part


__all__ = ["documents", "held_out"]
