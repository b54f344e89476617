"""Counts verification steps and accepted tokens as servers do, whose acceptance length differs from CORAL's.

CORAL counts the tokens of the answers. vLLM also counts tokens that an answer's last step accepted beyond `max_tokens` or the
end of the answer, because its last draft is not shortened.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from ..generation.settings import DraftSettings


class StepOfEachToken:
    """A streamer that records, for each new token, the number of completed verification steps."""

    def __init__(self, drafter: Any):
        self.drafter, self.steps, self.saw_prompt = drafter, list[int](), False

    def put(self, value: torch.Tensor) -> None:
        if self.saw_prompt:
            self.steps += [self.drafter.last_stats.steps] * value.numel()
        self.saw_prompt = True

    def end(self) -> None:
        pass


def count_as_server(
    target: Any, ids: torch.Tensor, drafter: Any, max_new_tokens: int, **settings: Any
) -> tuple[int, int]:
    """Verification steps of one greedy answer and the tokens that they accept. The last step is counted completely.

    The answer is generated again, beyond its end, so that no draft is shortened.

    Args:
        target (`PreTrainedModel`), ids (`torch.LongTensor` of shape `[1, L]`), drafter ([`CoralDraftModel`])
        max_new_tokens (`int`): the length at which a server would end the answer, unless an EOS token ends it earlier.
        **settings: [`DraftSettings`] to override.

    Returns:
        `tuple[int, int]`: verification steps, and accepted tokens without bonus tokens.
    """
    overrides = {name: value for name, value in settings.items() if name.startswith("draft_")}
    depth = DraftSettings.resolve(drafter.config, None, overrides).draft_depth
    streamer, ends = StepOfEachToken(drafter), target.generation_config.eos_token_id
    config = GenerationConfig(max_new_tokens=max_new_tokens + 2 * (depth + 1), do_sample=False)
    config.pad_token_id = target.generation_config.pad_token_id
    for name, value in settings.items():
        setattr(config, name, value)
    ids = ids.to(target.device)
    with _endless(target):
        output = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            assistant_model=drafter,
            streamer=streamer,
        )
    answer = output[0, ids.shape[1] :][:max_new_tokens].tolist()
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
    length = next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))
    if length < 2:
        return 0, 0  # the prefill gives the first token
    steps = streamer.steps[length - 1] + 1  # a step is counted after its tokens are streamed
    return steps, streamer.steps.index(steps) - 1 - steps


@contextmanager
def _endless(target: Any) -> Iterator[None]:
    """Context in which the target has no EOS, because a call's config cannot unset the target's own."""
    own = target.generation_config
    target.generation_config = copy.deepcopy(own)
    target.generation_config.eos_token_id = None
    try:
        yield
    finally:
        target.generation_config = own


__all__ = ["StepOfEachToken", "count_as_server"]
