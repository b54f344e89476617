"""The growing texts of a batch in one buffer of ids, whose rows end and leave, and the hidden states kept for them."""

import torch


_GROWTH = 128


class TextRows:
    """Prompts and the tokens generated after them. A row that has ended is padded.

    Rows keep their index in the batch. `live` contains those that still grow, in the order of the key-value store's rows.

    Args:
        input_ids (`torch.LongTensor` of shape `[B, L]`): the prompts, padded on the left.
        padding (`list[int]`): left padding of each prompt.
        pad_token_id (`int`): the token after the end of a row.
    """

    def __init__(self, input_ids: torch.Tensor, padding: list[int], pad_token_id: int):
        self.batch, self.prompt_length = input_ids.shape
        self._ids, self._pad = input_ids, pad_token_id
        self.padding = list(padding)
        self.lengths = [self.prompt_length] * self.batch  # including padding
        self.live = list(range(self.batch))
        # for each row, tokens that `take_new` has not returned yet, on the host
        self._new: list[list[int]] = [[] for _ in self.live]

    @property
    def live_lengths(self) -> list[int]:
        return [self.lengths[row] for row in self.live]

    def ids(self, length: int | None = None) -> torch.Tensor:
        """All rows `[B, length]`, by default as long as the longest row."""
        return self._ids[:, : max(self.lengths) if length is None else length]

    def live_ids(self) -> torch.Tensor:
        """The live rows `[n, L]`, as long as the longest live row."""
        ids = self.ids(max(self.live_lengths))
        return ids if self.live == list(range(self.batch)) else ids[self.live]

    def text(self, row: int) -> torch.Tensor:
        """One row of the batch, `[1, L]`."""
        return self._ids[row : row + 1, : self.lengths[row]]

    def append(self, rows: list[int], tokens: torch.Tensor, known: list[int]) -> None:
        """Appends one token `[m]` to each of these rows of the batch. `known` are the same tokens on the host."""
        lengths = [self.lengths[row] for row in rows]
        self._reserve(max(lengths) + 1)
        if len(rows) == self.batch == 1:
            self._ids[:, lengths[0]] = tokens
        else:
            self._ids[rows, lengths] = tokens
        for row, token in zip(rows, known, strict=True):
            self.lengths[row] += 1
            self._new[row].append(token)

    def extend(self, tokens: list[list[int]]) -> None:
        """Appends several tokens to each live row."""
        starts = self.live_lengths
        for row, new in zip(self.live, tokens, strict=True):
            self.lengths[row] += len(new)
            self._new[row] += new
        self._reserve(max(self.lengths))
        if len(self.live) == 1:
            self._ids[self.live[0], starts[0] : starts[0] + len(tokens[0])] = self._ids.new_tensor(tokens[0])
            return
        places = [
            (row, start + index, token)
            for row, start, new in zip(self.live, starts, tokens, strict=True)
            for index, token in enumerate(new)
        ]
        rows, columns, values = torch.tensor(places, device=self._ids.device).T
        self._ids[rows, columns] = values

    def take_new(self) -> list[list[int]]:
        """The tokens of each live row since the last call, without waiting for the device."""
        new = [self._new[row] for row in self.live]
        self._new = [[] for _ in range(self.batch)]
        return new

    def leave(self, ended: list[bool]) -> list[int]:
        """Removes the live rows that have ended. Returns the indices of the others, in their new order.

        The last live row takes the place of a removed one, so that few rows move.
        """
        order = list(range(len(self.live)))
        for index in reversed([index for index, end in enumerate(ended) if end]):
            last = order.pop()
            if index < len(order):
                order[index] = last
        self.live = [self.live[index] for index in order]
        return order

    def _reserve(self, length: int) -> None:
        if length <= self._ids.shape[1]:
            return
        grown = self._ids.new_full((self.batch, length + _GROWTH), self._pad)
        grown[:, : self._ids.shape[1]] = self._ids
        self._ids = grown


class KeptStates:
    """Hidden states of every layer, for the prompts and then for each generated token. Zeros after a row's end."""

    def __init__(self, rows: TextRows):
        self.batch, self.prompt_length = rows.batch, rows.prompt_length
        self.steps: list[tuple[torch.Tensor, ...]] = []

    def add_prompt(self, hidden_states: tuple[torch.Tensor, ...]) -> None:
        """Adds the prompts' states `[B, L, H]` of every layer."""
        self.steps.append(hidden_states)

    def add(
        self,
        rows: list[int],
        lengths: list[int],
        hidden_states: tuple[torch.Tensor, ...],
        paths: list[list[int]],
    ) -> None:
        """Adds the states of a verified tree's accepted nodes.

        Args:
            rows (`list[int]`): indices of the live rows in the batch.
            lengths (`list[int]`): tokens of each live row, including the root.
            hidden_states (`tuple` of `torch.Tensor` of shape `[n, N, H]`): states of every layer.
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


__all__ = ["KeptStates", "TextRows"]
