"""What `coral-hf convert` does, and the lines it prints."""

import os
from typing import Any

from .checkpoint_files import check_output_folder, staged_folder
from .eagle_import import load_eagle
from .engine_export import export_drafter


FORMATS = ("eagle",)


def convert_from(
    model_class: type,
    source: str,
    path: str,
    output: str | os.PathLike,
    target: Any,
    target_feature_layers: list[int] | None = None,
    revision: str | None = None,
) -> None:
    """Writes an EAGLE-family checkpoint as a CORAL folder.

    Args:
        model_class (`type`): [`CoralDraftModel`].
        source (`str`): one of `FORMATS`.
        path (`str`): folder or Hub id of the checkpoint.
        output (`str` or `os.PathLike`): new or empty folder.
        target (`PreTrainedModel`): the model it drafts for.
        target_feature_layers (`list[int]`, *optional*): see [`CoralDraftConfig`]; by default what the checkpoint says.
        revision (`str`, *optional*): branch, tag or commit of the checkpoint's Hub repository.

    Raises:
        ValueError: as `CoralDraftModel.from_eagle`, or if the folder is taken. Nothing is written.
    """
    if source not in FORMATS:
        raise ValueError(f"--from {source!r} is unknown; choose one of {list(FORMATS)}.")
    check_output_folder(output)
    overrides: dict[str, Any] = (
        {} if target_feature_layers is None else {"target_feature_layers": target_feature_layers}
    )
    drafter = load_eagle(model_class, path, target, revision, **overrides)
    with staged_folder(output) as scratch:
        drafter.save_pretrained(scratch)
    config = drafter.config
    head = "the target's head" if config.draft_vocab_size is None else f"a head of {config.draft_vocab_size} ids"
    print(f"{output}: shape {config.shape}, target features {config.target_feature_layers}, {head}.")


def convert_to(
    engine: str,
    drafter: Any,
    output: str | os.PathLike,
    target: Any = None,
    target_name: str | None = None,
) -> None:
    """Writes a drafter for a serving engine and prints what differs there and the serve command.

    Args:
        as for [`~conversion.engine_export.export_drafter`].

    Raises:
        ValueError: if the engine cannot express the drafter. Nothing is written.
    """
    export = export_drafter(drafter, engine, output, target=target, target_name=target_name)
    for line in export.notes:
        print(line)
    print(export.command)


__all__ = ["convert_from", "convert_to"]
