"""A card's section on training and its linked page, as Markdown: data, runs, commands, curve and comparisons."""

import statistics
from pathlib import Path
from typing import Any

from .card_tables import NOT_MEASURED, number, reading, table
from .records import RECORD_FOLDER, Records


STORY_FILE = "TRAINING.md"
_CURVE_ROWS = 8


def training_section(records: Records) -> str:
    """Data, runs, the plotted curve and a link to [`training_story`]."""
    parts = [records.stated["data"]] if records.stated.get("data") else []
    parts += _responses(records.folder)
    with reading("training*.json"):
        parts += [_stage(stage) for stage in records.stages]
    with reading("log.jsonl"):
        seen = [count for row in records.log if (count := tokens_seen(row)) is not None]
    if seen:
        parts.append(f"{seen[-1]:,} response tokens seen, repetitions counted (`{RECORD_FOLDER}/log.jsonl`).")
    if training_story(records) is not None:
        parts.append(f"[{RECORD_FOLDER}/{STORY_FILE}]({RECORD_FOLDER}/{STORY_FILE}) has the commands and the details.")
    if not parts:
        parts.append("Not recorded.")
    if (records.folder / RECORD_FOLDER / "curve.png").is_file():
        parts.append(f"![Acceptance over training]({RECORD_FOLDER}/curve.png)")
    return "\n\n".join(parts)


def training_story(records: Records) -> str | None:
    """The full description of the training: commands, held-out acceptance and compared recipes; None if there are none."""
    parts = []
    commands = records.folder / RECORD_FOLDER / "commands.sh"
    if commands.is_file():
        parts.append(f"## Commands\n\n```bash\n{commands.read_text(encoding='utf-8').strip()}\n```")
    with reading("log.jsonl"):
        curve = curve_rows(records.log)
        if curve:
            parts.append(_curve(curve))
    if records.ablation is not None:
        with reading("ablation.json"):
            parts.append(_ablation(records.ablation))
    return "\n\n".join(["# How this drafter was trained", *parts]) + "\n" if parts else None


def _curve(curve: list[dict[str, Any]]) -> str:
    depths = sorted({int(key.rsplit("_", 1)[1]) for row in curve for key in row if _is_depth(key)})
    rows = [
        [f"{tokens_seen(row):,}", number(row["eval_acceptance_length"])]
        + [f"{row[key]:.0%}" if (key := f"eval_acceptance_{depth}") in row else NOT_MEASURED for depth in depths]
        for row in _thinned(curve)
    ]
    return f"## Held-out acceptance\n\nSimulated greedy chains of {len(depths)} with the full head:\n\n" + table(
        ["response tokens seen", "tau", *(f"accepted at depth {depth}" for depth in depths)], rows
    )


def tokens_seen(row: dict[str, Any]) -> int | None:
    """The number of response tokens seen at a row of the log."""
    names = ("response_tokens_seen", "response_tokens", "eval_response_tokens_seen")
    return next((row[name] for name in names if name in row), None)


def curve_rows(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log's evaluations."""
    return [row for row in log if "eval_acceptance_length" in row and tokens_seen(row) is not None]


def _is_depth(key: str) -> bool:
    return key.startswith("eval_acceptance_") and key.rsplit("_", 1)[1].isdigit()


def _thinned(rows: list[Any]) -> list[Any]:
    """At most `_CURVE_ROWS`, evenly spaced, including the first and the last."""
    if len(rows) <= _CURVE_ROWS:
        return rows
    return [rows[round(index * (len(rows) - 1) / (_CURVE_ROWS - 1))] for index in range(_CURVE_ROWS)]


def _responses(folder: Path) -> list[str]:
    shards = sorted((folder / "responses").glob("*.parquet"))
    if not shards:
        return []
    try:
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("Counting the responses needs pyarrow: pip install 'coral-hf[train]'.") from error
    rows = tokens = 0
    for shard in shards:
        column = pq.read_table(shard, columns=["response_ids"]).column("response_ids")
        rows += len(column)
        tokens += pc.sum(pc.list_value_length(column)).as_py()
    return [f"`responses/` contains {rows:,} answers that the target wrote, {tokens:,} tokens."]


def _ablation(record: dict[str, Any]) -> str:
    environment, runs = record["environment"], record["runs"]
    steps = ", ".join(f"{count:,}" for count in sorted({run["steps"] for run in runs}))
    # from the runs, because the record's summary is rounded
    found: dict[str, list[float]] = {}
    for run in runs:
        found.setdefault(run["variant"], []).append(run["eval_acceptance_length"])
    rows = [
        [
            f"`{name}`",
            f"{statistics.mean(values):.3f}",
            f"{statistics.stdev(values):.3f}" if len(values) > 1 else NOT_MEASURED,
            ", ".join(f"{value:.3f}" for value in values),
        ]
        for name, values in found.items()
    ]
    return (
        f"## Recipes compared\n\nSmall drafters with random starting weights, not this one, were trained on the same "
        f"{record['response_tokens']:,} response tokens for {steps} steps (`{RECORD_FOLDER}/ablation.json`, written by "
        f"`benchmarks/ablate_training.py`). Tau is that of simulated greedy chains of {record['chain_depth']} with the full head "
        f"on held-out answers, one value per seed. {environment['device']}, {environment['dtype']}; torch {environment['torch']}, transformers "
        f"{environment['transformers']}, coral_hf {environment['coral_hf']}, commit "
        f"{environment.get('commit') or 'not recorded'}.\n\n"
        + table(["preset", "tau, mean", "standard deviation", "values"], rows)
    )


def _stage(stage: dict[str, Any]) -> str:
    environment, count = stage["environment"], stage["conversations"]
    conversations = "a stream of conversations" if count is None else f"{count:,} conversations"
    # older records lack these
    data = f" of {', '.join(f'`{name}`' for name in stage['data'])}" if stage.get("data") else ""
    target = f" for `{stage['target']}`" if stage.get("target") else ""
    commit = f", commit {environment['commit']}" if environment.get("commit") else ""
    lines = [
        f"Stage `{stage['stage']}`{target}: {stage['steps']:,} steps over {conversations}{data}, "
        f"{stage['response_tokens_seen']:,} response tokens seen. {environment['device']}; torch {environment['torch']}, "
        f"transformers {environment['transformers']}, coral_hf {environment['coral_hf']}{commit}.",
    ]
    if stage["arguments"]:
        arguments = ", ".join(f"`{key}={value}`" for key, value in sorted(stage["arguments"].items()))
        lines.append(f"Settings that differ from the defaults: {arguments}.")
    if stage.get("chosen"):  # older records lack it
        chosen = ", ".join(f"`{key}={value}`" for key, value in sorted(stage["chosen"].items()))
        lines.append(f"Chosen for this target, data and device: {chosen}.")
    return " ".join(lines)


__all__ = ["STORY_FILE", "curve_rows", "tokens_seen", "training_section", "training_story"]
