"""How the verbs that generate render conversations."""

from dataclasses import dataclass, field

import torch

from ..data.chat import check_template_kwargs, with_template_kwargs
from .loading import PlacedTargetOptions


@dataclass(kw_only=True)
class RenderingOptions(PlacedTargetOptions):
    """A target that generates, and the variables of its chat template."""

    chat_template_kwargs: str | None = field(
        default=None,
        metadata={
            "help": "Variables of the target's chat template as JSON, such as '{\"enable_thinking\": false}'; a row's own column "
            "of that name goes before them."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template_kwargs(self.chat_template_kwargs, "--chat_template_kwargs")

    def load_target(self, dtype: str | torch.dtype, device: str | None = None):
        target, tokenizer = super().load_target(dtype, device)
        return target, with_template_kwargs(tokenizer, self.chat_template_kwargs)


__all__ = ["RenderingOptions"]
