"""The card of a drafter and the page on its training, written from its config, weights and records."""

import json
import math
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open

from ..drafter.configuration_coral import CoralDraftConfig
from ..drafter.weight_files import WEIGHTS_FILE
from ..utils.whole_files import write_whole
from .card_tables import NOT_MEASURED, headline_rows, measured_section, reading
from .records import RECORD_FOLDER, Records, check_stated, read_records
from .training_tables import STORY_FILE, training_section, training_story


TAGS = ["coral", "speculative-decoding", "drafter"]
CARD_FILE = "README.md"
_TEMPLATE = Path(__file__).with_name("model_card_template.md")
_LOAD = """\
import coral_hf
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

target = AutoModelForCausalLM.from_pretrained("{target}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{target}")
drafter = AutoModel.from_pretrained("{drafter}", dtype="auto")
"""
_LIMITS = (
    "It works for this target only{target}, and for fine-tuned copies of it, which accept fewer tokens.",
    "Speed depends on the machine, the dtype and the text. Measure yours with `coral-hf benchmark`.",
    "The output is identical in float32. In bfloat16 and float16, verifying several tokens at once rounds differently from "
    "single steps, so two almost equally likely tokens may swap.",
    "Greedy decoding and sampling are supported; beam search is not.",
)


def render_card(
    folder: str | Path,
    repo_id: str | None = None,
    unmeasured: bool = False,
    strict: bool = True,
    stated: dict[str, Any] | None = None,
) -> str:
    """The card of the drafter in a folder: metadata and text. The same folder gives the same bytes.

    Args:
        folder (`str` or `Path`): see `hub.records`.
        repo_id (`str`, *optional*): the Hub id of the published drafter. Without it, the example loads the folder.
        unmeasured (`bool`): accept a folder without a benchmark record. Its figures are "not measured".
        strict (`bool`): reject damaged or incomplete records and those of another drafter. False skips them.
        stated (`dict`, *optional*): takes precedence over the folder's `card.json`.

    Raises:
        ValueError: see [`read_records`].
    """
    records = read_records(folder, unmeasured, strict)
    check_stated(stated or {}, "card")
    records.stated = {**records.stated, **(stated or {})}
    config = CoralDraftConfig.from_pretrained(folder)
    folder = Path(folder).resolve()
    title = records.stated.get("title") or (repo_id or folder.name).split("/")[-1]
    target = _public_name(config)
    stated_load = records.stated.get("load")
    if repo_id is not None and "load_published" in records.stated:
        stated_load = records.stated["load_published"].replace("$drafter", repo_id)
    load = stated_load or _LOAD.format(target=target or "path/to/target", drafter=repo_id or f"path/to/{folder.name}")
    limits = [_LIMITS[0].format(target=f" (`{target}`)" if target else ""), *_LIMITS[1:]]
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=title,
        headline=_headline(records),
        summary=_summary(records, config, target),
        load=load.rstrip("\n") + "\n",
        target=_target_section(records, config, target),
        training=training_section(records),
        measured=measured_section(records, config),
        limits="\n".join(f"- {limit}" for limit in [*limits, *records.stated.get("limits", [])]),
    )
    return f"---\n{_metadata(records, title, target).to_yaml(line_break=chr(10))}\n---\n\n{text}"


def write_card(folder: str | Path, **settings: Any) -> Path:
    """Writes [`render_card`] to the folder's `README.md`, and [`training_story`] next to the records if there is one."""
    path = Path(folder) / CARD_FILE
    text = render_card(folder, **settings)
    ModelCard(text)  # raises here if the Hub cannot read it
    story = training_story(read_records(folder, settings.get("unmeasured", False), settings.get("strict", True)))
    if story is not None:
        write_whole(Path(folder) / RECORD_FOLDER / STORY_FILE, story)
    write_whole(path, text)
    return path


def foreign_card(folder: str | Path) -> str | None:
    """Describes a folder's `README.md` that [`write_card`] did not write; None if it did, or if there is none."""
    path = Path(folder) / CARD_FILE
    if not path.exists():
        return None
    try:
        tags = ModelCard.load(path, ignore_metadata_errors=True).data.tags
    except (OSError, ValueError, AttributeError):
        tags = None
    return None if set(TAGS) <= set(tags or ()) else "a text that coral-hf did not write"


def _metadata(records: Records, title: str, target: str | None) -> ModelCardData:
    with reading("benchmark.json"):
        results = _results(records)
    stated = records.stated
    return ModelCardData(
        base_model=target,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*TAGS, *stated.get("tags", [])])),
        datasets=stated.get("datasets") or None,
        language=stated.get("language") or None,
        license=stated.get("license"),
        model_name=title if results else None,
        eval_results=results or None,
    )


def _results(records: Records) -> list[EvalResult]:
    results = []
    for row in headline_rows(records):
        # a page shows only the metric's name; without a note, readers assume greedy decoding
        temperature = row.get("temperature") or 0.0
        sampled = f", sampled at temperature {temperature:g}" if temperature else ""
        for metric, name in (("acceptance_length", "tau, tokens per target forward"), ("speedup", "median speedup")):
            if row.get(metric) is not None:
                result = EvalResult(
                    task_type="text-generation",
                    task_name="Speculative decoding",
                    dataset_type=row["benchmark"],
                    dataset_name="all prompts" if row["benchmark"] == "all" else row["benchmark"],
                    metric_type=metric,
                    metric_name=name + sampled,
                    metric_args={"temperature": temperature} if temperature else None,
                    metric_value=round(row[metric], 2),
                )
                results.append(result)
    return results


def _public_name(config: CoralDraftConfig) -> str | None:
    """The target's Hub id, or None if it may be a local path.

    `models/my-llama` looks like a Hub id. Only targets that were loaded from the Hub have a recorded revision.
    """
    name = config.target_name_or_path
    if not name or name.count("/") != 1 or name.startswith((".", "/", "~")) or Path(name).is_dir():
        return None
    return name if config.target_revision else None


def _summary(records: Records, config: CoralDraftConfig, target: str | None) -> str:
    try:
        with safe_open(records.folder / WEIGHTS_FILE, framework="pt") as weights:
            pieces = [weights.get_slice(name) for name in weights.keys()]  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{records.folder / WEIGHTS_FILE} is damaged ({error}); save the drafter again.") from error
    floats = [piece for piece in pieces if "F" in piece.get_dtype()]  # the shortlist's ids are not parameters
    count = sum(math.prod(piece.get_shape()) for piece in floats)
    dtypes = "/".join(sorted({piece.get_dtype() for piece in floats}))
    parts = [f"`{config.shape}` shape", f"{count / 1e6:.1f} M parameters, {dtypes}"]
    if config.router_groups:
        parts.append(f"LM-head router of {config.router_groups} groups, {config.router_active_groups} active")
    if config.low_rank_size:
        size, best = config.low_rank_size, config.low_rank_candidates
        parts.append(f"low-rank head of rank {size}, which scores {best} ids exactly")
    if config.shortlist_size:
        parts.append(f"shortlist of {config.shortlist_size:,} ids")
    name = f"[{target}](https://huggingface.co/{target})" if target else "a model without a public name"
    return (
        f"This drafter makes {name} generate faster. It proposes tokens, the target verifies them, and the output stays the "
        "target's own. The method is CORAL speculative decoding ([Weng et al., ACL 2025]"
        f"(https://aclanthology.org/2025.acl-long.278/)). Kind of drafter: {'; '.join(parts)}."
    )


def _headline(records: Records) -> str:
    """The headline for users, from the benchmark over all prompts."""
    with reading("benchmark.json"):
        rows = headline_rows(records)
        row = next((row for row in rows if row["benchmark"] == "all"), rows[0] if rows else None)
        if row is None or row.get("speedup") is None:
            return "Its speed was not measured yet."
        where = next(record for name, record in records.benchmarks if name == "benchmark.json")["environment"]
        temperature = row.get("temperature") or 0.0
        answers = f"{row['n_turns']} {f'answers at temperature {temperature:g}' if temperature else 'greedy answers'}"
        return (
            f"**{row['speedup']:.2f}x as fast as plain `generate`**: the median over {answers} on {where['device']} "
            f"({where['dtype']}, {where['threads']} CPU threads). Each forward pass of the target yields "
            f"{row['acceptance_length']:.2f} tokens on average."
        )


def _target_section(records: Records, config: CoralDraftConfig, target: str | None) -> str:
    lines = [
        f"- Name: {f'`{target}`' if target else 'not public'}",
        f"- Revision: {config.target_revision or 'not recorded'}",
        f"- Vocabulary hash: {f'`{config.target_vocab_hash}`' if config.target_vocab_hash else 'not recorded'}",
        f"- Type and size: `{config.target_model_type}`, {config.target_num_hidden_layers} layers, hidden "
        f"{config.hidden_size}, vocabulary {config.vocab_size:,}",
    ]
    lines += _modes(records, config.chat_template_kwargs)
    if records.stated.get("target"):
        lines.append(f"- {records.stated['target']}")
    return "\n".join(lines)


def _modes(records: Records, trained: dict[str, Any] | None) -> list[str]:
    """The chat template's variables in training, and those of benchmarks in another mode."""
    lines = [f"- Chat template's variables in training: `{json.dumps(trained)}`"] if trained else []
    for name, record in records.benchmarks if trained is not None else ():
        if (measured := record.get("chat_template_kwargs")) not in (None, trained):
            lines.append(f"- In `{RECORD_FOLDER}/{name}`, which measured another mode: `{json.dumps(measured)}`")
    return lines


__all__ = ["CARD_FILE", "NOT_MEASURED", "foreign_card", "render_card", "write_card"]
