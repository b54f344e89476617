"""Methods of a drafter that other packages implement: conversion, publishing, and the code in its folder.

`import coral_hf` registers them. A drafter loaded with its own code (`trust_remote_code=True`) lacks conversion and
publishing, and Transformers itself copies its code.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from transformers import PreTrainedModel


class PackageMethods:
    """Methods of a drafter that call registered functions. Must precede `PreTrainedModel` in the bases."""

    extensions: ClassVar[dict[str, Callable[..., Any]]] = {}

    @classmethod
    def from_eagle(
        cls, path_or_repo: str, target: PreTrainedModel, revision: str | None = None, **overrides: Any
    ) -> Any:
        """Loads an EAGLE-1/2, HASS or EAGLE-3 checkpoint for `target`, see `conversion.eagle_import.load_eagle`.

        Args:
            path_or_repo (`str`): a folder or a Hub id, with safetensors or a `pytorch_model.bin` of plain tensors.
            target (`PreTrainedModel`): the model that the checkpoint drafts for.
            revision (`str`, *optional*): branch, tag or commit of the Hub repository.
            **overrides: settings of [`CoralDraftConfig`], for example `draft_*` or `target_feature_layers`.

        Returns:
            [`CoralDraftModel`] in the checkpoint's dtype on the CPU.

        Raises:
            ValueError: if the checkpoint is not a drafter for this target. The message lists expected and found values.
            OSError: if there is no such folder or repository.
        """
        return cls._extension("from_eagle")(cls, path_or_repo, target, revision, **overrides)

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        """Saves config, weights, code and its `auto_map`, so that the folder loads anywhere.

        Args:
            save_directory (`str` or `os.PathLike`), is_main_process (`bool`): only that process writes.
            **kwargs: as for [`~transformers.PreTrainedModel.save_pretrained`].
        """
        saving: Any = super()
        saving.save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process and (write_code := self.extensions.get("write_code")) is not None:
            write_code(save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Publishes the drafter with its card, its code and the records for its figures.

        Args:
            repo_id (`str`): `"org/name"`, or `"name"` in your own namespace.
            **kwargs: `record`, `private`, `token`, `revision`, `commit_message`, `create_pr`; see `hub.publish`.

        Returns:
            `str`: URL of the commit.
        """
        return self._extension("push_to_hub")(self, repo_id, **kwargs)

    @classmethod
    def _extension(cls, name: str) -> Callable[..., Any]:
        if name not in cls.extensions:
            raise ImportError(
                f"{cls.__name__}.{name} is not part of the code in a published drafter: `pip install coral-hf`, "
                "`import coral_hf`, and load the drafter without trust_remote_code."
            )
        return cls.extensions[name]


__all__ = ["PackageMethods"]
