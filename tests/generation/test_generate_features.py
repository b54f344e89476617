"""The arguments that users pass to `generate` besides a prompt work the same with a drafter."""

import warnings

import pytest
import torch
from helpers.drafted_calls import DRAFTS, both, drafts
from helpers.oracle import oracle
from helpers.parity import STOCK, Recorder, config_of, prompt_of
from helpers.tiny_models import make_drafter, make_target, make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StoppingCriteria, pipeline, set_seed

from coral_hf import CoralDraftModel, coral_generate
from coral_hf.generation.target_forward import TargetForward
from coral_hf.generation.tokens.token_choice import TokenChoice
from coral_hf.utils.compat import cache_of


@pytest.mark.parametrize("stock", [False, True])
def test_a_chain_is_cut_at_its_total(target, stock):
    drafter, ids = make_drafter(target), prompt_of(9)
    plain = target.generate(ids, max_new_tokens=20)
    with oracle(plain, 1.0):
        sizes = {"draft_depth": 5, "draft_top_k": 1, "draft_total_tokens": 3, "draft_stock_loop": stock}
        drafted = coral_generate(target, drafter, input_ids=ids, max_new_tokens=20, **sizes)
    assert torch.equal(drafted, plain)
    assert len(drafter.last_stats.drafted_per_depth) == 2 < drafter.last_stats.acceptance_length


@drafts
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_stop_strings_cut_inside_a_block(target, draft, do_sample):
    """A stop string ends the text at its last token, at any position in a block of accepted tokens."""
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
    """Any of several ids ends the text, also inside a block, and the streamer gets the same as in plain decoding."""
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
    """Scores, logits and hidden states: the same number, shapes, dtypes and values, up to a stop in a block."""
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


class _Questions(TorchDispatchMode):
    """Counts the calls for which a host waits for its GPU: `int`, `bool`, `item`, `nonzero`, and lists but the first."""

    count = 0

    def __enter__(self):
        self.tolist, lists = torch.Tensor.tolist, []

        def counted(tensor):
            lists.append(tensor)
            self.count += len(lists) > 1
            return self.tolist(tensor)

        torch.Tensor.tolist = counted
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self.tolist
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@drafts
@pytest.mark.parametrize("eos", [None, [126, 127]])
def test_accepting_asks_the_device_once(target, draft, eos, monkeypatch):
    """However many tokens are accepted, in the store and in the dynamic cache."""
    questions = []

    def counted(function):
        def run(*args):
            with _Questions() as mode:
                result = function(*args)
            questions.append(mode.count)
            return result

        return run

    monkeypatch.setattr(TokenChoice, "accept", counted(TokenChoice.accept))
    monkeypatch.setattr(TargetForward, "keep", counted(TargetForward.keep))
    both(target, make_drafter(target), draft, prompt_of(9), eos_token_id=eos)
    assert questions and not any(questions)
    both(target, make_drafter(target), draft, prompt_of(9), eos_token_id=eos, do_sample=True)
    assert any(questions)  # a token is drawn after the other


@drafts
def test_criteria_of_the_caller_see_no_token_behind_the_end(target, draft):
    """They are called once per token, as in plain decoding, because some show the token or count calls."""

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


def test_pipeline_after_special_ids_have_changed(target):
    """It would then assume that target and drafter have different tokenizers."""
    drafter, tokenizer = make_drafter(target), make_tokenizer()
    target.config.pad_token_id = target.config.eos_token_id
    options = {"model": target, "tokenizer": tokenizer}
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = pipeline("text-generation", **options)("hello", **settings)
    drafting = {"assistant_model": drafter, "assistant_tokenizer": tokenizer}
    assert pipeline("text-generation", **drafting, **options)("hello", **settings) == plain
    assert drafter.last_stats.steps > 0


@drafts
def test_peft_target(target, draft):
    """Through the wrapper's `generate`, with adapters that change the text, and without a warning."""
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
