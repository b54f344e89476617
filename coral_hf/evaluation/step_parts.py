"""The parts of a decoding step, for timers and operation counters."""

from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from ..drafter.draft_head import DraftHead
from ..generation.candidate_generator import CoralCandidateGenerator
from ..generation.draft_levels import LevelDrafter
from ..generation.draft_tree import DraftTreeBuilder
from ..generation.target_forward import TargetForward
from ..generation.tokens.token_choice import TokenChoice
from ..generation.tree_size import TreeSizeRule


@contextmanager
def wrapped_parts(
    target: Any, drafter: Any, wrap: Callable[[Callable, str], Callable], names: Container[str] | None = None
) -> Iterator[None]:
    """Context in which the functions of a step are replaced.

    Parts are nested: `target_forward` is in `verify`; `drafter_layer`, `draft_head` and `tree` are in `draft`.

    Args:
        target (`PreTrainedModel`), drafter ([`CoralDraftModel`], *optional*)
        wrap (`Callable`): a function and the name of its part -> the replacement.
        names (`Container[str]`, *optional*): the parts to replace; None: all.
    """
    parts: list[tuple[Any, str, str]] = [(target, "forward", "target_forward")]
    if drafter is not None:
        parts += [
            (drafter, "draft", "drafter_layer"),
            (DraftHead, "top_k", "draft_head"),
            (DraftHead, "argmax", "draft_head"),
            (DraftTreeBuilder, "add_level", "tree"),
            (DraftTreeBuilder, "build", "tree"),
            (LevelDrafter, "_weigh", "tree"),
            (TreeSizeRule, "best_size", "tree"),
            (CoralCandidateGenerator, "propose", "draft"),
            (TargetForward, "verify", "verify"),
            (TokenChoice, "accept", "acceptance"),
            (TargetForward, "keep", "compaction"),
        ]
    with ExitStack() as stack:
        for owner, attribute, part in parts:
            if names is None or part in names:
                stack.enter_context(patch.object(owner, attribute, wrap(getattr(owner, attribute), part)))
        yield


__all__ = ["wrapped_parts"]
