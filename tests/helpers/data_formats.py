"""Handwritten files in the formats that people use: each format in two variants, with its intended meaning."""

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """A file and its meaning.

    Args:
        file (`str`): its name; a folder's ends with a slash and contains a file for each row.
        content: its text, or rows: written one JSON object a line, as an array (.json) or a table (.parquet).
        prompts (`list`): (turns, system text) of each row; None if there is no text to answer.
        answers (`list`): the trained text of each row; None if there is nothing to train on.
        columns (`dict`): names for the reader.
        ids (`list`): ids that the rows come with.
    """

    file: str
    content: Any
    prompts: list[tuple[list[str], str | None]] | None
    answers: list[list[Any]] | None = None
    columns: dict[str, str] = field(default_factory=dict)
    ids: list[str] | None = None

    def write(self, folder: Path) -> Path:
        path = folder / self.file
        if self.file.endswith("/"):
            path.mkdir()
            for number, (name, row) in enumerate(self.content):
                Case(f"{name}-{number}{'.parquet' if name == 'shard' else '.jsonl'}", [row], None).write(path)
        elif path.suffix == ".parquet" and isinstance(self.content, list):
            from pyarrow import Table, parquet

            parquet.write_table(Table.from_pylist(self.content), path)
        else:
            data = self.content if isinstance(self.content, bytes) else self._text(path).encode()
            path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        return path

    def _text(self, path: Path) -> str:
        if isinstance(self.content, str):
            return self.content
        if ".json" in path.suffixes:
            return json.dumps(self.content, indent=2 if "pretty" in self.file else None)
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.content)


def said(*pairs: tuple[str, str], role: str = "role", text: str = "content") -> list[dict[str, str]]:
    return [{role: speaker, text: content} for speaker, content in pairs]


def share(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return said(*pairs, role="from", text="value")


USER, BOT, SYSTEM = ("user", "hi you"), ("assistant", "hello"), ("system", "be kind")
MORE = [("user", "and now"), ("assistant", "we go")]
ONE: Any = ([(["hi you"], None)], [["hello"]])
KIND: Any = ([(["hi you"], "be kind")], [["hello"]])
TWO: Any = ([(["hi you", "and now"], None)], [["hello", "we go"]])
ASKED: Any = ([(["hi you"], None)],)
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi you"}]}, {"role": "assistant", "content": "hello"}]

CASES = [
    # messages: OpenAI's fine-tuning, the Hub's chat data sets
    Case("messages.jsonl", [{"messages": said(USER, BOT)}], *ONE),
    Case("messages-system.jsonl", [{"messages": said(SYSTEM, USER, BOT)}], *KIND),
    Case("messages-turns.jsonl", [{"messages": said(USER, BOT, *MORE), "id": "a"}], *TWO, ids=["a"]),
    Case("messages-open.jsonl", [{"messages": said(USER, BOT, ("user", "and now"))}], TWO[0], [["hello"]]),
    Case("messages-parts.jsonl", [{"messages": PARTS}], *ONE),
    Case("messages-json.jsonl", [{"messages": json.dumps(said(USER, BOT))}], *ONE),
    Case("messages-asked.jsonl", [{"messages": said(USER)}], *ASKED),
    Case("messages-asked-system.jsonl", [{"messages": said(SYSTEM, USER), "source": "web"}], KIND[0]),
    # UltraChat: a prompt beside the messages
    Case("ultrachat.jsonl", [{"prompt": "hi you", "prompt_id": "f0", "messages": said(USER, BOT)}], *ONE, ids=["f0"]),
    Case(
        "ultrachat.parquet", [{"prompt": "hi you", "prompt_id": "f0", "messages": said(USER, BOT)}], *ONE, ids=["f0"]
    ),
    # ShareGPT, from and value
    Case(
        "sharegpt.json",
        [{"id": "q1", "conversations": share(("human", "hi you"), ("gpt", "hello"))}],
        *ONE,
        ids=["q1"],
    ),
    Case("sharegpt.jsonl", [{"conversations": share(("human", "hi you"), ("gpt", "hello"), *MORE)}], *TWO),
    Case("sharegpt-system.jsonl", [{"conversations": share(SYSTEM, ("human", "hi you"), ("gpt", "hello"))}], *KIND),
    Case(
        "sharegpt-beside.jsonl",
        [{"system": "be kind", "conversations": share(("human", "hi you"), ("gpt", "hello"))}],
        *KIND,
    ),
    Case(
        "sharegpt-names.jsonl",
        [{"conversations": share(("Human", "hi you"), ("chatgpt", "hello"), ("USER", "and now"), ("bing", "we go"))}],
        *TWO,
    ),
    Case("sharegpt.parquet", [{"conversations": share(("human", "hi you"), ("gpt", "hello"))}], *ONE),
    # conversations and conversation, role and content
    Case("conversations.jsonl", [{"conversations": said(USER, BOT)}], *ONE),
    Case("conversations-system.jsonl", [{"conversations": said(SYSTEM, USER, BOT), "score": 0.5}], *KIND),
    Case("lmsys.jsonl", [{"conversation_id": "c7", "turn": 1, "conversation": said(USER, BOT)}], *ONE, ids=["c7"]),
    Case(
        "wildchat.jsonl", [{"turn": 2, "conversation": [{**m, "toxic": False} for m in said(USER, BOT, *MORE)]}], *TWO
    ),
    # Alpaca, its relatives
    Case(
        "alpaca.json",
        [{"instruction": "say it", "input": "hi you", "output": "hello"}],
        [(["say it\n\nhi you"], None)],
        [["hello"]],
    ),
    Case("alpaca-text.jsonl", [{"instruction": "hi you", "input": "", "output": "hello", "text": "Below is"}], *ONE),
    Case(
        "alpaca-history.json",
        [{"instruction": "and now", "input": "", "output": "we go", "history": [["hi you", "hello"]], "system": ""}],
        *TWO,
    ),
    Case("alpaca-system.jsonl", [{"instruction": "hi you", "output": "hello", "system": "be kind"}], *KIND),
    Case("dolly.jsonl", [{"instruction": "hi you", "context": "", "response": "hello", "category": "open_qa"}], *ONE),
    Case(
        "dolly-context.jsonl",
        [{"instruction": "sum up", "context": "hi you", "response": "hello"}],
        [(["sum up\n\nhi you"], None)],
        [["hello"]],
    ),
    Case("instructions.jsonl", [{"instruction": "hi you"}], *ASKED),
    Case("instructions.csv", "instruction,output\nhi you,hello\n", *ONE),
    # TRL
    Case("trl.jsonl", [{"prompt": "hi you", "completion": "hello"}], *ONE),
    Case("trl.csv", "prompt,completion\nhi you,hello\n", *ONE),
    Case("trl-chat.jsonl", [{"prompt": said(USER), "completion": said(BOT)}], *ONE),
    Case(
        "trl-chat-turns.jsonl",
        [{"prompt": said(USER, BOT, MORE[0]), "completion": said(MORE[1])}],
        TWO[0],
        [["we go"]],
    ),
    Case("trl-prompts.jsonl", [{"prompt": said(SYSTEM, USER)}], KIND[0]),
    Case("trl-prompts.parquet", [{"prompt": said(USER)}], *ASKED),
    # prompt, question, text
    Case("prompt.jsonl", [{"prompt": "hi you"}], *ASKED),
    Case("prompt-response.jsonl", [{"id": 7, "prompt": "hi you", "response": "hello"}], *ONE, ids=["7"]),
    Case(
        "humaneval.jsonl", [{"task_id": "HumanEval/0", "prompt": "hi you", "test": "x"}], *ASKED, ids=["HumanEval/0"]
    ),
    Case("humaneval.jsonl.gz", [{"task_id": "HumanEval/1", "prompt": "hi you"}], *ASKED, ids=["HumanEval/1"]),
    Case("gsm8k.jsonl", [{"question": "hi you", "answer": "hello"}], *ONE),
    Case("mmlu.jsonl", [{"question": "hi you", "choices": ["a", "b"], "answer": 1}], *ASKED),
    Case(
        "orca.jsonl",
        [{"id": "o1", "system_prompt": "be kind", "question": "hi you", "response": "hello"}],
        *KIND,
        ids=["o1"],
    ),
    Case("orca-empty.jsonl", [{"id": "o1", "system_prompt": "", "question": "hi you", "response": "hello"}], *ONE),
    Case("prose.jsonl", [{"text": "hi you"}], ASKED[0], [["hi you"]]),
    Case("prose-meta.parquet", [{"text": "hi you", "meta": {"source": "web"}}], ASKED[0], [["hi you"]]),
    # turns
    Case("turns.jsonl", [{"id": "a", "turns": ["hi you", "and now"]}], TWO[0], ids=["a"]),
    Case("turns-bare.jsonl", [{"turns": ["hi you"], "system": "be kind"}], KIND[0]),
    Case("answered.jsonl", [{"turns": ["hi you"], "responses": ["hello"], "finish_reasons": ["stop"]}], *ONE),
    Case("answered-system.jsonl", [{"turns": ["hi you"], "responses": ["hello"], "system": "be kind"}], *KIND),
    Case(
        "mt_bench.jsonl",
        [{"question_id": 81, "category": "writing", "turns": ["hi you", "and now"]}],
        TWO[0],
        ids=["81"],
    ),
    Case(
        "mt_bench-reference.jsonl",
        [{"question_id": 101, "turns": ["hi you"], "reference": ["hello"]}],
        *ASKED,
        ids=["101"],
    ),
    # text, arrays, tables, folders
    Case("prompts.txt", "hi you\nand now\n", [(["hi you"], None), (["and now"], None)]),
    Case("prompts.txt.gz", "\n  hi you\r\n\r\nand now", [(["hi you"], None), (["and now"], None)]),
    Case("strings.json", ["hi you", "and now"], [(["hi you"], None), (["and now"], None)]),
    Case("strings.jsonl", ["hi you", "and now"], [(["hi you"], None), (["and now"], None)]),
    Case("pretty.json", [{"prompt": "hi you", "completion": "hello"}], *ONE),
    Case("array.json.gz", [{"messages": said(USER, BOT)}], *ONE),
    Case("table.csv", 'id,prompt\r\n7,"hi you\nand, ""now"""\r\n', [(['hi you\nand, "now"'], None)], ids=["7"]),
    Case("windows.csv", b"\xef\xbb\xbfprompt;response\r\nhi you;hello\r\n", *ONE),
    Case("table.tsv", "question\tanswer\nhi you\thello\n", *ONE),
    Case("cells.csv", 'turns,system\n"[""hi you"", ""and now""]",\n', TWO[0]),
    Case("shards/", [("shard", {"prompt": "hi you", "completion": "hello"})], *ONE),
    Case("parts/", [("part", {"messages": said(USER, BOT)})], *ONE),
    # ids
    Case("ids.jsonl", [{"id": "a", "prompt_ids": [5, 6], "response_ids": [7, 8]}], None, [[[7, 8]]], ids=["a"]),
    Case("ids.parquet", [{"id": "a", "prompt_ids": [5, 6], "response_ids": [7, 8]}], None, [[[7, 8]]], ids=["a"]),
    Case("masked.jsonl", [{"input_ids": [5, 6, 7, 8], "response_mask": [0, 0, 1, 1]}], None, [[[7, 8]]]),
    Case(
        "masked.parquet", [{"input_ids": [5, 6, 7, 8], "response_mask": [False, False, True, True]}], None, [[[7, 8]]]
    ),
    # columns of other names
    Case(
        "query.jsonl", [{"query": "hi you", "reply": "hello"}], *ONE, columns={"prompt": "query", "response": "reply"}
    ),
    Case(
        "math.jsonl",
        [{"problem": "hi you", "solution": "hello"}],
        *ONE,
        columns={"question": "problem", "answer": "solution"},
    ),
    Case(
        "chosen.jsonl",
        [{"prompt": "hi you", "chosen": "hello", "rejected": "no"}],
        *ONE,
        columns={"completion": "chosen"},
    ),
    Case(
        "key.jsonl",
        [{"uid": 5, "messages": said(("user", "other")), "query": "hi you"}],
        *ASKED,
        columns={"prompt": "query", "id": "uid"},
        ids=["5"],
    ),
]

# Files that nobody could mean, and a piece of the message.
BROKEN = [
    Case("unknown.jsonl", [{"foo": 1, "bar": "hi you"}], None),
    Case("headless.csv", "hi you,hello\nand now,we go\n", None),
    Case("ragged.csv", "prompt,completion\nhi you, and now,hello\n", None),
    Case("cut.json", '[{"prompt": "hi you"}, {"prompt": "and', None),
    Case("text.jsonl", "hi you\nand now\n", None),
    Case("damaged.parquet", b"PAR1\x00\xff\xfe\x15", None),
    Case("speakers.jsonl", [{"conversations": share(("narrator", "once"), ("gpt", "hello"))}], None),
    Case("flat.jsonl", [{"messages": "hi you"}], None),
    Case("numbers.jsonl", [{"turns": [1, 2]}], None),
    Case("empty.jsonl", "", None),
    Case("object.json", '{\n  "name": "config",\n  "size": 3\n}\n', None),
    Case("sheet.xlsx", b"PK\x03\x04 no rows", None),
    Case("blank.jsonl", [{"prompt": ""}], None),
    Case("null.parquet", [{"prompt": None}, {"prompt": "hi you"}], None),
    Case("twice.csv", "prompt,prompt\nhi you,and now\n", None),
]
