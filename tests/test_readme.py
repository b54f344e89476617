"""README, CONTRIBUTING and the manual do what they say: snippets run, command lines parse or run, public names are documented."""

import argparse
import ast
import importlib
import inspect
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from helpers.hub_server import TOKEN
from transformers import HfArgumentParser

from coral_hf import cli
from coral_hf.commands.parsing.parser import parse_verb
from coral_hf.hub.training_tables import tokens_seen


ROOT = Path(__file__).parent.parent
MANUAL = tuple(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *MANUAL,
    "examples/space/README.md",
    "examples/recipes/llama-3-8b-instruct.md",
)
# the order in which a reader meets them: later pages use the names and files of earlier ones
SNIPPET_PAGES = (
    "docs/quickstart.md",
    "docs/measuring.md",
    "docs/training.md",
    "docs/publishing.md",
    "docs/libraries.md",
)
SNIPPET_PAGES += ("docs/migrating.md", "README.md")
COMMAND_PAGES = ("docs/training.md", "docs/draft_heads.md", "docs/measuring.md", "docs/publishing.md")
# modules whose whole __all__ is promised, and single names of other modules
PUBLIC_MODULES = ("coral_hf", "coral_hf.demo", "coral_hf.training")
PUBLIC_NAMES = (
    "coral_hf.conversion.export_drafter",
    "coral_hf.conversion.export_gguf",
    "coral_hf.evaluation.benchmark.run_benchmark",
    "coral_hf.evaluation.verify.verify",
    "coral_hf.hub.model_card.write_card",
    "coral_hf.training.low_rank_trainer.CoralLowRankTrainer",
    "coral_hf.training.router_trainer.CoralRouterTrainer",
)


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language, in order, except those that a comment marks as not run, with a reason."""
    text = re.sub(
        r"^<!-- not run: \S[^>]* -->\n```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE
    )
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def command_lines(text: str) -> list[list[str]]:
    """The commands of a shell script as words: continued lines joined, `&&` split, comments dropped."""
    lines = text.replace("\\\n", " ").splitlines()
    commands = [part for line in lines for part in line.split("&&")]
    return [words for command in commands if (words := shlex.split(command, comments=True))]


def documented_commands() -> list[tuple[str, list[str]]]:
    """Every `coral-hf VERB ...` of the pages, the examples and the verbs' own help, with its place."""
    texts = [(page, block) for page in PAGES for block in blocks(page, "bash")]
    for path in sorted(path for folder in ("examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        texts.append((path.name, "\n".join(line for line in docstring.splitlines() if "coral-hf " in line)))
    for verb, command in cli.COMMANDS.items():
        example = inspect.cleandoc(command.__doc__).partition("Examples:")[2]
        texts.append((f"coral-hf {verb} --help", example))
    commands = [(place, words) for place, text in texts for words in command_lines(text)]
    # an example of a verb contains only commands: any other line would become part of one
    assert all(words[0] == "coral-hf" for place, words in commands if place.endswith("--help"))
    return [(place, words) for place, words in commands if words[0] == "coral-hf"]


@pytest.mark.parametrize(
    ("place", "words"),
    documented_commands(),
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else value,
)
def test_command_parses(place, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parse_verb(
        words[1], cli.COMMANDS[words[1]], words[2:]
    )  # SystemExit for an unknown flag, ValueError for a wrong setting


def documented_scripts() -> list[tuple[str, str, tuple[str, ...]]]:
    """Every `python SCRIPT.py ...` of the pages and of the examples' docstrings: its place, script, arguments."""
    texts = [(page, block) for page in PAGES for block in blocks(page, "bash")]
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
        texts += [(page, " ".join(text.split())) for text in re.findall(r"`([^`]+)`", prose)]
    for path in sorted(path for folder in ("examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        docstring = (ast.get_docstring(ast.parse(path.read_text())) or "").replace("\\\n", " ")
        texts += [(path.name, line) for line in docstring.splitlines()]
    found = []
    for place, text in texts:
        # apostrophes in prose are not quotes
        lines = [
            line for line in text.replace("\\\n", " ").splitlines() if re.match(r"\s*(python3?|accelerate) ", line)
        ]
        for words in command_lines("\n".join(lines)):
            scripts = [
                index
                for index, word in enumerate(words)
                if re.fullmatch(r"(examples|benchmarks|scripts|tests)/\S+\.py", word)
            ]
            if scripts:
                found.append((place, words[scripts[0]], tuple(words[scripts[0] + 1 :])))
    return list(dict.fromkeys(found))


class _Parsed(Exception):
    """Raised when a script has understood its arguments and would begin its work."""


def _stopping(parse):
    def parse_and_stop(*args, **kwargs):
        parse(*args, **kwargs)  # SystemExit or ValueError for what it does not know
        raise _Parsed

    return parse_and_stop


@pytest.mark.parametrize(("place", "script", "arguments"), documented_scripts(), ids=str)
def test_script_arguments_parse(place, script, arguments, tmp_path, monkeypatch):
    """Each script is started as written there, and stopped after its own parser has read the arguments."""
    path = ROOT / script
    assert path.exists(), f"{place} runs {script}"
    parsers = [path, ROOT / "tests" / "fuzz" / "fuzz_driver.py"] if "fuzz_driver" in path.read_text() else [path]
    if not any(name in one.read_text() for one in parsers for name in ("ArgumentParser", "parse_script")):
        assert not any(word.startswith("-") for word in arguments) or "sys.argv" in path.read_text()
        return
    for kind, name in ((argparse.ArgumentParser, "parse_args"), (HfArgumentParser, "parse_args_into_dataclasses")):
        monkeypatch.setattr(kind, name, _stopping(getattr(kind, name)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(_Parsed):
        runpy.run_path(str(path), run_name="__main__")


def test_commands_and_files_that_are_named_exist():
    named = {words[1] for _, words in documented_commands()}
    assert named == set(cli.COMMANDS)
    for page in PAGES:
        for words in [words for block in blocks(page, "bash") for words in command_lines(block)]:
            for word in words:
                if re.fullmatch(r"(examples|benchmarks|scripts|tests|\.ci)/\S+", word):
                    assert (ROOT / word).exists(), f"{page} runs {word}"
        text = (ROOT / page).read_text()
        for path in re.findall(r"`((?:examples|benchmarks|scripts|tests|model_cards|docs|\.ci)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{page} names {path}"
        for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert ((ROOT / page).parent / path).exists(), f"{page} links {path}"


def test_python_snippets_run_in_order(workplace, hub, modules_cache, monkeypatch, capsys):
    """The snippets in one namespace, as a reader types them; only the training is shorter."""
    assert {page for page in PAGES if blocks(page, "python")} == set(SNIPPET_PAGES)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    namespace: dict = {}
    snippets = [(page, snippet) for page in SNIPPET_PAGES for snippet in blocks(page, "python")]
    assert sum("max_steps=1000" in snippet for _, snippet in snippets) == 1
    for page, snippet in snippets:
        snippet = snippet.replace("max_steps=1000", 'max_steps=1, report_to="none"')
        exec(compile(snippet, page, "exec"), namespace)
    assert (workplace / "outputs/drafter/model.safetensors").exists()
    assert "README.md" in hub.files("org/name")


# What a tiny model on two cores needs beside the line of the manual: fewer steps and tokens, and sizes that fit it.
SMALLER = {
    "regenerate": ["--max_new_tokens", "6", "--slots", "4", "--max_prompt_tokens", "64"],
    "train": ["--max_steps", "1", "--eval_rows", "2", "--report_to", "none"],
    "benchmark": ["--max_new_tokens", "6", "--limit", "1"],
    "verify": ["--max_new_tokens", "6", "--limit", "1"],
}
SIZES = {"--router-groups": "8", "--shortlist-size": "64", "--low-rank-size": "8"}


def lines_of(page: str) -> list[list[str]]:
    return [words for block in blocks(page, "bash") for words in command_lines(block) if words[0] == "coral-hf"]


@pytest.mark.slow
def test_command_lines_run_in_order(workplace, capsys):
    """The manual's own lines, from regenerating to publishing, on a tiny `your/model`."""
    wanted = ("regenerate", "train", "verify", "benchmark", "card")
    lines = [words for page in COMMAND_PAGES for words in lines_of(page) if words[1] in wanted]
    assert all(words in lines for words in lines_of("README.md") if words[1] in wanted)
    (workplace / "responses.jsonl").unlink()
    for _, verb, *words in lines:
        words = [SIZES.get(before, word) for before, word in zip([None, *words], words, strict=False)]
        if "--drafter" in words and "outputs/eagle" in words:  # two drafters to compare: the one just trained
            words = [w.replace("outputs/eagle", "outputs/drafter").replace("outputs/coral", "tiny") for w in words]
        words = [word.replace("outputs/coral", "outputs/drafter") for word in words]
        assert cli.main([verb, *words, *SMALLER.get(verb, [])]) == 0, f"{verb} {words}: {capsys.readouterr().err}"
    assert {verb for _, verb, *_ in lines} == set(wanted)
    assert (workplace / "outputs/drafter/README.md").exists() and (workplace / "outputs/routed/config.json").exists()


def sentences(page: str) -> list[str]:
    """The sentences of a page's prose: no code, tables, headings or comments."""
    text = re.sub(r"^```.*?^```|^<!--.*?-->", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    text = "\n".join(line for line in text.splitlines() if not line.startswith(("|", "#", "!")))
    text = re.sub(r"\]\([^)]*\)", "]", text)
    paragraphs = re.split(r"\n\s*\n|\n(?=- )", text)
    return [part for each in paragraphs for part in re.split(r"(?<=[.!?:])\s+", " ".join(each.split())) if " " in part]


def test_readme_is_read_in_a_minute():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
    found = [len(sentence.split()) for sentence in sentences("README.md")]
    assert sum(found) / len(found) < 17 and max(found) <= 35


def test_every_key_of_a_record_is_explained():
    """docs/records.md has the keys of the shipped drafter's records."""
    page = (ROOT / "docs" / "records.md").read_text()
    for name in ("benchmark.json", "check_coral.json", "tune.json"):
        record = json.loads((ROOT / "model_cards/smollm2-135m-instruct-coral/training" / name).read_text())
        keys = {*record, *(key for row in record.get("runs", ()) for key in row)}
        assert not [key for key in sorted(keys) if f"`{key}`" not in page], name


def public_objects() -> list[tuple[str, object]]:
    found = [
        (f"{module}.{name}", getattr(importlib.import_module(module), name))
        for module in PUBLIC_MODULES
        for name in importlib.import_module(module).__all__
    ]
    for path in PUBLIC_NAMES:
        module, _, name = path.rpartition(".")
        found.append((path, getattr(importlib.import_module(module), name)))
    return found


@pytest.mark.parametrize(
    ("path", "value"), public_objects(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_public_name_is_documented(path, value):
    page = (ROOT / "docs" / "public_api.md").read_text()
    assert re.search(rf"^\| `{re.escape(path)}` \| \S", page, re.MULTILINE), (
        f"{path} has no line in docs/public_api.md"
    )
    if inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value):
        docstring = value.__doc__ or ""
        # what dataclasses write themselves is the signature again
        assert docstring.strip() and not docstring.startswith(f"{path.rpartition('.')[2]}("), path


def test_page_of_public_names_lists_no_other():
    listed = re.findall(r"^\| `(coral_hf[\w.]*)` \|", (ROOT / "docs" / "public_api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path for path, _ in public_objects())


def test_figures_are_those_of_the_records(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import build_measurements

    readme = (ROOT / "README.md").read_text()
    assert readme == build_measurements.with_tables(readme), "run python docs/build_measurements.py"
    assert (ROOT / "docs" / "measurements.md").read_text() == build_measurements.page()
    record = json.loads((ROOT / "model_cards/smollm2-135m-instruct-coral/training/benchmark.json").read_text())
    rows = {row["method"]: row for row in record["runs"] if row["benchmark"] == "all"}
    text, row = " ".join(readme.split()), rows["coral"]
    limits, training = (" ".join((ROOT / "docs" / name).read_text().split()) for name in ("limits.md", "training.md"))
    kept = f"{row['identical']} of {row['n_turns']} answers stayed identical"
    assert kept in text and kept in limits
    assert f"left {rows['prompt_lookup']['identical']}." in limits
    assert f"over {row['n_turns']} answers of {record['max_new_tokens']} tokens to {row['n_prompts']} prompts" in text
    ablation = json.loads((ROOT / "model_cards/smollm2-135m-instruct-coral/training/ablation.json").read_text())
    eagle, hass, coral = (ablation["acceptance_length"][name]["mean"] for name in ("eagle", "hass", "coral"))
    assert f"is worth {hass - eagle:.2f} of tau here and CSRA nothing yet" in training and abs(coral - hass) < 0.005
    log = (ROOT / "model_cards/smollm2-135m-instruct-coral/training/log.jsonl").read_text().splitlines()
    seen = [tokens_seen(json.loads(line)) or 0 for line in log]
    assert f"saw {max(seen) / 1e6:.0f} million response tokens" in training
    contact = json.loads((ROOT / "benchmarks/records/first_contact.json").read_text())
    sizes = {row["stage"]: row.get("downloaded_bytes", 0) / 1e6 for row in contact["stages"]}
    assert contact["machine"]["cpus"] == 2
    assert f"it took {contact['seconds_to_demo']:.0f} seconds on two cores" in text
    assert f"it downloads {contact['downloaded_bytes'] / 1e6:.0f} MB ({sizes['torch']:.0f} MB of them torch)" in text
    estimate = json.loads((ROOT / "benchmarks/records/llama-3-8b-instruct_estimate.json").read_text())
    cost = f"{estimate['hours']:.0f} hours and {estimate['memory']['peak'] / 2**30:.0f} GiB"
    assert f"we estimate {cost} of GPU memory on one H100" in text
    weights, own = (2 * estimate[name] / 1e9 for name in ("target_parameters", "drafter_parameters"))
    assert f"Llama-3-8B ({weights:.1f} GB in bfloat16) and its drafter ({own:.1f} GB) fit on a 24 GB GPU" in text
    assert f"Llama-3-8B takes {weights:.1f} GB in bfloat16, and its drafter {own:.1f} GB." in limits
    peak, least = estimate["memory"]["peak"], estimate["peak_with_activation_checkpointing"]
    assert weights + own < 24 < least / 1e9 and "fit on a 24 GB GPU. Training does not." in text
    assert f"takes {peak / 2**30:.0f} GiB, or {least / 2**30:.0f} GiB with" in limits
    drafters = json.loads((ROOT / "docs/hub_drafters.json").read_text())
    count = len(drafters["drafters"])
    assert (
        f"names {count + len(drafters['named'])} drafters. We tested the published configs of {count}, but no weights"
        in text
    )


def test_readme_counts_the_families_of_the_table(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import family_matrix

    number = family_matrix.counts(family_matrix.read_record())
    families, trees, chains = (number[name] for name in ("families", "tree", "chain"))
    said = f"Of {families} model families tried, {trees} support trees, {chains - trees} only chains, and {families - chains}"
    assert said in " ".join((ROOT / "README.md").read_text().split())


def test_every_switch_and_file_of_the_papers_exists():
    from dataclasses import fields

    from coral_hf import CoralDraftConfig
    from coral_hf.commands.train import TrainCommand
    from coral_hf.generation.settings import DraftSettings
    from coral_hf.training import CoralTrainingArguments

    text = (ROOT / "docs/papers.md").read_text()
    flags = {entry.name for kind in (TrainCommand, CoralTrainingArguments) for entry in fields(kind)}
    assert [flag for flag in re.findall(r"`--([\w-]+)", text) if flag.replace("-", "_") not in flags] == []
    settings = {entry.name for entry in fields(DraftSettings)} | set(CoralDraftConfig.__annotations__)
    assert [name for name in re.findall(r"`(draft_\w+|norm_\w+|fc_norm)`", text) if name not in settings] == []
    assert [path for path in re.findall(r"`(coral_hf/[\w/.]+)`", text) if not (ROOT / path).exists()] == []


def test_pictures_are_those_of_the_records(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import build_pictures

    for name, picture in build_pictures.PICTURES.items():
        assert (ROOT / "docs" / name).read_text() == picture(), "run python docs/build_pictures.py"


def test_citation_is_complete_everywhere():
    """One paper, cited in the manual, in CITATION.cff and on every card."""
    authors = ("Weng", "Mei", "Qiu", "Chen", "Liu", "Tian", "Shi")
    for page in ("docs/papers.md", "CITATION.cff", "coral_hf/hub/model_card_template.md"):
        text = (ROOT / page).read_text()
        assert all(name in text for name in (*authors, "5580", "5593", "10.18653/v1/2025.acl-long.278")), page
