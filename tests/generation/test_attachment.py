"""An attached drafter: all calls of `generate` draft, and calls that cannot draft run as plain `generate`."""

import copy
import io
import logging

import pytest
import torch
from helpers.oracle import oracle
from helpers.parity import CHAIN, Recorder, prompt_of
from helpers.tiny_models import make_drafter, make_target, make_tokenizer
from transformers import GenerationConfig, pipeline, set_seed

import coral_hf
from coral_hf.generation.attachment import attachment_of


@pytest.fixture
def told():
    """The lines that Transformers' logger received."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("coral_hf.generation.attachment")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def generate(target, ids=None, **settings):
    set_seed(0)
    return target.generate(prompt_of(9) if ids is None else ids, max_new_tokens=20, pad_token_id=0, **settings)


@pytest.mark.parametrize(
    "settings", [{"do_sample": False}, {"do_sample": True, "top_k": 5}], ids=["greedy", "sampled"]
)
def test_calls_draft_until_the_drafter_is_detached(target, settings):
    drafter = make_drafter(target)
    plain = generate(target, **settings)
    coral_hf.attach(target, drafter, **CHAIN)
    with oracle(plain, 0.9):
        assert torch.equal(generate(target, **settings), plain)
    assert drafter.last_stats.n_accepted > 0 and len(drafter.last_stats.drafted_per_depth) == 5
    coral_hf.detach(target)
    drafter.last_stats = None
    assert torch.equal(generate(target, **settings), plain) and drafter.last_stats is None


def test_arguments_by_place_and_a_config_of_the_call(target):
    drafter, ids = make_drafter(target), prompt_of(9)
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    plain = target.generate(ids, config)
    with coral_hf.attach(target, drafter):
        assert torch.equal(target.generate(ids, config), plain)
        assert drafter.last_stats.steps > 0 and config.to_dict().get("draft_depth") is None


UNDRAFTED = {
    "beams": {"num_beams": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "no cache": {"use_cache": False},
    "attentions": {"return_dict_in_generate": True, "output_attentions": True},
}


@pytest.mark.parametrize("name", list(UNDRAFTED))
def test_what_cannot_be_drafted_runs_as_plain_generate(name, told):
    target = make_target(attention="eager")
    drafter, settings = make_drafter(target), {"do_sample": False, **UNDRAFTED[name]}
    plain = generate(target, **settings)
    drafter.last_stats = None
    with coral_hf.attach(target, drafter):
        for _ in range(2):
            found = generate(target, **settings)
            assert torch.equal(getattr(found, "sequences", found), getattr(plain, "sequences", plain))
    assert len(told) == 1 and "without the attached CORAL drafter" in told[0]
    assert drafter.last_stats is None


def test_an_assistant_of_the_call_wins(target, told):
    drafter, other = make_drafter(target), make_drafter(target, seed=7)
    with coral_hf.attach(target, drafter):
        generate(target, do_sample=False, assistant_model=other)
    assert other.last_stats is not None and drafter.last_stats is None
    assert len(told) == 1 and "its own assistant_model" in told[0]


def test_a_streamer_gets_its_prompt_once_where_a_call_is_not_drafted(target, told):
    ids, streams = prompt_of(9), [Recorder(), Recorder()]
    embeds = target.get_input_embeddings()(ids)
    target.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False, streamer=streams[0])
    with coral_hf.attach(target, make_drafter(target)):
        target.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False, streamer=streams[1])
    assert streams[0].puts == streams[1].puts and streams[1].ended == 1
    assert "input_ids is empty" in told[0]


def test_settings_without_effect_do_no_harm(target):
    target.generation_config.num_assistant_tokens = 7
    drafter = make_drafter(target)
    with coral_hf.attach(target, drafter):
        generate(target, do_sample=False)
    assert drafter.last_stats.steps > 0


def test_a_copy_is_attached_and_a_pickle_is_not(target, tmp_path):
    drafter = make_drafter(target)
    attachment = coral_hf.attach(target, drafter)
    twin = copy.deepcopy(target)
    assert attachment_of(twin).drafter is drafter and attachment_of(twin).target is twin
    coral_hf.detach(twin)
    assert attachment_of(target) is attachment
    buffer = io.BytesIO()
    torch.save(target, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert attachment_of(loaded) is None
    target.save_pretrained(tmp_path)
    assert not [name for name in target.state_dict() if "coral" in name]
    assert "coral" not in "".join(path.read_text() for path in tmp_path.glob("*.json"))
    assert len(list(target.modules())) == len(list(loaded.modules()))


def test_peft_targets_and_parallel_wrappers(target):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        target, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    drafter, ids = make_drafter(target), prompt_of(9)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(input_ids=ids, **settings)
    with coral_hf.attach(torch.nn.DataParallel(model), drafter), oracle(plain, 0.9):
        assert torch.equal(model.generate(input_ids=ids, **settings), plain)
    assert drafter.last_stats.n_accepted > 0 and attachment_of(target) is None


def test_pipeline(target):
    pipe = pipeline("text-generation", model=target.float(), tokenizer=make_tokenizer())
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    plain = pipe(["Hello", "What now?"], **settings)
    drafter = make_drafter(target)
    with coral_hf.attach(target, drafter):
        assert pipe(["Hello", "What now?"], **settings) == plain
    assert drafter.last_stats.steps > 0


def test_bad_input(target):
    drafter = make_drafter(target)
    with pytest.raises(ValueError, match=r"No drafter is attached .*nothing to detach"):
        coral_hf.detach(target)
    with pytest.raises(ValueError, match=r"Unknown draft setting.*draft_width"):
        coral_hf.attach(target, drafter, draft_width=3)
    with pytest.raises(ValueError, match=r"name of a drafter: load it first"):
        coral_hf.attach(target, "org/drafter")
    with pytest.raises(ValueError, match=r"attach drafts with a CORAL drafter, but was given LlamaForCausalLM"):
        coral_hf.attach(target, target)
    with pytest.raises(ValueError, match=r"target is a Linear, not a model that generates"):
        coral_hf.attach(torch.nn.Linear(1, 1), drafter)
    with pytest.raises(ValueError, match="hidden"):
        coral_hf.attach(target, make_drafter(make_target("qwen2"), hidden_size=64))
    assert attachment_of(target) is None
    coral_hf.attach(target, drafter)
    with pytest.raises(ValueError, match=r"attached already: call coral_hf\.detach"):
        coral_hf.attach(target, drafter)
