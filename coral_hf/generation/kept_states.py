"""The target's hidden states of a call, as `generate` returns them."""

import torch

from .text_rows import TextRows


class KeptStates:
    """Hidden states of every layer: of the prompts, then of one generated token after the other; zeros behind a row's end."""

    def __init__(self, rows: TextRows):
        self.batch, self.prompt_length = rows.batch, rows.prompt_length
        self.steps: list[tuple[torch.Tensor, ...]] = []

    def add_prompt(self, hidden_states: tuple[torch.Tensor, ...]) -> None:
        """Of every layer `[B, L, H]`."""
        self.steps.append(hidden_states)

    def add(
        self,
        rows: list[int],
        lengths: list[int],
        hidden_states: tuple[torch.Tensor, ...],
        paths: list[list[int]],
    ) -> None:
        """Of a verified tree what was accepted.

        Args:
            rows (`list[int]`): the live rows, by their place in the batch.
            lengths (`list[int]`): tokens of each of them, the root included.
            hidden_states (`tuple` of `torch.Tensor` of shape `[n, N, H]`): of every layer.
            paths (`list[list[int]]`): the accepted nodes of each row.
        """
        for index, (row, length, path) in enumerate(zip(rows, lengths, paths, strict=True)):
            for place, node in enumerate(path, length - self.prompt_length):
                picked = tuple(layer[index, node] for layer in hidden_states)
                if self.batch == 1:
                    self.steps.append(tuple(state[None, None] for state in picked))
                    continue
                while len(self.steps) <= place:
                    self.steps.append(tuple(state.new_zeros(self.batch, 1, len(state)) for state in picked))
                for kept, state in zip(self.steps[place], picked, strict=True):
                    kept[row, 0] = state

    def returned(self) -> tuple[tuple[torch.Tensor, ...], ...]:
        return tuple(self.steps)


__all__ = ["KeptStates"]
