"""What an earlier run left where this one writes: never replaced unless the user says so."""

from pathlib import Path


def check_replaceable(place: str | Path, found: str | None, overwrite: bool, remedies: str) -> None:
    """Raises `ValueError` if writing would replace what another run left.

    Args:
        place (`str` or `Path`): the file or folder to write.
        found (`str`, *optional*): what it contains that this run did not write; None for nothing.
        overwrite (`bool`): the user asked to replace it.
        remedies (`str`): what to do instead, each with its option.
    """
    if found is not None and not overwrite:
        raise ValueError(f"{place} contains {found}, which this run would replace: {remedies}.")


__all__ = ["check_replaceable"]
