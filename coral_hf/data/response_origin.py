"""The target that wrote the answers in rows. Answers of two targets must not mix in a file, nor unnoticed in a training."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..drafter.hub_names import hub_commit, public_name


@dataclass(frozen=True)
class Origin:
    """A target as named in response rows. Unknown parts are empty.

    Args:
        target (`str`): its name, or its name at an endpoint; for a folder, the last part of the path.
        target_revision (`str`): its commit on the Hub.
        target_weights (`str`): a hash of a sample of its weights in bfloat16, which does not depend on the dtype that it
            is loaded in.
    """

    target: str | None = None
    target_revision: str | None = None
    target_weights: str | None = None

    @classmethod
    def of(cls, target: Any) -> "Origin":
        """The origin of a loaded target's answers."""
        name, revision = public_name(getattr(target.config, "_name_or_path", None)), hub_commit(target.config)
        offloaded = any(parameter.device.type == "meta" for parameter in target.parameters())
        return cls(name, revision, None if offloaded else weight_sample(target, torch.bfloat16)[:12])

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> "Origin":
        """The origin in a row; empty if the row names none."""
        return cls(*(row.get(name) for name in COLUMNS))

    @property
    def columns(self) -> dict[str, str]:
        """The keys that a row of this target gets."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def contradicts(self, other: "Origin") -> bool:
        """Whether this is definitely another target: by commit or weights, or by name if the weights are unknown."""
        pairs = [(self.target_revision, other.target_revision), (self.target_weights, other.target_weights)]
        if self.target_weights is None and other.target_weights is None:
            pairs.append((self.target, other.target))
        return any(None not in pair and pair[0] != pair[1] for pair in pairs)

    def __str__(self) -> str:
        revision = f" at revision {self.target_revision}" if self.target_revision else ""
        sample = f" (weights {self.target_weights})" if self.target_weights else ""
        return f"{self.target or 'a target without a name'}{revision}{sample}"


COLUMNS = ("target", "target_revision", "target_weights")


def check_same_run(row: Mapping[str, Any], where: str, temperature: float, origin: Origin) -> None:
    """Raises `ValueError` unless a run with these settings could have written an answer on file."""
    found = row.get("temperature") or 0.0
    if found != temperature:
        raise ValueError(
            f"{where} contains a response at temperature {found}, this run has {temperature}; give another output file."
        )
    if (other := Origin.read(row)).contradicts(origin):
        pinned = other.target_revision if other.target_revision != origin.target_revision else None
        # no option takes revisions that are not the Hub's (for example the demo's)
        is_commit = pinned is not None and re.fullmatch(r"[0-9a-f]{4,64}", pinned)
        instead = "" if not is_commit else f", or continue with --target_revision {pinned}"
        raise ValueError(
            f"{where} contains a response of {other}, this run's target is {origin}; give another output file{instead}."
        )


def weight_sample(target: nn.Module, dtype: torch.dtype = torch.float32) -> str:
    """A hash of a few values of every weight in `dtype`, which distinguishes fine-tuned copies and adapters of one name."""
    digest = hashlib.sha1()
    for name, parameter in sorted(target.named_parameters()):
        digest.update(name.encode())
        if parameter.device.type != "meta":  # offloaded
            digest.update(parameter.detach().flatten()[:64].to(dtype).float().cpu().numpy().tobytes())
    return digest.hexdigest()


class WatchedRows:
    """Passes on training rows. Prints once if an answer is from a target other than `origin`, or its author is unknown."""

    def __init__(self, rows: Iterable[Any], origin: Origin):
        self.rows, self.origin = rows, origin
        self._told = self._told_of_unknown = False

    def __iter__(self) -> Iterator[Any]:
        for row in self.rows:
            if not self._told and isinstance(row, Mapping):
                self._look_at(row)
            yield row

    def _look_at(self, row: Mapping[str, Any]) -> None:
        found = Origin.read(row)
        ids = row.get("prompt_ids") is not None or row.get("input_ids") is not None
        if found == Origin() and not ids and not self._told_of_unknown:
            self._told_of_unknown = True
            print(
                f"note: row {row.get('id', '')!r}, and possibly others, does not say which model wrote its answer. A drafter "
                "learns best from its own target's answers: run `coral-hf regenerate --prompts FILE --output responses.jsonl` on "
                "this file, and train on responses.jsonl.",
                flush=True,
            )
        # an endpoint's name for a model is not the name of a target
        if Origin(None, found.target_revision, found.target_weights).contradicts(self.origin):
            self._told = True
            print(
                f"warning: row {row.get('id', '')!r} contains an answer of {found}, but the target of this training is "
                f"{self.origin}. A drafter learns best from its own target's answers: make them with `coral-hf regenerate`.",
                flush=True,
            )


__all__ = ["COLUMNS", "Origin", "WatchedRows", "check_same_run", "weight_sample"]
