"""Pages of the site beyond docs/*.md: pages generated from the code, pages from elsewhere in the repository, and their links.

mkdocs calls the `on_` functions (see mkdocs.yml). Nothing is written to the repository.
"""

import inspect
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File


ROOT = Path(__file__).parent.parent
# pages from elsewhere in the repository
ELSEWHERE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
    "examples/recipes/llama-3-8b-instruct.md": "llama_3_8b_recipe.md",
    "benchmarks/README.md": "benchmarks.md",
}
LINK = re.compile(r"(?<!!)\[([^\]\n]*(?:\n[^\]\n]+)?)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """Adds pages that mkdocs.yml does not list to the end of the navigation's results."""
    placed = str(config.nav)
    results = next(part["Results"] for part in config.nav if "Results" in part)
    results += [page.name for page in sorted((ROOT / "docs").glob("*.md")) if f"'{page.name}'" not in placed]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that no file of docs/ contains."""
    pages = {"cli.md": command_line(), "config.md": settings(), "api.md": api()}
    pages |= {page: linked((ROOT / path).read_text(encoding="utf-8"), path) for path, page in ELSEWHERE.items()}
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of docs/*.md that leave docs/."""
    name = page.file.src_uri
    return markdown if name in ELSEWHERE.values() else linked(markdown, f"docs/{name}")


def on_page_content(html: str, **_: Any) -> str:
    """Transformers' docstrings write [`Name`] for a name of the API."""
    return re.sub(r"\[(<code>[^<]*</code>)\]", r"\1", html)


def linked(text: str, path: str) -> str:
    """Links from a file of the repository -> links from a page of the site; what the site has not is named only."""

    def replaced(match: re.Match) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        found = ((ROOT / path).parent / target).resolve()
        if not found.exists():
            raise ValueError(f"{path} links {target}, which does not exist.")
        name = found.relative_to(ROOT).as_posix()
        if name in ELSEWHERE:
            return f"[{label}]({ELSEWHERE[name]}{anchor})"
        if name.startswith("docs/"):
            return f"[{label}]({name.removeprefix('docs/')}{anchor})"
        return label if f"`{name}`" in label else f"{label} (`{name}`)"

    return LINK.sub(replaced, text)


# From the code --------------------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every verb with its options, from the parsers that read them."""
    from coral_hf.cli import COMMANDS
    from coral_hf.commands.parsing.groups import TRAINING
    from coral_hf.commands.parsing.parser import parser_of

    parts = [
        "# Command line",
        "Options may be written with dashes or underscores. `coral-hf VERB --help` prints the same. `train` also takes every "
        "argument of Transformers' `TrainingArguments`; `coral-hf train --help-all` lists them.",
    ]
    for verb, command in COMMANDS.items():
        parser = parser_of(verb, command)
        text, _, examples = inspect.cleandoc(command.__doc__ or "").partition("Examples:")
        parts += [f"## coral-hf {verb}", text.strip(), f"```bash\n{inspect.cleandoc(examples).strip()}\n```"]
        rows = []
        for group in parser._action_groups:
            if group.title != TRAINING:
                rows += [_option(parser, action) for action in group._group_actions]
        rows = [row for row in rows if row]
        parts.append("\n".join(["| option | what it does |", "| --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def _option(parser: Any, action: Any) -> str:
    formatter = parser._get_formatter()
    text = formatter._expand_help(action) if action.help else ""
    if text == "==SUPPRESS==" or action.dest in ("help", "help_all"):
        return ""
    # brackets are not links here, and a bar in code does not end a cell
    text = text.replace("[", "\\[").replace("<", "&lt;").replace("|", "\\|")
    return f"| `{formatter._format_action_invocation(action)}` | {' '.join(text.split())} |"


def settings() -> str:
    """The drafter's settings and those of a training, with their defaults."""
    from dataclasses import fields

    from transformers import TrainingArguments

    from coral_hf import CoralDraftConfig
    from coral_hf.training import CoralTrainingArguments

    parts = ["# Settings", "## Of a drafter (`config.json`)"]
    documented = re.findall(
        r"^    (`?\w.*?)\n((?:        .*\n)+)", inspect.cleandoc(CoralDraftConfig.__doc__ or ""), re.M
    )
    rows = [[head.rstrip(":"), text] for head, text in documented]
    parts.append(_rows(["setting", "meaning"], rows))
    theirs = {entry.name: entry for entry in fields(TrainingArguments)}
    rows = [
        [f"`{entry.name}`", "" if entry.default is None else f"`{entry.default}`", entry.metadata.get("help", "")]
        for entry in fields(CoralTrainingArguments)
        if entry.name not in theirs or entry.metadata.get("help") != theirs[entry.name].metadata.get("help")
    ]
    parts += ["## Of a training (`CoralTrainingArguments`)", _rows(["setting", "default", "meaning"], rows)]
    return "\n\n".join(parts) + "\n"


def _rows(head: list[str], rows: list[list[str]]) -> str:
    lines = [
        head,
        ["---"] * len(head),
        *([" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def api() -> str:
    """The docstring of every name in public_api.md."""
    listed = (ROOT / "docs" / "public_api.md").read_text(encoding="utf-8")
    parts = ["# API", "The names of [Public API](public_api.md), from their docstrings."]
    for line in listed.splitlines():
        if line.startswith("## "):
            parts.append(line)
        elif match := re.match(r"\| `(coral_hf[\w.]+)` \|", line):
            parts.append(f"::: {match[1]}")
    return "\n\n".join(parts) + "\n"
