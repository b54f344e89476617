"""The card of a drafter, made from its config, its weights and its records: nothing in it is typed."""

import json
import math
import os
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open

from ..drafter.configuration_coral import CoralDraftConfig
from ..drafter.weight_files import WEIGHTS_FILE
from .card_tables import NOT_MEASURED, headline_rows, measured_section, reading, training_section
from .records import RECORD_FOLDER, Records, check_stated, read_records


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
    "For this target only{target}: a fine-tuned copy of it works too, with fewer tokens accepted.",
    "Speed depends on the machine, the dtype and the text: measure yours with `coral-hf benchmark`.",
    "Identity with plain decoding is exact in float32. In bfloat16 and float16 verifying several tokens at once rounds "
    "differently from single steps, so a near-tie may fall the other way.",
    "One sequence at a time; greedy decoding and sampling, no beam search.",
)


def render_card(
    folder: str | Path,
    repo_id: str | None = None,
    unmeasured: bool = False,
    strict: bool = True,
    stated: dict[str, Any] | None = None,
) -> str:
    """The card of the drafter in a folder, metadata and text; the same folder gives the same bytes.

    Args:
        folder (`str` or `Path`): see `hub.records`.
        repo_id (`str`, *optional*): where it is published; else the text loads it from the folder.
        unmeasured (`bool`): accept a folder without a benchmark record; its figures are "not measured".
        strict (`bool`): refuse records that are of another drafter, cut off or damaged; False leaves them out.
        stated (`dict`, *optional*): goes before the folder's `card.json`.

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
        summary=_summary(records, config, target),
        load=load.rstrip("\n") + "\n",
        target=_target_section(records, config, target),
        training=training_section(records),
        measured=measured_section(records, config),
        limits="\n".join(f"- {limit}" for limit in [*limits, *records.stated.get("limits", [])]),
    )
    return f"---\n{_metadata(records, title, target).to_yaml(line_break=chr(10))}\n---\n\n{text}"


def write_card(folder: str | Path, **settings: Any) -> Path:
    """Writes [`render_card`] to the folder's `README.md`, all of it or nothing."""
    path = Path(folder) / CARD_FILE
    text = render_card(folder, **settings)
    ModelCard(text)  # what the Hub could not read raises here
    part = path.with_name(f".{CARD_FILE}.part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)
    return path


def foreign_card(folder: str | Path) -> str | None:
    """What a folder's `README.md` is where [`write_card`] did not write it; None where it did, or there is none."""
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
        # a page shows the name of a metric alone: what is not said there passes for greedy decoding
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
    """The target's Hub id, or None for what may be a path on somebody's machine.

    `models/my-llama` reads like a Hub id: only what was loaded from the Hub has a revision there, which is recorded.
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
    floats = [piece for piece in pieces if "F" in piece.get_dtype()]  # the shortlist's ids are no parameters
    count = sum(math.prod(piece.get_shape()) for piece in floats)
    dtypes = "/".join(sorted({piece.get_dtype() for piece in floats}))
    parts = [f"`{config.shape}` shape", f"{count / 1e6:.1f} M parameters, {dtypes}"]
    if config.router_groups:
        parts.append(f"LM-head router of {config.router_groups} groups, {config.router_active_groups} active")
    if config.shortlist_size:
        parts.append(f"shortlist of {config.shortlist_size:,} ids")
    name = f"[{target}](https://huggingface.co/{target})" if target else "a model that has no public name"
    return (
        f"A CORAL drafter ({'; '.join(parts)}) for {name}: `generate` with it gives the same tokens in fewer forwards "
        "of the target (speculative decoding; Weng et al., ACL 2025, [arXiv 2502.16880]"
        "(https://arxiv.org/abs/2502.16880))."
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
    """The chat template's variables in the training, and those of benchmarks in another mode."""
    lines = [f"- Chat template's variables in the training: `{json.dumps(trained)}`"] if trained else []
    for name, record in records.benchmarks if trained is not None else ():
        if (measured := record.get("chat_template_kwargs")) not in (None, trained):
            lines.append(f"- In `{RECORD_FOLDER}/{name}`, which measured another mode: `{json.dumps(measured)}`")
    return lines


__all__ = ["CARD_FILE", "NOT_MEASURED", "foreign_card", "render_card", "write_card"]
