"""`coral-hf convert`: EAGLE-family checkpoints in, serving engines' checkpoints out."""

import contextlib
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .loading import DEMO, TargetOptions, load_drafter, load_target_config, load_target_ends


DTYPE = "bfloat16"
FORMATS = ("eagle",)


@dataclass
class ConvertCommand(TargetOptions):
    """Convert an EAGLE, HASS or EAGLE-3 checkpoint to a drafter, or a drafter to a serving engine's checkpoint.

    Examples:
        coral-hf convert --from eagle org/EAGLE3-model outputs/drafter --target org/model
        coral-hf convert --to vllm outputs/drafter outputs/for-vllm --draft-depth 3
        coral-hf convert --to gguf outputs/drafter outputs/for-llama-cpp --target model.gguf
    """

    POSITIONAL: ClassVar[dict[str, str]] = {
        "input": "Path or Hub id of the checkpoint; with --to also 'demo', the shipped drafter.",
        "output": "Folder to write, new or empty.",
    }

    from_format: str | None = field(default=None, metadata={"aliases": ["--from"], "help": "Read this format: eagle."})
    to: str | None = field(
        default=None, metadata={"help": "Write for vllm, sglang, speculators, eagle or llama.cpp (gguf)."}
    )
    target: str | None = field(  # type: ignore[assignment]  # --to needs none
        default=None,
        metadata={
            "help": "Path or Hub id of the target, or 'demo'. Required with --from. With --to gguf: the target's GGUF file."
        },
    )
    dtype: str | None = field(
        default=None, metadata={"help": f"Dtype of the target, if it is loaded (default: {DTYPE})."}
    )
    target_feature_layers: list[int] | None = field(
        default=None, metadata={"help": "With --from: the target layers whose inputs an EAGLE-3 checkpoint reads."}
    )
    revision: str | None = field(
        default=None,
        metadata={
            "help": "With --from: branch, tag or commit of the checkpoint's Hub repository (the target's: --target_revision)."
        },
    )

    draft_depth: int | None = field(
        default=None,
        metadata={
            "help": "With --to: levels that the engine drafts (default: the drafter's own, "
            "or the best chain for a cost-aware drafter)."
        },
    )
    draft_top_k: int | None = field(
        default=None, metadata={"help": "With --to sglang: branches per node (default: the drafter's own)."}
    )
    draft_total_tokens: int | None = field(
        default=None,
        metadata={"help": "With --to sglang: nodes to verify, including the root (default: the drafter's own)."},
    )

    def run(self, positional) -> int:
        from ..conversion.checkpoint_files import check_new_folder
        from ..conversion.engine_export import export_drafter, meta_target
        from ..conversion.gguf_export import export_gguf
        from ..demo import TARGET_REVISION, converted_folder

        if self.from_format is not None and self.to is None:
            self._refuse("draft_depth", "draft_top_k", "draft_total_tokens", of="--to")
            check_new_folder(positional.output)
            if self.target is None:
                raise ValueError(
                    f"--from {self.from_format} needs the drafter's target: name it with --target (--target demo for the shipped "
                    "demo target)."
                )
            target = load_target_ends(self.target, self.dtype or DTYPE, **self.loading_arguments)
            layers = self.target_feature_layers
            places = (positional.input, positional.output)
            import_checkpoint(self.from_format, *places, target, layers, self.revision)
            return 0
        if self.to is None or self.from_format is not None:
            given = (
                "neither is given" if self.to is None else f"--from {self.from_format} and --to {self.to} are given"
            )
            raise ValueError(f"Give one of --from FORMAT and --to ENGINE; {given}.")
        self._refuse("revision", "target_feature_layers", of="--from")
        self._check_sizes()
        check_new_folder(positional.output)
        if self.to == "gguf" and self.target is None:
            raise ValueError(
                "--to gguf copies the target's tokenizer: name the target's GGUF file (--target model.gguf)."
            )
        drafter = load_drafter(positional.input)
        self._resize(drafter.config)
        target = None
        stated = self.target_revision is not None or self.trust_remote_code
        eagle3 = drafter.config.shape == "eagle3"
        if self.to == "eagle" and eagle3 and self.target is not None:
            target, _ = self.load_target(self.dtype or DTYPE, "cpu")
        elif (
            self.to != "gguf"
            and not eagle3
            and drafter.config.target_embedding_scale is None
            and self.target not in (None, DEMO)
        ):
            if self.trust_remote_code:
                target, _ = self.load_target(self.dtype or DTYPE, "cpu")
            # the engine may know a name that is unknown here; the drafter's own config is used then
            with contextlib.nullcontext() if stated else contextlib.suppress(OSError):
                target = target or meta_target(load_target_config(self.target, self.target_revision))
        elif stated:
            raise ValueError(
                f"--target_revision {self.target_revision} and --trust_remote_code {self.trust_remote_code} are for loading a "
                "target, and this export loads none: leave them out."
            )
        if target is None or target.device.type == "meta":
            self._refuse("dtype", of="loading a target, and this export loads none")
        if self.target is not None and self.to == "gguf":
            export = export_gguf(drafter, positional.output, self.target)
            print(*export.notes, export.command, sep="\n")
            return 0
        name = None if self.target == DEMO else self.target
        if name is None and drafter.config.target_revision == TARGET_REVISION:
            # the Hub's model of this name has different weights
            name = str(converted_folder())
            if not converted_folder().is_dir():
                print(f"The target is not in {name} yet: `coral-hf demo` fetches it.")
        export = export_drafter(drafter, self.to, positional.output, target=target, target_name=name)
        print(*export.notes, export.command, sep="\n")
        return 0

    def _refuse(self, *names: str, of: str) -> None:
        """Rejects options that would be ignored."""
        for name in names:
            if (value := getattr(self, name)) is not None:
                written = " ".join(map(str, value)) if isinstance(value, list) else value
                raise ValueError(f"--{name} {written} is for {of}: leave it out.")

    @property
    def _sizes(self) -> dict[str, int]:
        """The draft sizes that are set."""
        sizes = {name: getattr(self, name) for name in ("draft_depth", "draft_top_k", "draft_total_tokens")}
        return {name: value for name, value in sizes.items() if value is not None}

    def _check_sizes(self) -> None:
        """Rejects sizes that an engine would not draft."""
        from ..conversion.serving import CHAIN_ENGINES

        sizes = self._sizes
        if self.to == "eagle" and sizes:
            name, value = next(iter(sizes.items()))
            raise ValueError(
                f"--{name} {value}: EAGLE's code chooses its own tree. Leave the option out with --to eagle."
            )
        if engine := CHAIN_ENGINES.get(str(self.to)):
            for name in ("draft_top_k", "draft_total_tokens"):
                if name in sizes:
                    raise ValueError(
                        f"--{name} {sizes[name]}: {engine} drafts a chain of --draft_depth tokens; leave it out with "
                        f"--to {self.to}."
                    )

    def _resize(self, config: Any) -> None:
        """Replaces a drafter's sizes by the given ones, or cost-aware sizes by the best chain."""
        from ..conversion.serving import CHAIN_ENGINES
        from ..generation.settings import DraftSettings
        from ..generation.tree_size import chain_depth

        sizes = self._sizes
        if not sizes and config.draft_cost_aware and self.to in CHAIN_ENGINES:
            sizes = {"draft_depth": chain_depth(config)}
            print(
                f"According to the drafter's calibration, a chain of {sizes['draft_depth']} is fastest (its cost-aware drafts have up "
                f"to {config.draft_depth} levels). Choose another depth with --draft_depth; `coral-hf tune` ranks fixed sizes."
            )
        if not sizes:
            return
        if self.to != "sglang":  # always a chain
            sizes["draft_top_k"] = 1
        settings = DraftSettings.resolve(config, None, sizes)
        total = sizes.get("draft_total_tokens")
        if settings.is_chain and total not in (None, settings.max_total_tokens):
            raise ValueError(
                f"--draft_total_tokens {total}: {self.to} verifies whole chains of draft_depth={settings.draft_depth} tokens and "
                "the root. Choose --draft_depth instead."
            )
        for name in ("draft_depth", "draft_top_k", "draft_total_tokens", "draft_cost_aware"):
            setattr(config, name, getattr(settings, name))


def import_checkpoint(
    source: str,
    path: str,
    output: str | os.PathLike,
    target: Any,
    target_feature_layers: list[int] | None = None,
    revision: str | None = None,
) -> None:
    """Writes an EAGLE-family checkpoint as a CORAL folder.

    Args:
        source (`str`): one of `FORMATS`.
        path (`str`): folder or Hub id of the checkpoint.
        output (`str` or `os.PathLike`): new or empty folder.
        target (`PreTrainedModel`): the model that the checkpoint drafts for.
        target_feature_layers (`list[int]`, *optional*): see [`CoralDraftConfig`]; by default as in the checkpoint.
        revision (`str`, *optional*): branch, tag or commit of the checkpoint's Hub repository.

    Raises:
        ValueError: as in `CoralDraftModel.from_eagle`, or if the folder is not empty. Nothing is written.
    """
    from ..conversion.checkpoint_files import check_new_folder, staged_folder
    from ..conversion.eagle_import import load_eagle
    from ..drafter.modeling_coral import CoralDraftModel

    if source not in FORMATS:
        raise ValueError(f"--from {source!r} is unknown; choose one of {list(FORMATS)}.")
    check_new_folder(output)
    overrides: dict[str, Any] = (
        {} if target_feature_layers is None else {"target_feature_layers": target_feature_layers}
    )
    drafter = load_eagle(CoralDraftModel, path, target, revision, **overrides)
    with staged_folder(output) as scratch:
        drafter.save_pretrained(scratch)
    config = drafter.config
    head = "the target's head" if config.draft_vocab_size is None else f"its own head of {config.draft_vocab_size} ids"
    print(f"{output}: shape {config.shape}, target features {config.target_feature_layers}, {head}.")
