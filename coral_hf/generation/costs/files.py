"""Files of measured costs: one per pair and machine, with a table for each batch size and context."""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...utils.user_cache import cache_dir
from ...utils.whole_files import write_json
from ..tree_size import DraftCosts


logger = logging.getLogger(__name__)

FORMAT = 5  # version of these files; costs in other versions are measured again


@dataclass(frozen=True)
class KeptCosts:
    """Measured costs, with a probe that tells whether the machine is still as fast as it was.

    Args:
        costs ([`DraftCosts`])
        probe_ms (`float`): time of a target forward pass over one token, just after the measurement.
        measured_at (`float`): seconds since the epoch.
    """

    costs: DraftCosts
    probe_ms: float
    measured_at: float


def costs_folder() -> Path:
    """The folder of measured costs."""
    return cache_dir() / "draft_costs"


def cost_files() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every file of measured costs and its content: an empty dict if it is unreadable or has another format."""
    for path in sorted(costs_folder().glob("*.json")):
        content = _content(path)
        yield path, content if content.get("format") == FORMAT else {}


def file_name(key: dict[str, Any]) -> str:
    """The name of the file with the costs of this pair on this machine."""
    return f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"


def read_costs(key: dict[str, Any], prefix: int, nodes: int, rows: int = 1) -> KeptCosts | None:
    """The kept costs for `rows` prefixes of that length and trees of up to `nodes`; None if there are none to use."""
    content = _content(costs_folder() / file_name(key))
    if content.get("format") != FORMAT or content.get("key") != key:
        return None
    try:
        (table,) = (table for table in content["tables"] if _is_of(table, prefix, rows))
        costs = DraftCosts(**{**table["costs"], "target_ms": tuple(table["costs"]["target_ms"])})
        kept = KeptCosts(costs, float(table["probe_ms"]), float(table["measured_at"]))
    except (KeyError, TypeError, ValueError):
        return None
    return kept if len(costs.target_ms) == nodes and kept.probe_ms > 0 else None


def write_costs(key: dict[str, Any], prefix: int, kept: KeptCosts, rows: int = 1) -> None:
    """Writes a table. It replaces the one with the same rows and prefix; others stay."""
    path = costs_folder() / file_name(key)
    content = _content(path)
    same = content.get("format") == FORMAT and content.get("key") == key and isinstance(content.get("tables"), list)
    others = [table for table in content["tables"] if not _is_of(table, prefix, rows)] if same else []
    tables = [*others, {"rows": rows, "prefix": prefix, **asdict(kept)}]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"format": FORMAT, "key": key, "tables": tables}, shared=True)
    except OSError as error:
        # The only consequence is that the next process measures again.
        logger.warning("Draft costs were measured but not kept in %s: %s", path, error)


def _is_of(table: Any, prefix: int, rows: int) -> bool:
    """Tables without a number of rows were written before batches were supported: they have one row."""
    return isinstance(table, dict) and table.get("prefix") == prefix and table.get("rows", 1) == rows


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


__all__ = ["FORMAT", "KeptCosts", "cost_files", "costs_folder", "file_name", "read_costs", "write_costs"]
