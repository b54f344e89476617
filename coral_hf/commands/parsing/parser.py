"""The parser of a verb: grouped options, readable help and one-line errors."""

import argparse
import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

from .groups import GROUP_OF, GROUPS, KNOWN_AS, RUN, TITLES, TRAINING


HELP_ALL = "help_all"


class VerbParser(HfArgumentParser):
    """Reads the options of a verb from its dataclasses.

    Args:
        verb (`str`), types (`list[type]`): the verb and its dataclasses. The first one is the verb's own: its docstring is
            the description, and its `POSITIONAL` names the positional arguments.
        help_all (`bool`): also list Transformers' training arguments in the help.
    """

    def __init__(self, verb: str, types: list[type], help_all: bool = False):
        self._listed: dict[str, Any] = {}
        self._help_all = help_all
        self.verb, self.command = verb, types[0]
        positional: dict[str, str] = getattr(self.command, "POSITIONAL", {})
        required = [
            entry.name
            for kind in types
            for entry in dataclasses.fields(kind)
            if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        ]
        if any(issubclass(kind, TrainingArguments) for kind in types):
            required.append("output")  # Transformers' option has a default, which is not accepted here
        needed = " ".join([*map(str.upper, positional), *(f"{dashed(name)} {name.upper()}" for name in required)])
        super().__init__(
            types,
            prog=f"coral-hf {verb}",
            usage=f"coral-hf {verb} {needed} [options]".replace("  ", " "),
            description=inspect.cleandoc(self.command.__doc__ or ""),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        for name, text in positional.items():
            self.add_argument(name, help=text)
        self.add_argument("--help", "-h", action="help", help="Show this help.")
        if any(issubclass(kind, TrainingArguments) for kind in types):
            self.add_argument(
                "--help_all",
                action="help",
                help="Also show the options of Transformers' TrainingArguments.",
            )
        for action in self._actions:
            _make_readable(action)

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        """Adds every field to its group, in the order of the groups."""
        hints = get_type_hints(dtype)
        fields = {entry.name: entry for entry in dataclasses.fields(dtype) if entry.init}
        order = {name: place for place, name in enumerate(GROUP_OF)}
        for name in sorted(fields, key=lambda name: (name not in order, order.get(name, 0))):
            fields[name].type = hints[name]
            theirs = name in TrainingArguments.__dataclass_fields__
            group = GROUP_OF.get(name, TRAINING if theirs else RUN)
            self._parse_dataclass_field(self._group(group), fields[name])

    def _group(self, name: str) -> Any:
        if not self._listed:
            for known in (*GROUPS, TRAINING):
                self._listed[known] = self.add_argument_group(TITLES.get(known, known))
        return self._listed[name]

    def format_help(self) -> str:
        hidden = [] if self._help_all else self._listed.get(TRAINING, self)._group_actions
        kept = [(action, action.help) for action in hidden]
        for action in hidden:
            action.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in kept:
                action.help = text

    def error(self, message: str) -> Any:
        """Raises a one-line error instead of printing the usage and exiting."""
        message = re.sub(r"(?:argument )?(--[\w-]+(?:/-{1,2}[\w-]+)*)", lambda m: dashed(m[1].split("/")[0]), message)
        message = message.replace("the following arguments are required:", "give")
        raise ValueError(f"{message.rstrip('.')}; `coral-hf {self.verb} --help` lists the options.")

    def refuse_unknown(self, unknown: list[str]) -> None:
        """Raises `ValueError` for unknown options of the verb, with the option that was probably meant."""
        if not unknown:
            return
        name = unknown[0].split("=")[0]
        options = {option.lstrip("-"): option for action in self._actions for option in action.option_strings}
        bare = name.lstrip("-").replace("-", "_")
        near = difflib.get_close_matches(bare, options, n=1, cutoff=0.75)
        meant = next((known for known in (KNOWN_AS.get(bare), *near) if known in options), None)
        hint = (
            f"`coral-hf {self.verb} --help` lists the options." if meant is None else f"did you mean {dashed(meant)}?"
        )
        hint = getattr(self.command, "REFUSED", {}).get(name, hint)  # options of other verbs
        raise ValueError(f"unknown option or argument {unknown[0]!r}; {hint}")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows one spelling of an option, and its default once."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        values = "" if action.nargs == 0 else f" {self._format_args(action, action.dest.upper())}"
        spelling = "output" if "--output" in action.option_strings else action.option_strings[0]
        return f"{dashed(spelling)}{values}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = re.sub(r"--[a-z]+_\w+", lambda match: dashed(match[0]), action.help or "")
        default = action.default
        told = "default" in text or default in (None, False, argparse.SUPPRESS, [], "") or not action.option_strings
        if told or action.nargs == 0:
            return text
        shown = (
            " ".join(map(str, default))
            if isinstance(default, list)
            else str(default).lower()
            if default is True
            else default
        )
        return f"{text.rstrip('.')} (default: {str(shown).replace('%', '%%')})."


def parser_of(verb: str, command: type, help_all: bool = False) -> VerbParser:
    """The parser of a verb. `train` also takes Transformers' training arguments."""
    types = [command]
    if verb == "train":
        from ...training.arguments import CoralTrainingArguments

        types.append(CoralTrainingArguments)
    return VerbParser(verb, types, help_all)


def parse_verb(verb: str, command: type, arguments: list[str]) -> Callable[[], int]:
    """Parses and checks a verb's options. Returns its `run`.

    Raises:
        ValueError: for unknown, malformed or missing options.
        SystemExit: after `--help`.
    """
    words = underscores(arguments)
    parser = parser_of(verb, command, f"--{HELP_ALL}" in words)
    parser.refuse_unknown(parser.parse_known_args(words)[1])
    parsed = parser.parse_args_into_dataclasses(args=words)
    threads = getattr(parsed[0], "threads", None)
    if threads is not None and threads < 1:
        raise ValueError(f"--threads {threads} must be at least 1.")
    limit = getattr(parsed[0], "limit", None)
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit} must be at least 1; leave it out for all prompts.")
    return partial(_run, *parsed)


def _run(command: Any, *more: Any) -> int:
    """Runs a verb. Ctrl-C prints how to resume, if the verb supports it."""
    try:
        return command.run(*more)
    except KeyboardInterrupt:
        hint = getattr(command, "after_interrupt", None)
        raise KeyboardInterrupt(*([hint(*more)] if hint is not None else [])) from None


def underscores(arguments: list[str]) -> list[str]:
    """Allows dashes and underscores in options."""
    return [
        "--"
        + argument[2:].split("=", 1)[0].replace("-", "_")
        + ("=" + argument.split("=", 1)[1] if "=" in argument else "")
        if argument.startswith("--")
        else argument
        for argument in arguments
    ]


def dashed(name: str) -> str:
    """`draft_depth` or `--draft_depth` -> `--draft-depth`, the spelling in the documentation."""
    return f"--{name.lstrip('-').replace('_', '-')}"


def _make_readable(action: argparse.Action) -> None:
    """A short word for an option's value. The second spelling of a switch is not listed."""
    if action.option_strings and action.option_strings[0].startswith("--no_"):
        action.help = argparse.SUPPRESS
        return
    few = action.choices is not None and len(list(action.choices)) <= 4
    if action.metavar is None and action.option_strings and action.nargs != 0 and not few:
        kind = getattr(action.type, "__name__", "")
        action.metavar = {"int": "N", "float": "X", "string_to_bool": "true|false"}.get(kind, "TEXT")


__all__ = ["VerbParser", "dashed", "parse_verb", "parser_of", "underscores"]
