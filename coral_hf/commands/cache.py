"""`coral-hf cache`: the package's files on this machine."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..utils.user_cache import cache_dir


KINDS = ("costs", "targets", "all")


@dataclass
class CacheCommand:
    """List or remove what is stored on this machine: measured costs and converted targets.

    Removed files are created again when needed.

    Examples:
        coral-hf cache
        coral-hf cache --clear costs
        coral-hf cache --clear all
    """

    clear: str | None = field(
        default=None, metadata={"help": "Remove stored files: costs, targets or all (default: list them)."}
    )

    def run(self) -> int:
        from ..demo import remove_converted

        if self.clear not in (None, *KINDS):
            raise ValueError(f"--clear {self.clear!r} is unknown; choose one of {', '.join(KINDS)}.")
        entries = kept_entries()
        if self.clear is not None:
            entries = [entry for entry in entries if self.clear in (entry["kind"], "all")]
            for entry in entries:
                if entry["kind"] == "targets":
                    remove_converted(entry["path"])
                else:
                    entry["path"].unlink(missing_ok=True)
        else:
            for entry in entries:
                date = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["date"]))
                print(f"{entry['kind']:<8} {_size(entry['bytes']):>9}  {date}  {entry['path'].name}  {entry['what']}")
        total = f"{len(entries)} entries, {_size(sum(entry['bytes'] for entry in entries))}"
        print(f"{'removed ' if self.clear else ''}{total}, in {cache_dir()}")
        return 0


def kept_entries() -> list[dict[str, Any]]:
    """The stored entries: `kind` (costs or targets), `path`, `bytes`, `date` (seconds since the epoch) and `what` it is."""
    from ..demo import converted_targets
    from ..generation.costs.files import cost_files

    entries = [
        {"kind": "costs", "path": path, "what": _costs_of(content), **_measures([path])}
        for path, content in cost_files()
    ]
    for folder, name in converted_targets():
        files = [path for path in folder.rglob("*") if path.is_file()]
        entries.append({"kind": "targets", "path": folder, "what": name, **_measures(files)})
    return entries


def _measures(files: list[Path]) -> dict[str, Any]:
    states = [path.stat() for path in files]
    return {"bytes": sum(state.st_size for state in states), "date": max(state.st_mtime for state in states)}


def _costs_of(content: dict[str, Any]) -> str:
    key = content.get("key")
    if not isinstance(key, dict):
        return "unreadable or of another version; measured again when needed"
    names = ("target", "dtype", "device", "threads")
    target, dtype, device, threads = (str(key.get(name, "?")) for name in names)
    return f"{target}, {dtype.removeprefix('torch.')}, {device}, {threads} threads"


def _size(count: int) -> str:
    power = sum(count >= 1000**step for step in (1, 2, 3))
    return f"{count / 1000**power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB')[power]}"


__all__ = ["CacheCommand", "kept_entries"]
