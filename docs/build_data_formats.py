"""Writes the table of docs/data_formats.md from the list of formats in coral_hf/data/formats.py.

python docs/build_data_formats.py
"""

import sys
from pathlib import Path

from coral_hf.data.formats import FORMATS, Format
from coral_hf.data.row_reader import COLUMNS, has_answers, read_row
from coral_hf.hub.card_tables import table
from coral_hf.utils.jsonl import parse_json


MARK = "<!-- made by docs/build_data_formats.py -->"


def used_for(known: Format) -> str:
    _, row = read_row(parse_json(known.example, known.name, ""), known.name)
    uses = (["answering"] if known.kind not in ("ids", "masked") else []) + ["training"] * has_answers(known, row)
    return ", ".join(uses)


def main(path: Path) -> None:
    """Replaces the text between the two marks of a page."""
    before, _, after = path.read_text(encoding="utf-8").split(MARK)
    rows = [[known.name, f"`{known.example}`", used_for(known)] for known in FORMATS]
    text = f"{table(['format', 'example line', 'for'], rows)}\n\nNames for `--columns`: {', '.join(f'`{c}`' for c in COLUMNS)}."
    path.write_text(f"{before}{MARK}\n\n{text}\n\n{MARK}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data_formats.md")
