"""A slice of `long_runs.py`, interrupts, threads, and unchanged behaviour for other users of Transformers."""

import inspect
import subprocess
import sys
import threading

import long_runs
import pytest
import torch
from helpers.oracle import oracle
from helpers.parity import CHAIN, TREES, config_of, prompt_of
from helpers.tiny_models import make_drafter, make_target
from helpers.tiny_trainings import make_args, random_rows
from transformers import GenerationMixin, StoppingCriteria, StoppingCriteriaList, TrainerCallback
from transformers.generation.streamers import BaseStreamer

from coral_hf import CoralDraftModel
from coral_hf.training.trainer import CoralTrainer


@pytest.mark.slow
def test_memory_stays_flat():
    for rows in (long_runs.one_call(240), long_runs.many_calls(40, tokens=6)):
        assert len(rows) == 4
        assert rows[-1]["resident_mb"] - rows[0]["resident_mb"] < 48


class _Interrupt(BaseStreamer, StoppingCriteria):
    """Ctrl-C at the n-th token, from a streamer or from a stopping criterion."""

    def __init__(self, count: int):
        self.count = count

    def put(self, value):
        self.count -= 1
        if self.count == 0:
            raise KeyboardInterrupt

    def end(self):
        pass

    def __call__(self, input_ids, scores, **kwargs):
        self.put(input_ids)
        return torch.zeros(1, dtype=torch.bool)


@pytest.mark.slow
@pytest.mark.parametrize("tree", ["chain", "tree16"])
@pytest.mark.parametrize("by", ["streamer", "stopping_criteria"])
def test_interrupted_generation_leaves_both_models_usable(target, tree, by):
    drafter, ids = make_drafter(target), prompt_of(9)
    plain = target.generate(ids, generation_config=config_of({}))
    for count in (1, 2, 3, 7):
        interrupt = _Interrupt(count)
        value = interrupt if by == "streamer" else StoppingCriteriaList([interrupt])
        with oracle(plain, 0.9), pytest.raises(KeyboardInterrupt):
            target.generate(ids, generation_config=config_of(TREES[tree]), assistant_model=drafter, **{by: value})
        again = target.generate(ids, generation_config=config_of(TREES[tree]), assistant_model=drafter)
        assert torch.equal(again, plain) and drafter.last_stats.steps > 0
        assert torch.equal(target.generate(ids, generation_config=config_of({})), plain)


class _InterruptTraining(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_interrupted_training_leaves_whole_files(tmp_path):
    target = make_target(dtype=torch.float32)
    drafter = make_drafter(target)
    args = make_args(tmp_path, max_steps=6, save_strategy="steps", save_steps=2)
    rows = random_rows(12)

    def trainer(model, callbacks=None):
        return CoralTrainer(model=model, target_model=target, args=args, train_dataset=rows, callbacks=callbacks)

    with pytest.raises(KeyboardInterrupt):
        trainer(drafter, [_InterruptTraining()]).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    CoralDraftModel.from_pretrained(tmp_path / "checkpoint-2")
    ids = prompt_of(6)
    drafted = target.generate(ids, max_new_tokens=8, do_sample=False, assistant_model=drafter.eval())
    assert torch.equal(drafted, target.generate(ids, max_new_tokens=8, do_sample=False))
    again = trainer(make_drafter(target))
    again.train(resume_from_checkpoint="last")
    assert again.state.global_step == 6


@pytest.mark.slow
def test_two_threads_share_target_and_drafter(target):
    """Each call has its own caches and statistics; `drafter.last_stats` belongs to the call that began last."""
    drafter = make_drafter(target)
    prompts = [prompt_of(5 + number, seed=number) for number in range(4)]
    expected = [target.generate(ids, generation_config=config_of({})) for ids in prompts]
    wrong, both = [], threading.Barrier(2)

    def work(first: int):
        both.wait()
        for number in range(6):
            index = (first + number) % 4
            tree = CHAIN if number % 2 else TREES["tree16"]
            ids = target.generate(prompts[index], generation_config=config_of(tree), assistant_model=drafter)
            if not torch.equal(ids, expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads) and not wrong
    assert drafter.last_stats.steps > 0


HOOKED = ("_assisted_decoding", "_get_candidate_generator", "_validate_generation_mode", "generate")


def test_the_hook_keeps_signatures():
    for name in HOOKED:
        hooked = getattr(GenerationMixin, name)
        assert inspect.signature(hooked) == inspect.signature(hooked._coral_hf_original)
        assert hooked.__doc__ == hooked._coral_hf_original.__doc__ and hooked.__name__ == name


OTHER_USERS = """
import sys
import torch
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, set_seed

before = dict(vars(GenerationMixin))
def tiny(layers):
    torch.manual_seed(layers)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=2, pad_token_id=0, eos_token_id=None, initializer_range=0.3)).double().eval()
    model.generation_config.eos_token_id = None
    return model
target, ids = tiny(2), torch.tensor([[5, 9, 3, 17]])
def outputs():
    assistant = tiny(1)  # a new one: assistants remember how much they guessed right
    ways = [{"do_sample": False}, {"do_sample": True}, {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True}, {"assistant_model": assistant},
        {"assistant_model": assistant, "do_sample": True}, {"prompt_lookup_num_tokens": 2}]
    found = []
    for way in ways:
        set_seed(0)
        found.append(target.generate(ids, max_new_tokens=12, **way))
    return found
first = outputs()
import coral_hf
assert all(torch.equal(a, b) for a, b in zip(first, outputs(), strict=True))
changed = {name for name, value in vars(GenerationMixin).items() if before.get(name) is not value}
assert changed == set(sys.argv[1:]), changed
"""


@pytest.mark.slow
def test_other_users_of_transformers_are_left_alone():
    """Plain, sampled, beam and assisted generation before and after the import; four methods are wrapped, no more."""
    subprocess.run([sys.executable, "-c", OTHER_USERS, *HOOKED], check=True)
