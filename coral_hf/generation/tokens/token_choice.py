"""Chooses tokens and ends rows as plain `generate` does, and collects the scores and logits that it returns."""

import copy
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process, stopping_criteria

from ..acceptance import accept_greedy, accept_walk
from ..draft_tree import DraftTree
from .text_rows import TextRows


# Transformers' processors that treat rows independently and keep no state between calls, so that rows may advance at their
# own pace. Those in the first list do not read the text, so that one call serves rows of any lengths.
_TEXT_FREE = {
    getattr(logits_process, name, None)
    for name in (
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "SuppressTokensLogitsProcessor",
    )
}
_PROCESSORS_OF_ROWS = _TEXT_FREE | {
    getattr(logits_process, name, None)
    for name in (
        "ForcedEOSTokenLogitsProcessor",
        "ForcedBOSTokenLogitsProcessor",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "ExponentialDecayLengthPenalty",
        "SuppressTokensAtBeginLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "WatermarkLogitsProcessor",
    )
}
# Criteria that the host evaluates from lengths and tokens, and criteria that treat rows independently.
_ON_HOST = {stopping_criteria.MaxLengthCriteria, stopping_criteria.EosTokenCriteria}
_CRITERIA_OF_ROWS = _ON_HOST | {stopping_criteria.StopStringCriteria, stopping_criteria.MaxTimeCriteria}


class TokenChoice:
    """Chooses a tree's tokens for all rows of a batch, and decides which rows end with them.

    Rows advance at their own pace if all processors and criteria treat rows independently. Other processors and criteria (for
    example the caller's own, which may count calls or identify rows by index) and streamers must see the batch as in plain
    decoding: column by column, with rows of equal length (`in_step`). Every row then accepts as many tokens as the row that
    accepts the fewest.

    Args:
        processors (`LogitsProcessorList`), criteria (`StoppingCriteriaList`), config ([`GenerationConfig`]), streamer: as
            prepared by `generate`.
        rows ([`TextRows`]): receives the generated tokens.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        rows: TextRows,
        streamer: Any = None,
    ):
        self.processors, self.criteria, self.rows, self.streamer = processors, criteria, rows, streamer
        self.do_sample = config.do_sample
        wanted = config.return_dict_in_generate
        # for every generated token, [B, V]; zeros after the end of a row
        self.scores: list[torch.Tensor] | None = [] if wanted and config.output_scores else None
        self.logits: list[torch.Tensor] | None = [] if wanted and config.output_logits else None
        self.ended = [False] * rows.batch  # by row of the batch; a row may have to continue nevertheless
        self._text_free = all(type(processor) in _TEXT_FREE for processor in processors)
        self._on_host = all(type(criterion) in _ON_HOST for criterion in criteria)
        self._eos_ids: set[int] = set()
        if self._on_host:
            for criterion in criteria:
                if isinstance(criterion, stopping_criteria.EosTokenCriteria):
                    self._eos_ids |= set(criterion.eos_token_id.flatten().tolist())
        pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        by_rows = all(type(processor) in _PROCESSORS_OF_ROWS for processor in processors)
        by_rows &= all(type(criterion) in _CRITERIA_OF_ROWS for criterion in criteria)
        only_length = all(type(criterion) is stopping_criteria.MaxLengthCriteria for criterion in criteria)
        self.in_step = rows.batch > 1 and not (by_rows and (pads or only_length) and streamer is None)
        # Without an EOS token, plain decoding pads nothing, and rows continue until all have ended.
        self._together = self.in_step and not pads
        self._is_argmax = not self.do_sample and not processors and self.scores is None and self.logits is None

    def accept(self, tree: DraftTree, logits: torch.Tensor) -> tuple[list[list[int]], list[bool]]:
        """Chooses the tokens of every live row and writes them.

        Args:
            tree ([`DraftTree`]): trees of the live rows.
            logits (`torch.Tensor` of shape `[n, N, V]`): the target's logits after each node.

        Returns:
            `tuple`: for each live row, the accepted nodes, root first, each of which yields one new token, and whether the
            row leaves.
        """
        columns = self.rows.ids().shape[1]
        if self._is_argmax and not self.in_step:
            # as in `generate`, so that ties are resolved alike; on a CPU five times as fast as the argmax of bfloat16 values
            choices = logits.float().argmax(dim=-1).to(tree.tokens.device)
            paths, ended = self._accept_argmax(tree, choices)
        else:
            paths, _ = accept_walk(
                tree, lambda live, nodes: self._choose(live, nodes, logits), self._stop, self.in_step
            )
            ended = [self.ended[row] for row in self.rows.live]
        if self.streamer is not None:
            for column in self.rows.ids()[:, columns:].cpu().unbind(dim=1):
                self.streamer.put(column)
        if self._together and not all(self.ended):
            ended = [False] * len(ended)
        return paths, ended

    def _accept_argmax(self, tree: DraftTree, choices: torch.Tensor) -> tuple[list[list[int]], list[bool]]:
        """Whether only the argmax is needed, so that a whole tree is decided at once."""
        paths, tokens = accept_greedy(tree, choices)
        if self._on_host:
            ends = [self._first_end(row, new) for row, new in zip(self.rows.live, tokens, strict=True)]
            counts = [len(new) if end is None else end for new, end in zip(tokens, ends, strict=True)]
            self.rows.extend([new[:count] for new, count in zip(tokens, counts, strict=True)])
            ended = [end is not None for end in ends]
            for row, end in zip(self.rows.live, ended, strict=True):
                self.ended[row] = end
        else:  # other criteria may count calls or display the text, so they must not see tokens after the end
            counts = [0] * len(paths)
            going = list(range(len(paths)))
            while going:
                new = [tokens[index][counts[index]] for index in going]
                self.rows.append([self.rows.live[index] for index in going], self.rows.ids().new_tensor(new), new)
                stopped = self._stop(going, new)
                for index in going:
                    counts[index] += 1
                going = [
                    index
                    for index, stop in zip(going, stopped, strict=True)
                    if not stop and counts[index] < len(paths[index])
                ]
            ended = [self.ended[row] for row in self.rows.live]
        return [path[:count] for path, count in zip(paths, counts, strict=True)], ended

    def _first_end(self, row: int, tokens: list[int]) -> int | None:
        """The smallest number of new tokens with which a row of the batch ends; None if it does not end."""
        length = self.rows.lengths[row]
        return next((n for n, token in enumerate(tokens, 1) if self._ends(length + n, token)), None)

    def _ends(self, length: int, token: int) -> bool:
        ended = token in self._eos_ids
        for criterion in self.criteria:
            if isinstance(criterion, stopping_criteria.MaxLengthCriteria):
                ended |= length >= criterion.max_length
                if length > (criterion.max_position_embeddings or length):
                    criterion(self.rows.ids()[:1, :1].expand(1, length), None)  # it warns, once
        return ended

    # One token a row ------------------------------------------------------------------------------------------

    def _choose(self, indices: list[int], nodes: list[int], logits: torch.Tensor) -> list[int]:
        """Chooses the next token of some live rows from the logits after a node of each, and appends it to their texts."""
        rows = [self.rows.live[index] for index in indices]
        if len(indices) == logits.shape[0] and len(set(nodes)) == 1:
            raw = logits[:, nodes[0]]
        else:
            raw = logits[indices, nodes]
        raw = raw.to(copy=True, dtype=torch.float32, device=self.rows.ids().device)  # [m, V]
        scores = self._processed(rows, raw)
        self._record(self.logits, rows, raw)
        self._record(self.scores, rows, scores)
        if not self.do_sample:
            tokens = scores.argmax(dim=-1)
        elif self.in_step:
            # as in plain decoding: draw for every row of the batch at once, including those that have ended
            whole = scores.new_zeros(self.rows.batch, scores.shape[1])
            whole[rows] = scores
            tokens = torch.multinomial(whole.softmax(dim=-1), num_samples=1).squeeze(1)[rows]
        else:
            tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        known = tokens.tolist()
        self.rows.append(rows, tokens, known)
        return known

    def _processed(self, rows: list[int], raw: torch.Tensor) -> torch.Tensor:
        """Logits `[m, V]` of some rows of the batch after the processors."""
        if not self.processors:
            return raw
        lengths = [self.rows.lengths[row] for row in rows]
        if self.in_step:
            whole = raw.new_zeros(self.rows.batch, raw.shape[1])
            whole[rows] = raw
            return self.processors(self.rows.ids(lengths[0]), whole)[rows]
        if self._text_free:
            return self.processors(self.rows.ids(lengths[0])[rows], raw)
        scores: list[Any] = [None] * len(rows)
        for length in set(lengths):
            alike = [index for index, other in enumerate(lengths) if other == length]
            group = [rows[index] for index in alike]
            part = raw if len(alike) == len(rows) else raw[alike]
            processed = self._processors_of(group)(self.rows.ids(length)[group], part)
            for index, row_scores in zip(alike, processed.unbind(0), strict=True):
                scores[index] = row_scores
        return torch.stack(scores)

    def _processors_of(self, rows: list[int]) -> LogitsProcessorList:
        """The processors for some rows of the batch. A repetition penalty finds the padding of each row by its index."""
        processors = LogitsProcessorList()
        for processor in self.processors:
            ignored = getattr(processor, "prompt_ignore_length", None)
            if isinstance(ignored, torch.Tensor):
                processor = copy.copy(processor)
                processor.prompt_ignore_length = ignored[rows]
            processors.append(processor)
        return processors

    def _record(self, kept: list[torch.Tensor] | None, rows: list[int], values: torch.Tensor) -> None:
        if kept is None:
            return
        if self.rows.batch == 1:
            kept.append(values)
            return
        places = [self.rows.lengths[row] - self.rows.prompt_length for row in rows]
        while len(kept) <= max(places):
            kept.append(values.new_zeros(self.rows.batch, values.shape[1]))
        for row, place, value in zip(rows, places, values.unbind(0), strict=True):
            kept[place][row] = value

    def _stop(self, indices: list[int], tokens: list[int]) -> list[bool]:
        """Whether some live rows end with the last tokens that were written."""
        rows = [self.rows.live[index] for index in indices]
        lengths = [self.rows.lengths[row] for row in rows]
        if self._on_host:
            for row, length, token in zip(rows, lengths, tokens, strict=True):
                self.ended[row] |= self._ends(length, token)
        elif self.in_step or self.rows.batch == 1:
            done = self.criteria(self.rows.ids(lengths[0]), None if self.scores is None else tuple(self.scores))
            for row, end in enumerate(torch.as_tensor(done).expand(self.rows.batch).tolist()):
                self.ended[row] |= end
        else:
            for length in set(lengths):
                alike = [row for row, other in zip(rows, lengths, strict=True) if other == length]
                done = self.criteria(self.rows.ids(length)[alike], None)
                for row, end in zip(alike, done.tolist(), strict=True):
                    self.ended[row] |= end
        if self._together and not all(self.ended):
            return [False] * len(rows)
        return [self.ended[row] for row in rows]


__all__ = ["TokenChoice"]
