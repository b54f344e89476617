"""Conversations -> token ids, response masks and batches."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..jsonl import read_jsonl


IGNORED_LABEL = -100

# The columns by which a row's schema is recognised.
SCHEMAS = {
    "ids": ("prompt_ids", "response_ids"),
    "masked": ("input_ids", "response_mask"),
    "text": ("turns", "responses"),
}


def read_rows(paths: str | Path | Sequence[str | Path]) -> list[dict[str, Any]]:
    """Reads response rows of JSONL (`.jsonl`, `.jsonl.gz`) and Parquet files (or folders of Parquet shards).

    Args:
        paths: one path or several; every row must have the columns of one of [`SCHEMAS`], the same in all files.

    Raises:
        ValueError: on a missing file, a malformed line (with its number), an unknown schema or mixed schemas.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    rows: list[dict[str, Any]] = []
    first: tuple[str, str] | None = None
    for path in _expand(paths):
        for where, row in _read_file(path):
            schema = schema_of(row, where)
            first = first or (schema, where)
            if schema != first[0]:
                raise ValueError(
                    f"{where} has the columns of schema {schema!r}, but {first[1]} has those of {first[0]!r}. Train on "
                    f"files of one schema: {SCHEMAS}."
                )
            rows.append(row)
    if not rows:
        raise ValueError(f"{', '.join(map(str, paths))}: no rows to train on.")
    return rows


def _expand(paths: Iterable[str | Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        if path.is_dir():
            shards = sorted(path.glob("*.parquet"))
            if not shards:
                raise ValueError(f"{path} holds no .parquet shards.")
            yield from shards
        else:
            yield path


def _read_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix != ".parquet":
        for number, row in read_jsonl(path):
            yield f"{path}, line {number}", row
        return
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Reading Parquet needs pyarrow: pip install 'coral-hf[train]'.") from error
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a .jsonl, .jsonl.gz or .parquet file.")
    try:
        table = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no Parquet file ({error}). Fetch or write it again.") from error
    for number, row in enumerate(table):
        yield f"{path}, row {number}", row


def schema_of(row: dict[str, Any], where: str) -> str:
    """Which of [`SCHEMAS`] a row follows; `ValueError` naming `where` if none."""
    for name, columns in SCHEMAS.items():
        if all(isinstance(row.get(column), list) for column in columns):
            return name
    raise ValueError(
        f"{where} has columns {sorted(row)}: expected lists under one of {list(SCHEMAS.values())} "
        "(prompts alone are answered by `coral-hf regenerate`)."
    )


def encode_row(row: dict[str, Any], tokenizer: Any = None, where: str = "row") -> tuple[list[int], list[bool]]:
    """One response row -> token ids and response mask, both of length S.

    Raises:
        ValueError: if lengths disagree, or if no token is a response token.
    """
    schema = schema_of(row, where)
    if schema == "ids":
        ids = [*row["prompt_ids"], *row["response_ids"]]
        mask = [False] * len(row["prompt_ids"]) + [True] * len(row["response_ids"])
    elif schema == "masked":
        ids, mask = list(row["input_ids"]), [bool(flag) for flag in row["response_mask"]]
    else:
        ids, mask = _encode_conversation(row["turns"], row["responses"], tokenizer, where)
    if len(ids) != len(mask):
        raise ValueError(f"{where}: {len(ids)} input_ids but {len(mask)} response_mask entries; they must align.")
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise ValueError(f"{where}: token ids must be integers from 0 on; got {str(ids)[:60]}.")
    if not any(mask):
        raise ValueError(f"{where}: empty response mask, so there is nothing to train on; check the row's response.")
    return ids, mask


def _encode_conversation(turns: list[str], responses: list[str], tokenizer: Any, where: str):
    """Masks by prefix differences of the chat template: what a response adds to the prompt is the response.

    Works for templates without `{% generation %}`.
    """
    if tokenizer is None:
        raise ValueError(f"{where}: text rows need the target's tokenizer.")
    if len(turns) != len(responses):
        raise ValueError(f"{where}: {len(turns)} turns but {len(responses)} responses; every turn needs its response.")
    for text in (*turns, *responses):
        if not isinstance(text, str):
            raise ValueError(f"{where}: turns and responses must be strings; got {text!r}.")
    if not getattr(tokenizer, "chat_template", None):
        return _encode_plain(turns, responses, tokenizer)
    messages: list[dict[str, str]] = []
    text = ""
    ids: list[int] = []
    mask: list[bool] = []
    for turn, response in zip(turns, responses, strict=True):
        messages.append({"role": "user", "content": turn})
        prompt_text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": response})
        full_text = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt, full = _ids(tokenizer, prompt_text), _ids(tokenizer, full_text)
        if prompt[: len(ids)] != ids or full[: len(prompt)] != prompt:
            if not (prompt_text.startswith(text) and full_text.startswith(prompt_text)):
                raise ValueError(
                    f"{where}: this tokenizer's chat template rewrites earlier turns, so responses cannot be located "
                    "by prefix differences. Use rows of ids (prompt_ids / response_ids) as `coral-hf regenerate` "
                    "writes them."
                )
            # A token spans the border (a response that begins with a newline), which it cannot in generation.
            prompt = ids + _ids(tokenizer, prompt_text[len(text) :])
            full = prompt + _ids(tokenizer, full_text[len(prompt_text) :])
        end = _response_end(full, len(prompt), tokenizer)
        mask += [False] * (len(prompt) - len(ids)) + [True] * (end - len(prompt)) + [False] * (len(full) - end)
        ids, text = full, full_text
    # What the template puts after the last response's end (a newline) is never generated.
    last = max((index for index, flag in enumerate(mask) if flag), default=-1) + 1
    return ids[:last], mask[:last]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _response_end(ids: list[int], start: int, tokenizer: Any) -> int:
    """One past the last EOS token if one closes the response that begins at `start`, else the end."""
    tail = range(len(ids) - 1, max(len(ids) - 4, start - 1), -1)
    return next((index + 1 for index in tail if ids[index] == tokenizer.eos_token_id), len(ids))


def _encode_plain(turns: list[str], responses: list[str], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """A target without a chat template: turn and response follow each other as plain text."""
    ids: list[int] = []
    mask: list[bool] = []
    for index, (turn, response) in enumerate(zip(turns, responses, strict=True)):
        prompt = tokenizer(turn, add_special_tokens=index == 0)["input_ids"]
        answer = tokenizer(response, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            answer = [*answer, tokenizer.eos_token_id]
        ids += [*prompt, *answer]
        mask += [False] * len(prompt) + [True] * len(answer)
    return ids, mask


class ConversationDataset(torch.utils.data.Dataset):
    """Encoded conversations: item i is `{"input_ids": LongTensor [S], "response_mask": BoolTensor [S]}`.

    Args:
        rows (`list[dict]`): response rows, see [`read_rows`].
        tokenizer (*optional*): the target's tokenizer, for rows of text.
        max_length (`int`, *optional*): longer rows are cut there and counted in `truncated`; a row whose response
            begins later is left out and counted in `dropped`.

    Raises:
        ValueError: on a malformed row, or if no row is left.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], tokenizer: Any = None, max_length: int | None = None):
        self.conversations: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.truncated = self.dropped = 0
        for index, row in enumerate(rows):
            ids, mask = encode_row(row, tokenizer, where=f"row {row.get('id', index)!r}")
            if max_length is not None and len(ids) > max_length:
                ids, mask = ids[:max_length], mask[:max_length]
                self.truncated += 1
            # The first trainable row predicts x_2.
            if not any(mask[2:]):
                self.dropped += 1
                continue
            self.conversations.append((torch.tensor(ids, dtype=torch.int32), torch.tensor(mask, dtype=torch.bool)))
        if not self.conversations:
            raise ValueError(
                f"No conversation has a response token within max_length={max_length}: nothing to train on."
            )

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids, mask = self.conversations[index]
        return {"input_ids": ids.long(), "response_mask": mask}

    @property
    def num_response_tokens(self) -> int:
        return sum(int(mask.sum()) for _, mask in self.conversations)

    def response_counts(self, vocab_size: int) -> torch.LongTensor:
        """How often each id occurs in the responses, `[V]`."""
        ids = torch.cat([ids[mask] for ids, mask in self.conversations])
        return torch.bincount(ids.long(), minlength=vocab_size)


def check_ids(dataset: ConversationDataset | None, vocab_size: int) -> None:
    """Raises `ValueError` if a conversation holds an id that the target does not have."""
    largest = max((int(ids.max()) for ids, _ in dataset.conversations), default=0) if dataset is not None else 0
    if largest >= vocab_size:
        raise ValueError(
            f"The data holds token id {largest}, but the target's vocabulary ends at {vocab_size - 1}: these ids were "
            "made with another tokenizer. Use the responses of this target."
        )


def preview(item: dict[str, torch.Tensor], tokenizer: Any) -> str:
    """The first sample as text, its trained tokens between `⟦` and `⟧`."""
    pieces, inside = [], False
    for token, trained in zip(item["input_ids"].tolist(), item["response_mask"].tolist(), strict=True):
        if trained != inside:
            pieces.append("⟦" if trained else "⟧")
            inside = trained
        pieces.append(tokenizer.decode([token]))
    return "".join([*pieces, "⟧" if inside else ""])


@dataclass
class CoralDataCollator:
    """Pads conversations on the right.

    Returns a dict of `input_ids` `[B, S]`, `document_ids` `[B, S]` (0, padding -1), `labels` `[B, S]` (the id where it
    is a trainable response token, else -100; `Trainer` counts them to scale accumulated losses) and, with a feature
    cache that holds all rows, `features` `[B, S, n * H]`.
    """

    pad_token_id: int = 0
    feature_cache: Any = field(default=None, repr=False)

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [torch.as_tensor(item["input_ids"], dtype=torch.long) for item in items]
        masks = [torch.as_tensor(item["response_mask"], dtype=torch.bool) for item in items]
        length = max(len(row) for row in ids)
        shape = (len(items), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "document_ids": torch.full(shape, -1),
            "labels": torch.full(shape, IGNORED_LABEL),
        }
        for index, (row, mask) in enumerate(zip(ids, masks, strict=True)):
            batch["input_ids"][index, : len(row)] = row
            batch["document_ids"][index, : len(row)] = 0
            labels = row.masked_fill(~mask, IGNORED_LABEL)
            labels[:2] = IGNORED_LABEL  # no row of the drafter predicts the first two tokens
            batch["labels"][index, : len(row)] = labels
        # rows that were never cached (another evaluation set) leave the features to the target
        if self.feature_cache is not None and all(row in self.feature_cache for row in ids):
            features = [self.feature_cache[row] for row in ids]
            batch["features"] = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
        return batch


__all__ = ["ConversationDataset", "CoralDataCollator", "check_ids", "encode_row", "preview", "read_rows"]
