"""Output with a drafter equals plain `generate`'s: families, attentions, trees, processors, sampling."""

import pytest
import torch
from helpers.oracle import oracle
from helpers.parity import STOCK, TREES, Recorder, compare, config_of, prompt_of
from helpers.tiny_models import every_family, make_drafter, make_target
from transformers import AutoModelForCausalLM, LlamaConfig, TextStreamer

from coral_hf import coral_generate
from coral_hf.drafter.configuration_coral import CALIBRATION_KNOTS
from coral_hf.drafter.draft_head import DraftHead
from coral_hf.generation import hook
from coral_hf.generation.tree_size import DraftCosts
from coral_hf.utils.compat import cache_kwarg, cache_of


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@every_family
def test_families(family, attention):
    """Every family, prompts below and beyond the sliding window of 16, chain and tree."""
    target = make_target(family, attention=attention)
    drafter = make_drafter(target, shape="eagle3" if attention == "sdpa" else "eagle")
    accepted = steps = 0
    for length in (6, 30):
        for tree in (TREES["chain"], TREES["tree16"], STOCK):
            _, stats = compare(target, drafter, prompt_of(length), tree)
            accepted, steps = accepted + stats.n_accepted, steps + stats.steps
    assert accepted / steps >= 1.5


@pytest.mark.slow
@pytest.mark.parametrize("tree", list(TREES))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[7], [9, 11]]},
        {"min_new_tokens": 20, "eos_token_id": list(range(3, 40))},
        {"eos_token_id": [5, 17, 90]},
        {"max_new_tokens": 3},
        {"max_new_tokens": 1},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_greedy_settings(target, tree, settings):
    drafter = make_drafter(target)
    _, stats = compare(target, drafter, prompt_of(9), TREES[tree], **settings)
    if not {"eos_token_id", "max_new_tokens"} & set(settings):
        assert stats.n_accepted / stats.steps >= 1.5


@pytest.mark.slow
@pytest.mark.parametrize("tree", ["chain", "tree16", "tree60"])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"temperature": 1.3, "repetition_penalty": 1.2, "top_k": 20},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_sampling_draws_the_same_tokens(target, tree, settings):
    """Same seed, same tokens: the walk uses random numbers exactly like plain sampling."""
    drafter = make_drafter(target)
    _, stats = compare(target, drafter, prompt_of(9), TREES[tree], do_sample=True, **settings)
    assert stats.n_accepted / stats.steps >= 1.5


@pytest.fixture
def stairs(monkeypatch):
    """Costs of a machine on which depth and size change from step to step."""
    target_ms = tuple(10.0 + 6.0 * (size > 1) + 5.0 * ((size - 1) // 4) for size in range(1, 61))
    monkeypatch.setattr(hook, "draft_costs", lambda *_: DraftCosts(target_ms, first_level_ms=2.0, level_ms=1.5))


@pytest.mark.slow
@pytest.mark.parametrize("tree", [*TREES, "stock"])
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "top_p": 0.9}, {"repetition_penalty": 1.3}], ids=str)
def test_cost_aware_trees(target, stairs, tree, settings):
    """The choice of a size draws nothing at random: the same tokens, with and without a calibration."""
    sizes = STOCK if tree == "stock" else TREES[tree]
    if tree == "stock" and "do_sample" in settings:
        settings = {}  # Transformers' own loop draws other samples by design
    calibration = [[value**1.5 for value in CALIBRATION_KNOTS], list(CALIBRATION_KNOTS)]
    for drafter in (make_drafter(target), make_drafter(target, draft_calibration=calibration)):
        _, stats = compare(target, drafter, prompt_of(9), {**sizes, "draft_cost_aware": True}, 0.85, **settings)
        assert stats.n_accepted / stats.steps >= 1
        assert min(stats.drafted_per_depth) < stats.steps  # not every step goes down to the box's depth


def test_left_padding(target):
    drafter = make_drafter(target)
    ids = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt_of(9)], dim=1)
    mask = (torch.arange(14) >= 5).long()[None]
    for tree in (TREES["chain"], TREES["tree16"], STOCK):
        _, stats = compare(target, drafter, ids, tree, attention_mask=mask)
        assert stats.n_accepted / stats.steps >= 1.5


def test_padding_changes_nothing_for_the_drafter(target):
    """A padded prompt gives the drafts of the bare one: acceptance is the same step by step."""
    drafter = make_drafter(target)
    drafter_stats = []
    for padding in (0, 7):
        ids = torch.cat([torch.zeros(1, padding, dtype=torch.long), prompt_of(9)], dim=1)
        mask = (torch.arange(ids.shape[1]) >= padding).long()[None]
        target.generate(
            ids, attention_mask=mask, generation_config=config_of(TREES["tree32"]), assistant_model=drafter
        )
        drafter_stats.append(drafter.last_stats)
    assert drafter_stats[0] == drafter_stats[1]


@pytest.mark.parametrize("tree", ["chain", "tree16"])
def test_continuing_a_conversation(target, tree):
    """A prefilled cache, with the whole sequence passed again."""
    drafter = make_drafter(target)
    ids = prompt_of(9)
    outputs = []
    for assistant in (None, drafter):
        config = config_of(TREES[tree] if assistant else {}, return_dict_in_generate=True, max_new_tokens=12)
        first = target.generate(ids, generation_config=config, assistant_model=assistant)
        longer = torch.cat([first.sequences, prompt_of(4, seed=8)], dim=1)
        second = target.generate(
            longer, generation_config=config, assistant_model=assistant, **cache_kwarg(cache_of(first))
        )
        assert cache_of(second).get_seq_length() == second.sequences.shape[1] - 1
        outputs.append(second.sequences)
    assert torch.equal(*outputs)


def test_returned_dict(target):
    """Scores, logits and hidden states equal those of plain decoding, with one entry per token."""
    drafter, ids = make_drafter(target), prompt_of(9)
    wanted = ["return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states"]
    settings = {**dict.fromkeys(wanted, True), "repetition_penalty": 1.2, "max_new_tokens": 20}
    plain = target.generate(ids, generation_config=config_of({}, **settings))
    with oracle(plain.sequences):
        drafted = target.generate(
            ids, generation_config=config_of(TREES["tree16"], **settings), assistant_model=drafter
        )
    assert drafter.last_stats.n_accepted > 5
    assert torch.equal(plain.sequences, drafted.sequences)
    for name in ("scores", "logits"):
        ours, theirs = torch.cat(getattr(drafted, name)), torch.cat(getattr(plain, name))
        torch.testing.assert_close(ours, theirs)
    assert len(plain.hidden_states) == len(drafted.hidden_states)
    for ours, theirs in zip(drafted.hidden_states, plain.hidden_states, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tree", ["chain", "tree16"])
def test_streamer(target, tree):
    """Tokens in order, prompt first, nothing after the stop."""
    drafter, ids = make_drafter(target), prompt_of(9)
    plain = target.generate(ids, generation_config=config_of({}, eos_token_id=[90, 5]))
    recorder = Recorder()
    with oracle(plain):
        target.generate(
            ids,
            generation_config=config_of(TREES[tree], eos_token_id=[90, 5]),
            assistant_model=drafter,
            streamer=recorder,
        )
    assert recorder.tokens == plain[0].tolist() and recorder.ended == 1


def test_other_assistants_are_untouched(target):
    """An ordinary assistant and prompt lookup still use Transformers' own code."""
    torch.manual_seed(5)
    small = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    small.generation_config.eos_token_id = None
    ids = prompt_of(9)
    plain = target.generate(ids, generation_config=config_of({}))
    assert torch.equal(plain, target.generate(ids, generation_config=config_of({}), assistant_model=small.double()))
    assert torch.equal(plain, target.generate(ids, generation_config=config_of({}, prompt_lookup_num_tokens=3)))


def test_coral_generate(target):
    drafter, ids = make_drafter(target), prompt_of(9)
    plain = target.generate(ids, max_new_tokens=20, do_sample=False)
    drafted = coral_generate(target, drafter, input_ids=ids, max_new_tokens=20, do_sample=False, draft_depth=4)
    assert torch.equal(plain, drafted)
    assert len(drafter.last_stats.drafted_per_depth) == 4
    config = config_of({})
    coral_generate(target, drafter, input_ids=ids, generation_config=config, draft_depth=4)
    for untouched in (config, target.generation_config):
        assert not hasattr(untouched, "draft_depth")


def test_coral_generate_keeps_an_argument_that_is_none(target, our_deprecations):
    """`eos_token_id=None` means no end token; the target's own is not used."""
    ids = prompt_of(9)
    target.generation_config.eos_token_id = int(target.generate(ids, max_new_tokens=3, do_sample=False)[0, -1])
    kwargs = {"input_ids": ids, "max_new_tokens": 12, "do_sample": False}
    for eos in ({}, {"eos_token_id": None}):
        plain = target.generate(**kwargs, **eos)
        assert torch.equal(plain, coral_generate(target, make_drafter(target), **kwargs, **eos))
    assert plain.shape[1] == 21
    our_deprecations.clear()  # only for that argument, as long as Transformers has no other way


def test_float32_and_bfloat16_run():
    """Other dtypes than the drafter's: sizes and devices are reconciled, float32 stays identical."""
    target = make_target(dtype=torch.float32)
    drafter = make_drafter(target, dtype=torch.bfloat16)
    _, stats = compare(target, drafter, prompt_of(9), TREES["tree16"])
    assert stats.n_accepted > 0
    target.bfloat16()
    drafted = coral_generate(target, drafter, input_ids=prompt_of(9), max_new_tokens=20, do_sample=False)
    assert drafted.shape[1] == 29


@pytest.mark.parametrize("tree", ["chain", "tree8", "tree16"])
def test_a_drafter_whose_numbers_overflow(target, tree, monkeypatch):
    """Rows of NaN among right and wrong drafts, as after a float16 overflow: the same text."""
    drafter, ids = make_drafter(target), prompt_of(9)
    plain = target.generate(ids, generation_config=config_of({}))
    generator = torch.Generator().manual_seed(0)
    with oracle(plain, 0.9):
        right_or_wrong = DraftHead._active_logits

        def logits(self, hidden, weights):
            logits, *rest = right_or_wrong(self, hidden, weights)
            overflow = torch.rand(logits.shape[:2], generator=generator) < 0.3
            return logits.masked_fill(overflow[..., None], torch.nan), *rest

        monkeypatch.setattr(DraftHead, "_active_logits", logits)
        for _ in range(5):
            drafted = target.generate(ids, generation_config=config_of(TREES[tree]), assistant_model=drafter)
            assert torch.equal(plain, drafted)
        monkeypatch.undo()
    assert drafter.last_stats.n_accepted > 10


def test_text_streamer_prints_once(target, capsys):
    class Tokenizer:
        def decode(self, ids, **kwargs):
            return " ".join(map(str, ids))

    target.generate(
        prompt_of(4),
        max_new_tokens=6,
        do_sample=False,
        assistant_model=make_drafter(target),
        streamer=TextStreamer(Tokenizer(), skip_prompt=True),
    )
    assert len(capsys.readouterr().out.split()) == 6
