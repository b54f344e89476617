"""Batches with a drafter equal plain `generate`'s, row by row: ragged prompts, early ends, and outputs."""

import pytest
import torch
from helpers.batches import compare_batch, padded
from helpers.oracle import oracle
from helpers.parity import TREES, Recorder, config_of, prompt_of
from helpers.tiny_models import FAMILIES, make_drafter, make_target, make_tokenizer
from transformers import LogitsProcessor, StoppingCriteria, pipeline, set_seed

from coral_hf.generation.key_values.store import KeyValueStore
from coral_hf.utils.compat import cache_of


LENGTHS = [9, 1, 20, 17]
trees = pytest.mark.parametrize("tree", ["chain", "tree16"])


@pytest.mark.parametrize("family", list(FAMILIES))
def test_families(family):
    """Rows below and beyond the window of 16, and a prompt of one token."""
    target = make_target(family)
    drafter = make_drafter(target)
    for tree in ("chain", "tree16"):
        _, stats = compare_batch(target, drafter, LENGTHS, TREES[tree], max_new_tokens=20)
        assert stats.acceptance_length > 2 and all(row.n_accepted for row in stats.rows)


@trees
def test_eager_attention(tree):
    """Without padding, because it gives NaN for a padded row in float64, with or without a drafter."""
    target = make_target("gemma3_text", attention="eager")
    compare_batch(target, make_drafter(target), [9, 9, 9], TREES[tree], max_new_tokens=20)


@trees
@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token_id": list(range(3, 30))},
        {"eos_token_id": list(range(3, 30)), "pad_token_id": 77},
        {"repetition_penalty": 1.3, "eos_token_id": list(range(3, 12))},
        {"no_repeat_ngram_size": 2, "bad_words_ids": [[7], [9, 11]]},
        {"min_new_tokens": 9, "eos_token_id": list(range(3, 60))},
        {"max_new_tokens": 2},
        {"max_new_tokens": 1},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_rows_end_by_themselves(target, tree, settings):
    compare_batch(target, make_drafter(target), LENGTHS, TREES[tree], **{"max_new_tokens": 20, **settings})


@trees
def test_rows_that_have_ended_cost_nothing(target, tree, monkeypatch):
    """Finished rows leave the forwards: only nodes of the remaining rows are verified."""
    drafter, (ids, mask), sizes = make_drafter(target), padded(LENGTHS), []
    begin = KeyValueStore.begin
    monkeypatch.setattr(
        KeyValueStore, "begin", lambda store, count: sizes.append(store.num_rows) or begin(store, count)
    )
    whole = target.generate(ids, attention_mask=mask, generation_config=config_of({}))
    eos = [int(whole[0, 23]), int(whole[2, 28])]
    plain = target.generate(ids, attention_mask=mask, generation_config=config_of({}, eos_token_id=eos))
    with oracle(plain, 0.5):
        config = config_of(TREES[tree], eos_token_id=eos)
        drafted = target.generate(ids, attention_mask=mask, generation_config=config, assistant_model=drafter)
    assert torch.equal(plain, drafted)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 4 > sizes[-1]
    assert sum(sizes) == drafter.last_stats.steps == sum(row.steps for row in drafter.last_stats.rows)


@trees
@pytest.mark.parametrize("eos", [None, [5, 17, 90]])
def test_stop_strings(target, tree, eos):
    """Without an EOS plain decoding pads no row: all rows continue until the last has met a string."""
    settings = {"stop_strings": list("aKeZ157dgQ"), "tokenizer": make_tokenizer(), "eos_token_id": eos}
    plain, _ = compare_batch(target, make_drafter(target), LENGTHS, TREES[tree], **settings)
    assert plain.shape[1] < 60


class CountingProcessor(LogitsProcessor):
    """Favours another token at every call: only right if it is called once per column, in order."""

    calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores = scores.clone()
        scores[torch.arange(len(scores)), (37 * self.calls + input_ids[:, -1]) % 128] += 4.0
        return scores


class CountingCriterion(StoppingCriteria):
    """Ends rows by its own count, later ones later."""

    calls = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return torch.tensor([self.calls > 9 + row for row in range(len(input_ids))])


@trees
@pytest.mark.parametrize("eos", [None, list(range(3, 12))])
def test_processors_and_criteria_of_the_caller_see_every_column(target, tree, eos):
    drafter, (ids, mask) = make_drafter(target), padded(LENGTHS)
    outputs = []
    for size, extra in (({}, {}), (TREES[tree], {"assistant_model": drafter})):
        config = config_of(size, eos_token_id=eos)
        own = {"logits_processor": [CountingProcessor()], "stopping_criteria": [CountingCriterion()]}
        with oracle(outputs[0] if outputs else ids, 0.9):
            outputs.append(target.generate(ids, attention_mask=mask, generation_config=config, **own, **extra))
    assert torch.equal(*outputs) and drafter.last_stats.n_accepted > 0


@trees
def test_a_streamer_gets_the_columns(target, tree):
    drafter, (ids, mask), recorders = make_drafter(target), padded(LENGTHS), [Recorder(), Recorder()]
    settings = {"eos_token_id": list(range(3, 30)), "max_new_tokens": 20}
    plain = target.generate(
        ids, attention_mask=mask, generation_config=config_of({}, **settings), streamer=recorders[0]
    )
    with oracle(plain, 1.0):
        config = config_of(TREES[tree], **settings)
        target.generate(
            ids, attention_mask=mask, generation_config=config, streamer=recorders[1], assistant_model=drafter
        )
    assert recorders[0].puts == recorders[1].puts and recorders[1].ended == 1
    assert drafter.last_stats.n_accepted > 0


@trees
def test_returned_dict(target, tree):
    """Each row equals plain decoding up to its end, followed by zeros."""
    drafter, (ids, mask) = make_drafter(target), padded(LENGTHS)
    wanted = ["return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states"]
    settings = {**dict.fromkeys(wanted, True), "eos_token_id": list(range(3, 30)), "repetition_penalty": 1.2}
    plain = target.generate(ids, attention_mask=mask, generation_config=config_of({}, **settings))
    with oracle(plain.sequences, 0.8):
        config = config_of(TREES[tree], **settings)
        drafted = target.generate(ids, attention_mask=mask, generation_config=config, assistant_model=drafter)
    assert torch.equal(plain.sequences, drafted.sequences) and drafter.last_stats.n_accepted > 0
    assert cache_of(drafted) is None
    ends = [len(row) - 20 - int((row[20:] == 0).sum()) for row in plain.sequences]
    assert min(ends) < max(ends)
    for name in ("scores", "logits", "hidden_states"):
        ours, theirs = getattr(drafted, name), getattr(plain, name)
        assert len(ours) == len(theirs)
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            for one, other in zip(a, b, strict=True) if name == "hidden_states" else [(a, b)]:
                assert one.shape == other.shape and one.dtype == other.dtype
                for row, end in enumerate(ends):
                    expected = other[row] if step < end else torch.zeros_like(other[row])
                    torch.testing.assert_close(one[row], expected, rtol=1e-4, atol=1e-4)


@trees
def test_several_sequences_a_prompt(target, tree):
    """Sampled from one token only, so that outputs are comparable although draws differ."""
    ids, drafter = prompt_of(9), make_drafter(target)
    plain = target.generate(ids, generation_config=config_of({}, do_sample=True, top_k=1, num_return_sequences=3))
    with oracle(plain):
        config = config_of(TREES[tree], do_sample=True, top_k=1, num_return_sequences=3)
        drafted = target.generate(ids, generation_config=config, assistant_model=drafter)
    assert torch.equal(plain, drafted) and len(drafter.last_stats.rows) == 3
    assert drafter.last_stats.acceptance_length > 2


def test_pipeline(target):
    drafter, tokenizer = make_drafter(target), make_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = "<0>", "left"
    texts = ["hello", "a", "how are you"]
    generator = pipeline("text-generation", model=target, tokenizer=tokenizer, batch_size=3)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = generator(texts, **settings)
    assert generator(texts, assistant_model=drafter, **settings) == plain
    assert len(drafter.last_stats.rows) == 3


@trees
@pytest.mark.parametrize(
    "head", [{"router_groups": 12, "router_active_groups": 4}, {"target_feature_layers": [1, -1]}]
)
def test_draft_heads(target, tree, head):
    compare_batch(target, make_drafter(target, **head), [9, 3, 5], TREES[tree], max_new_tokens=12)


def test_time_is_up(target):
    """Every row ends at its current length."""
    ids, mask = padded(LENGTHS)
    config = config_of(TREES["chain"], max_time=0.0, eos_token_id=5)
    drafted = target.generate(ids, attention_mask=mask, generation_config=config, assistant_model=make_drafter(target))
    assert torch.equal(drafted, target.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False))


def test_positions_of_the_caller(target):
    drafter, ids = make_drafter(target), torch.cat([prompt_of(9), prompt_of(9, 4)])
    positions = torch.arange(9) * torch.tensor([[3], [1]])
    plain = target.generate(ids, position_ids=positions, generation_config=config_of({}))
    with oracle(plain):
        config = config_of(TREES["tree16"])
        drafted = target.generate(ids, position_ids=positions, generation_config=config, assistant_model=drafter)
    assert torch.equal(plain, drafted) and drafter.last_stats.n_accepted > 0
    assert not torch.equal(plain, target.generate(ids, generation_config=config_of({})))


def test_equal_seeds_equal_results(target):
    """Other tokens than plain decoding's, which draws for all rows at once."""
    drafter, (ids, mask), outputs = make_drafter(target), padded(LENGTHS), []
    for seed in (0, 0, 1):
        set_seed(seed)
        config = config_of(TREES["tree16"], do_sample=True)
        outputs.append(target.generate(ids, attention_mask=mask, generation_config=config, assistant_model=drafter))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
