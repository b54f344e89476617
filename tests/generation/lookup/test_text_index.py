"""Suffix matches against a slow search over the whole text, and their chances."""

import random

import pytest
import torch

from coral_hf.generation.lookup import text_index
from coral_hf.generation.lookup.lookup_nodes import PRIOR, PRIOR_WEIGHT, LookupNodes, LookupRecord
from coral_hf.generation.lookup.text_index import LONGEST, PLACES, SHORTEST, Match, TextIndex


def slow_match(ids: list[int], count: int) -> Match | None:
    """Compares the end of a text with every place in it, the latest first."""
    best, best_length, looked = None, 0, 0
    for place in range(len(ids) - 1, SHORTEST - 1, -1):
        length = 0
        while length < LONGEST and place - 1 - length >= 0 and ids[place - 1 - length] == ids[-1 - length]:
            length += 1
        if length < SHORTEST or looked == PLACES:
            continue
        looked += 1
        if length > best_length:
            best, best_length = place, length
        if length == LONGEST:
            break
    if best is None:
        return None
    text = list(ids)
    for step in range(count):  # what it would say if it repeated itself
        text.append(text[best + step])
    return Match(text[len(ids) :], best_length)


@pytest.mark.parametrize("vocabulary", [2, 5, 30])
def test_matches_equal_a_search_of_the_whole_text(vocabulary):
    rng = random.Random(vocabulary)
    index, ids = TextIndex(), []
    for step in range(600):
        # now and then a piece of the text itself, so that long matches occur
        start = rng.randrange(len(ids)) if ids and step % 7 == 0 else None
        new = ids[start : start + rng.randrange(1, 30)] if start is not None else [rng.randrange(vocabulary)]
        index.extend(new)
        ids += new
        assert index.ids == ids
        assert index.match(6) == slow_match(ids, 6)


def test_by_hand():
    index = TextIndex([1, 2, 3, 9, 7, 2, 3])
    assert index.match(3) == Match([9, 7, 2], 2)
    assert TextIndex([1, 2, 3, 9, 4, 1, 2, 3, 8, 2, 3]).match(2) == Match([8, 2], 2), "the latest"
    assert TextIndex([1, 2, 3, 9, 4, 2, 3, 8, 1, 2, 3]).match(2) == Match([9, 4], 3), "the longest"
    assert TextIndex([5, 6, 5, 6]).match(5) == Match([5, 6, 5, 6, 5], 2), "a loop continues as a loop"
    for nothing in ([], [1], [1, 2], [1, 2, 3]):
        assert TextIndex(nothing).match(4) is None
    assert index.match(0) is None


def test_the_work_of_a_match_is_bounded(monkeypatch):
    """However long the text is and however often its last tokens occurred: comparisons of ids, counted."""

    class Counted(int):
        compared = 0

        def __eq__(self, other):
            Counted.compared += 1
            return int(self) == int(other)

        __hash__ = int.__hash__

    def comparisons(length: int) -> int:
        index = TextIndex(Counted(token) for token in [1, 2, 3] * (length // 3) + [4, 2, 3])
        Counted.compared = 0
        assert index.match(8) is not None
        return Counted.compared

    assert comparisons(300) == comparisons(30_000) <= PLACES * LONGEST + 2 * SHORTEST
    monkeypatch.setattr(text_index, "PLACES", 1)
    assert comparisons(300) < LONGEST


def test_chances_follow_the_length_of_the_match_and_past_success():
    record = LookupRecord()
    match = Match([5, 6, 7], 3)
    assert record.chances(match) == pytest.approx([PRIOR[1], PRIOR[1] * PRIOR[2], PRIOR[1] * PRIOR[2] * PRIOR[3]])
    record.settle(match, [5, 9])  # right after a match of 3, wrong after one of 4; nothing is known of the third
    assert record.rate(3) == pytest.approx((PRIOR_WEIGHT * PRIOR[1] + 1) / (PRIOR_WEIGHT + 1))
    assert record.rate(4) == pytest.approx(PRIOR_WEIGHT * PRIOR[2] / (PRIOR_WEIGHT + 1))
    assert record.rate(5) == pytest.approx(PRIOR[3])
    record.settle(Match([1], 40), [2])
    assert record.rate(LONGEST) == record.rate(99) < PRIOR[-1]


def test_rows_of_a_batch_have_their_own_continuations():
    nodes = LookupNodes([[1, 2, 3, 1, 2], [4, 5, 6], [7, 8, 7, 8]], most=3)
    found = nodes.find(9)
    assert found.tokens == [[3, 1, 2], [0, 0, 0], [7, 8, 7]]
    assert found.chances[1] == [0.0, 0.0, 0.0]
    assert sum(found.chances[0]) == pytest.approx(PRIOR[0] * (1 + PRIOR[1] * (1 + PRIOR[2])))
    assert found.mean_chances()[0] == pytest.approx(2 / 3 * PRIOR[0]) and not found.alone
    tokens, chances = found.tensors(torch.device("cpu"))
    assert tokens.tolist() == found.tokens and chances.tolist()[2] == pytest.approx(found.chances[2])
    nodes.extend([[3, 1], [9], [1]])
    nodes.keep_rows([2, 0])
    found = nodes.find(2)  # the first has no continuation any more, the second continues in its loop
    assert found.tokens == [[0, 0], [2, 3]] and found.chances[0] == [0.0, 0.0]
    nodes.keep_rows([0])
    assert nodes.find(4) is None


def test_a_text_that_does_not_repeat_itself_is_left_alone():
    """After some wrong continuations their chance is no longer worth a node."""
    nodes = LookupNodes([[1, 2, 3]], most=4)
    token, silent = 100, 0
    for _ in range(200):
        token += 1
        nodes.extend([[1, 2]])
        silent += nodes.find(4) is None
        nodes.extend([[token]])
    assert silent > 100
