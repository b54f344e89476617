"""What users pass to `generate` beside a prompt works with a drafter as it does without one."""

import warnings
import weakref

import pytest
import torch
from conftest import FAMILIES, make_drafter, make_target, make_tokenizer
from oracle import oracle
from parity import CHAIN, STOCK, TREES, Recorder, config_of, prompt_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StoppingCriteria, pipeline, set_seed

from coral_hf import CoralDraftModel, coral_generate
from coral_hf.compat import CACHE_NAME, cache_kwarg, cache_of
from coral_hf.generation import decoding
from coral_hf.generation.candidate_generator import CoralCandidateGenerator
from coral_hf.generation.settings import DraftSettings
from coral_hf.generation.verifier import Verifier


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
@pytest.mark.parametrize("new", [1, 3, 12])
def test_a_padded_conversation_continued_with_its_new_tokens(target, draft, new):
    """The mask covers what is in the cache, the ids do not: of the padding there the drafter sees nothing."""
    drafter, mask = make_drafter(target), (torch.arange(15) >= 6).long()[None]
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), prompt_of(9)], dim=1)

    def cache():
        filled = DynamicCache()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        target(padded, attention_mask=mask, position_ids=positions, use_cache=True, **cache_kwarg(filled))
        return filled

    whole = torch.cat([mask, mask.new_ones(1, new)], dim=1)
    both(target, drafter, draft, prompt_of(new, seed=8), cache=cache, attention_mask=whole)


@drafts
def test_left_padding_and_own_positions(target, draft):
    drafter = make_drafter(target)
    ids = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt_of(9)], dim=1)
    mask = (torch.arange(13) >= 4).long()[None]
    both(target, drafter, draft, ids, attention_mask=mask, repetition_penalty=1.2)
    both(target, drafter, draft, ids, position_ids=torch.arange(13)[None] + 7)


@drafts
@pytest.mark.parametrize("family", list(FAMILIES))
def test_prefill_in_chunks(draft, family):
    """Also with padding and behind a prefilled cache; the states are plain's, those of the last chunk."""
    target = make_target(family)
    drafter, ids = make_drafter(target, target_feature_layers=[1, -1]), prompt_of(25)
    lengths = []
    handle = target.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )

    def cache():
        filled = DynamicCache()
        target(input_ids=ids[:, :9], use_cache=True, **cache_kwarg(filled))
        return filled

    settings = {"prefill_chunk_size": 7, "return_dict_in_generate": True, "output_hidden_states": True}
    plain, drafted = both(target, drafter, draft, ids, **settings)
    assert torch.equal(drafted.sequences, target.generate(ids, generation_config=config_of({})))
    for ours, theirs in zip(drafted.hidden_states, plain.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    both(target, drafter, draft, ids, attention_mask=(torch.arange(25) >= 4).long()[None], **settings)
    # Transformers 5.17 reads the whole prompt again there: what counts is the text
    lengths.clear()
    config = config_of(DRAFTS[draft], prefill_chunk_size=7)
    continued = target.generate(ids, generation_config=config, assistant_model=drafter, **cache_kwarg(cache()))
    assert torch.equal(continued, plain.sequences) and lengths[:4] == [9, 7, 7, 2]
    handle.remove()


def test_prefill_in_chunks_is_the_drafter_s_too(target):
    """The features of all chunks: it drafts what it drafts after a prefill in one piece."""
    drafter, stats = make_drafter(target, target_feature_layers=[1, -1]), []
    for size in (None, 4):
        target.generate(
            prompt_of(25), generation_config=config_of(CHAIN, prefill_chunk_size=size), assistant_model=drafter
        )
        stats.append(drafter.last_stats)
    assert stats[0] == stats[1]


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_bad_chunks_are_refused(target, size):
    with pytest.raises(ValueError, match=f"prefill_chunk_size={size}"):
        config = config_of(CHAIN, prefill_chunk_size=size)
        target.generate(prompt_of(9), generation_config=config, assistant_model=make_drafter(target))


@drafts
def test_states_of_a_prompt_are_not_kept(target, draft):
    """Of all layers the drafter reads few: the others are gone before the first draft is verified."""
    drafter, kept, alive = make_drafter(target, target_feature_layers=[1, 2]), [], []
    before = target.register_forward_pre_hook(lambda *_: alive.append([state() is not None for state in kept]))
    after = target.register_forward_hook(
        lambda *args: kept.extend(weakref.ref(state) for state in args[-1].hidden_states)
    )
    target.generate(prompt_of(9), generation_config=config_of(DRAFTS[draft]), assistant_model=drafter)
    before.remove(), after.remove()
    assert alive[0] == [] and alive[1] == [False] * 5


@drafts
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_a_mask_without_padding_is_dropped(draft, family):
    """Some releases of Transformers hand one over: it would grow with every step. With padding it stays."""
    target = make_target(family)
    drafter, ids, outputs = make_drafter(target), prompt_of(20), []
    for mask in (None, torch.ones_like(ids), (torch.arange(20) >= 3).long()[None]):
        verifier = Verifier(target, {**cache_kwarg(DynamicCache(config=target.config)), "attention_mask": mask})
        with torch.no_grad():
            prefilled, features = verifier.prefill(ids, target.generation_config, lambda states: states[-1])
            assert (verifier.mask is None) == (mask is None or bool(mask.all()))
            settings = DraftSettings.resolve(drafter.config, config_of(DRAFTS[draft]))
            generator = CoralCandidateGenerator(drafter, target, settings, 40, verifier.num_padding)
            token = prefilled.logits[:, -1].argmax(-1, keepdim=True)
            tree = generator.propose(torch.cat([ids, token], dim=1), features)
            outputs.append(verifier.verify(tree).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    assert not torch.equal(outputs[0], outputs[2])


class _Questions(TorchDispatchMode):
    """Counts what would make a GPU's host wait: `int`, `bool` and `item` of a tensor, and `nonzero`."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@drafts
@pytest.mark.parametrize("eos", [None, [126, 127]])
def test_accepting_asks_the_device_once(target, draft, eos, monkeypatch):
    """However many tokens are accepted; the one transfer, of lists, is not counted on a CPU."""
    questions = []

    def counted(function):
        def run(*args):
            with _Questions() as mode:
                result = function(*args)
            questions.append(mode.count)
            return result

        return run

    monkeypatch.setattr(decoding, "_accept", counted(decoding._accept))
    monkeypatch.setattr(decoding, "compact_cache", counted(decoding.compact_cache))
    both(target, make_drafter(target), draft, prompt_of(9), eos_token_id=eos)
    assert questions and not any(questions)
    both(target, make_drafter(target), draft, prompt_of(9), eos_token_id=eos, do_sample=True)
    assert any(questions)  # a token is drawn after the other


@drafts
def test_criteria_of_the_caller_see_no_token_behind_the_end(target, draft):
    """They are asked once a token, as plain decoding asks them: some show it, or count."""

    class Seen(StoppingCriteria):
        def __init__(self):
            self.lengths = []

        def __call__(self, input_ids, scores, **kwargs):
            self.lengths.append(input_ids.shape[1])
            return torch.full((1,), input_ids.shape[1] >= 27, dtype=torch.bool)

    drafter, seen = make_drafter(target), []
    plain = target.generate(prompt_of(9), generation_config=config_of({}))
    for size in ({}, DRAFTS[draft]):
        seen.append(Seen())
        with oracle(plain, 1.0):
            target.generate(
                prompt_of(9),
                generation_config=config_of(size),
                stopping_criteria=[seen[-1]],
                **({"assistant_model": drafter} if size else {}),
            )
    assert seen[0].lengths == seen[1].lengths == list(range(10, 28))


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
