"""Options for reading data, and for rendering it with chat templates."""

from dataclasses import dataclass, field

import torch

from ..data.chat import check_template_kwargs, with_template_kwargs
from .loading import PlacedTargetOptions


FORMATS_HELP = (
    "JSON lines, a JSON array, CSV, Parquet, text with one prompt per line, or data sets on the Hub "
    "(org/name[@revision][:config]), in any format of docs/data_formats.md"
)


@dataclass(kw_only=True)
class RenderingOptions(PlacedTargetOptions):
    """Options for a target that generates, including the variables of its chat template."""

    chat_template_kwargs: str | None = field(
        default=None,
        metadata={
            "help": "Variables of the target's chat template as JSON, such as '{\"enable_thinking\": false}'; a column "
            "of that name in a row takes precedence."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template_kwargs(self.chat_template_kwargs, "--chat_template_kwargs")

    def load_target(self, dtype: str | torch.dtype, device: str | None = None):
        target, tokenizer = super().load_target(dtype, device)
        return target, with_template_kwargs(tokenizer, self.chat_template_kwargs)


@dataclass(kw_only=True)
class DataOptions:
    """Options for the split and the columns to read."""

    split: str = field(default="train", metadata={"help": "Split of data sets with several splits."})
    columns: list[str] = field(
        default_factory=list,
        metadata={"help": "Names of other columns, as NAME=COLUMN: prompt=query reads the prompts from query."},
    )

    @property
    def reading(self) -> dict:
        """Arguments of a reader other than the data; `ValueError` for malformed `--columns`."""
        from ..data.row_reader import parse_columns

        return {"split": self.split, "columns": parse_columns(self.columns)}


__all__ = ["FORMATS_HELP", "DataOptions", "RenderingOptions"]
