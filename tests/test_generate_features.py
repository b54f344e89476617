"""What users pass to `generate` beside a prompt works with a drafter as it does without one."""

import warnings

import pytest
import torch
from conftest import make_drafter, make_target, make_tokenizer
from oracle import oracle
from parity import CHAIN, STOCK, TREES, Recorder, config_of, prompt_of
from transformers import DynamicCache, pipeline, set_seed

from coral_hf import CoralDraftModel, coral_generate
from coral_hf.compat import CACHE_NAME, cache_kwarg, cache_of


DRAFTS = {"chain": CHAIN, "tree": TREES["tree16"]}
drafts = pytest.mark.parametrize("draft", list(DRAFTS))


def both(model, drafter, draft, ids, probability=0.9, cache=None, **settings):
    """Plain and drafted outputs of one call, the drafts mostly right; asserts equal ids and accepted tokens."""
    extra = {key: settings.pop(key) for key in ("attention_mask", "tokenizer", "position_ids") if key in settings}

    def run(size, **assistant):
        if cache is not None:
            extra[CACHE_NAME] = cache()
        set_seed(0)
        return model.generate(input_ids=ids, generation_config=config_of(size, **settings), **extra, **assistant)

    plain = run({})
    sequences = getattr(plain, "sequences", plain)
    with oracle(sequences, probability):
        drafted = run(DRAFTS[draft], assistant_model=drafter)
    assert torch.equal(sequences, getattr(drafted, "sequences", drafted))
    assert drafter.last_stats.n_accepted > 0
    return plain, drafted


@drafts
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_stop_strings_cut_inside_a_block(target, draft, do_sample):
    """A stop string ends the text at its last token, wherever in a block of accepted tokens that falls."""
    drafter, tokenizer, ids = make_drafter(target), make_tokenizer(), prompt_of(9)
    set_seed(0)
    whole = target.generate(ids, generation_config=config_of({}, do_sample=do_sample))
    inside = 0
    for start in range(12, 24):
        stop = tokenizer.decode(whole[0, start : start + 2])
        settings = {"stop_strings": [stop], "tokenizer": tokenizer, "do_sample": do_sample}
        plain, _ = both(target, drafter, draft, ids, 1.0, **settings)
        assert plain.shape[1] <= start + 2 < whole.shape[1]
        # Fully accepted blocks have depth + 1 tokens; what is not a multiple of that was cut.
        depth = DRAFTS[draft]["draft_depth"]
        inside += (plain.shape[1] - ids.shape[1] - 1) % (depth + 1) != 0
    assert inside > 0


def test_stop_strings_in_the_stock_loop_are_refused(target):
    config = config_of(STOCK, stop_strings=["ab"])
    with pytest.raises(ValueError, match=r"draft_stock_loop=True.*stop_strings"):
        target.generate(
            prompt_of(9), generation_config=config, tokenizer=make_tokenizer(), assistant_model=make_drafter(target)
        )


@drafts
def test_several_eos_ids_and_a_streamer(target, draft):
    """Any of several ids ends the text, also inside a block, and the streamer gets what plain decoding gives it."""
    drafter, ids = make_drafter(target), prompt_of(9)
    whole = target.generate(ids, generation_config=config_of({}))[0].tolist()
    for stop in range(12, 20):
        eos = [whole[stop], 126, 127]
        plain, drafted = Recorder(), Recorder()
        target.generate(ids, generation_config=config_of({}, eos_token_id=eos), streamer=plain)
        with oracle(torch.tensor([whole]), 1.0):
            config = config_of(DRAFTS[draft], eos_token_id=eos)
            output = target.generate(ids, generation_config=config, streamer=drafted, assistant_model=drafter)
        assert drafted.puts == plain.puts and drafted.ended == 1
        assert drafted.tokens == output[0].tolist()


@drafts
def test_min_new_tokens_and_bad_words(target, draft):
    drafter, ids = make_drafter(target), prompt_of(9)
    whole = target.generate(ids, generation_config=config_of({}))[0].tolist()
    eos = whole[12:15]
    plain, _ = both(target, drafter, draft, ids, min_new_tokens=25, eos_token_id=eos)
    assert plain.shape[1] >= 9 + 25
    bad = [[whole[11]], whole[13:15]]
    plain, _ = both(target, drafter, draft, ids, bad_words_ids=bad)
    assert whole[11] not in plain[0, 9:].tolist()


@drafts
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_returned_dict_has_plain_layout(draft, do_sample, dtype):
    """Scores, logits and hidden states: as many, of the same shapes and dtypes and values, up to a stop in a block."""
    target = make_target(dtype=dtype)
    drafter, ids = make_drafter(target), prompt_of(9)
    wanted = ["return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states"]
    settings = {**dict.fromkeys(wanted, True), "do_sample": do_sample, "max_new_tokens": 18, "top_k": 20}
    plain, drafted = both(target, drafter, draft, ids, **settings)
    assert type(plain) is type(drafted) and list(plain.keys()) == list(drafted.keys())
    for name in ("scores", "logits", "hidden_states"):
        ours, theirs = getattr(drafted, name), getattr(plain, name)
        assert type(ours) is type(theirs) and len(ours) == len(theirs) == 18
        # the float32 cases differ by rounding only
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert cache_of(drafted).get_seq_length() == cache_of(plain).get_seq_length()
    for ours, theirs in zip(cache_of(drafted).layers, cache_of(plain).layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)


@drafts
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_prefilled_cache(draft, family):
    """A cache of the prompt's first part, in a layout the config did not choose: windows hold all the same."""
    target = make_target(family)
    drafter, ids = make_drafter(target), prompt_of(30)

    def cache(past=20):
        filled = DynamicCache()
        if past:
            target(ids[:, :past], use_cache=True, **cache_kwarg(filled))
        return filled

    both(target, drafter, draft, ids, cache=cache)
    both(target, drafter, draft, ids, cache=lambda: cache(0))


@drafts
def test_left_padding_and_own_positions(target, draft):
    drafter = make_drafter(target)
    ids = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt_of(9)], dim=1)
    mask = (torch.arange(13) >= 4).long()[None]
    both(target, drafter, draft, ids, attention_mask=mask, repetition_penalty=1.2)
    both(target, drafter, draft, ids, position_ids=torch.arange(13)[None] + 7)


def test_pipeline(target):
    drafter, tokenizer = make_drafter(target), make_tokenizer()
    options = {"model": target, "tokenizer": tokenizer}
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = pipeline("text-generation", **options)("hello", **settings)
    ids = tokenizer("hello", return_tensors="pt").input_ids
    with oracle(target.generate(ids, **settings), 0.9):
        drafted = pipeline("text-generation", assistant_model=drafter, **options)("hello", **settings)
    assert drafted == plain and drafter.last_stats.n_accepted > 0


@drafts
def test_peft_target(target, draft):
    """Through the wrapper's `generate`, with adapters that change the text, and without a warning of ours."""
    peft = pytest.importorskip("peft")
    drafter, ids = make_drafter(target), prompt_of(9)
    bare = target.generate(ids, generation_config=config_of({}))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(target, config).double().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, _ = both(wrapped, drafter, draft, ids)
        drafted = coral_generate(
            wrapped, drafter, input_ids=ids, max_new_tokens=40, do_sample=False, draft_depth=3, draft_top_k=3
        )
        built = CoralDraftModel.from_target(wrapped)
    assert not torch.equal(plain, bare)
    assert torch.equal(plain, drafted)
    assert built.config.target_model_type == "llama"


@pytest.mark.slow
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_drafter_of_another_dtype(dtype, other):
    """Every pair of dtypes runs; in half precision equality is not promised, only text of the right shape."""
    target = make_target(dtype=dtype)
    drafter, ids = make_drafter(target, dtype=other), prompt_of(9)
    for draft in DRAFTS:
        if dtype == torch.float32:
            both(target, drafter, draft, ids)
        else:
            output = target.generate(ids, generation_config=config_of(DRAFTS[draft]), assistant_model=drafter)
            assert output.shape == (1, 49) and torch.equal(output[:, :9], ids)
