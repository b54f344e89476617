"""Measures how often the token after a match of each length is the target's: the prior chances of lookup nodes.

    python benchmarks/fit_lookup.py --responses responses.jsonl --limit 2000 --json benchmarks/records/lookup/prior.json

Reads the target's own answers as ids, and searches for a match at each token. `generation.lookup.lookup_nodes.PRIOR` contains
the rounded rates.
"""

import json
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from coral_hf.commands.outputs import check_output_file
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.data.dataset import read_rows
from coral_hf.generation.lookup.text_index import LONGEST, SHORTEST, TextIndex


@dataclass
class Arguments:
    responses: list[str] = field(metadata={"help": "Files of the target's answers as ids."})
    limit: int = field(default=2000, metadata={"help": "Rows to read."})
    json: str | None = field(default=None, metadata={"help": "Write the record here."})


def count(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each length: the number of matches, and how often the next token was right."""
    seen, right = [0] * (LONGEST + 1), [0] * (LONGEST + 1)
    for row in rows:
        index = TextIndex(row["prompt_ids"])
        for token in row["response_ids"]:
            if (match := index.match(1)) is not None:
                seen[match.length] += 1
                right[match.length] += match.tokens[0] == token
            index.extend([token])
    return [
        {"length": length, "matches": seen[length], "rate": round(right[length] / max(seen[length], 1), 4)}
        for length in range(SHORTEST, LONGEST + 1)
    ]


def main() -> None:
    (arguments,) = parse_script(Arguments)
    if arguments.json is not None:
        check_output_file(arguments.json)
    rows = list(islice(read_rows(arguments.responses), arguments.limit))
    record = {"rows_read": len(rows), "rates": count(rows)}
    print(json.dumps(record))
    if arguments.json is not None:
        Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
