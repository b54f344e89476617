"""Places to write to, checked before the work whose results they are for."""

from pathlib import Path


def check_output_folder(path: str | Path | None, option: str = "output") -> None:
    """Raises `ValueError` where a folder to write, or one on the way to it, is a file; None is no folder."""
    if path is None:
        return
    for place in (Path(path), *Path(path).parents):
        if place.is_dir():
            return
        if place.exists():
            raise ValueError(f"--{option} {path}: {place} is a file; give a folder, new or existing.")


def check_output_file(path: str | Path | None, option: str = "json", make_folder: bool = False) -> None:
    """Raises `ValueError` where a file to write is a folder, or its folder is none; None is no file.

    Args:
        path (`str` or `Path`, *optional*), option (`str`): as given, and by which option.
        make_folder (`bool`): the folder is made where there is none.
    """
    if path is None:
        return
    if Path(path).is_dir():
        raise ValueError(f"--{option} {path} is a folder; give the path of a file.")
    if make_folder:
        check_output_folder(Path(path).parent, option)
    elif not Path(path).parent.is_dir():
        raise ValueError(f"--{option} {path}: its folder does not exist; make it first.")


__all__ = ["check_output_file", "check_output_folder"]
