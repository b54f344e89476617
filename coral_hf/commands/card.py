"""`coral-hf card`: a model card from records."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ..utils.replacing import check_replaceable
from .outputs import OutputOptions


@dataclass
class CardCommand(OutputOptions):
    """Write a drafter's model card from its config, weights and the records in its folder.

    Examples:
        coral-hf card outputs/drafter
        coral-hf card outputs/drafter --repo-id org/name
        coral-hf card outputs/drafter --unmeasured true --curve true
    """

    POSITIONAL: ClassVar[dict[str, str]] = {"folder": "Folder of the drafter; its records are in FOLDER/training."}

    repo_id: str | None = field(default=None, metadata={"help": "Hub id that the card's example loads."})
    unmeasured: bool = field(
        default=False,
        metadata={"help": "Accept a drafter without a benchmark record and mark its figures as not measured."},
    )
    curve: bool = field(default=False, metadata={"help": "Draw training/curve.png from training/log.jsonl first."})

    def run(self, positional) -> int:
        from ..hub.curve_table import draw_curve
        from ..hub.model_card import CARD_FILE, foreign_card, write_card

        remedies = "move it (your own sentences belong in training/card.json), or replace it with --overwrite true"
        check_replaceable(
            Path(positional.folder) / CARD_FILE, foreign_card(positional.folder), self.overwrite, remedies
        )
        if self.curve:
            draw_curve(positional.folder)
        print(write_card(positional.folder, repo_id=self.repo_id, unmeasured=self.unmeasured))
        return 0
