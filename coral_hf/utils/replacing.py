"""Protects files of earlier runs: they are only replaced if the user says so."""

from pathlib import Path


def check_replaceable(place: str | Path, found: str | None, overwrite: bool, remedies: str) -> None:
    """Raises `ValueError` if writing would replace files of another run.

    Args:
        place (`str` or `Path`): the file or folder to write.
        found (`str`, *optional*): a description of content that this run did not write; None if there is none.
        overwrite (`bool`): whether the user asked to replace it.
        remedies (`str`): remedies, each with its option.
    """
    if found is not None and not overwrite:
        raise ValueError(f"{place} contains {found}, which this run would replace: {remedies}.")


__all__ = ["check_replaceable"]
