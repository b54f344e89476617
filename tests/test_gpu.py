"""The same checks on the CPU and, marked `gpu`, on a CUDA device: generation, draft heads, training, regeneration.

pytest -m gpu tests/test_gpu.py
"""

import random

import pytest
import torch
from helpers.batches import padded
from helpers.oracle import oracle
from helpers.parity import CHAIN, TREES, config_of, prompt_of
from helpers.tiny_models import make_drafter, make_target, make_tokenizer
from torch.nn import functional as F
from transformers import set_seed

from coral_hf import TargetAdapter
from coral_hf.drafter.draft_head import DraftHead, gathered_logits, grouped_logits
from coral_hf.responses.regenerate import regenerate
from coral_hf.responses.response_files import iter_responses
from coral_hf.training.arguments import CoralTrainingArguments
from coral_hf.training.trainer import CoralTrainer


DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
on_every_device = pytest.mark.parametrize("device", DEVICES)


def generate(target, ids, size, drafter=None, attention_mask=None, **settings):
    set_seed(0)
    config = config_of(size, **settings)
    return target.generate(ids, attention_mask=attention_mask, generation_config=config, assistant_model=drafter)


@pytest.mark.slow
@on_every_device
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_generation_is_lossless(family, do_sample, device):
    """float64: a block of tokens and one token use different kernels, whose float32 results may differ."""
    target = make_target(family).to(device)
    drafter = make_drafter(target).to(device)
    for length in (6, 24):
        ids = prompt_of(length).to(device)
        plain = generate(target, ids, {}, do_sample=do_sample)
        for size in (CHAIN, TREES["tree16"]):
            assert torch.equal(generate(target, ids, size, drafter, do_sample=do_sample), plain)
            with oracle(plain, 0.85):
                assert torch.equal(generate(target, ids, size, drafter, do_sample=do_sample), plain)
            assert drafter.last_stats.acceptance_length > 1.5


@on_every_device
def test_drafter_on_another_device(device):
    """A drafter left on the CPU serves a target elsewhere."""
    target, ids = make_target().to(device), prompt_of(9).to(device)
    drafter = make_drafter(target).to("cpu")
    plain = generate(target, ids, {})
    for size in (CHAIN, TREES["tree16"]):
        with oracle(plain, 0.85):
            assert torch.equal(generate(target, ids, size, drafter), plain)
    ids, mask = (part.to(device) for part in padded([9, 3, 14]))
    plain = generate(target, ids, {}, attention_mask=mask)
    with oracle(plain.cpu(), 0.85):
        assert torch.equal(generate(target, ids, TREES["tree16"], drafter, attention_mask=mask), plain)
    assert drafter.last_stats.n_accepted > 0


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("kind", ["full", "shortlist", "router", "both"])
def test_draft_heads_agree_with_the_cpu(kind, device):
    def run(where):
        target = make_target("gemma3_text").to(where)
        drafter = make_drafter(target)
        torch.manual_seed(5)
        if kind in ("router", "both"):
            drafter.add_router(8, 2)
        if kind in ("shortlist", "both"):
            drafter.add_shortlist(torch.arange(128).flip(0), 24)
        drafter.to(where)
        head = DraftHead(TargetAdapter(target), drafter.router, drafter.shortlist, active_groups=2)
        torch.manual_seed(7)
        hidden = torch.randn(1, 6, 32, dtype=torch.float64).to(where)
        ids, log_q = head.top_k(hidden, 5)
        return ids.cpu(), log_q.cpu(), head.argmax(hidden).cpu()

    for found, expected in zip(run(device), run("cpu"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@on_every_device
def test_logits_of_groups_are_those_of_the_full_head(device):
    adapter = TargetAdapter(make_target().to(device))
    torch.manual_seed(0)
    hidden = torch.randn(1, 5, 32, dtype=torch.float64).to(device)
    # 6 groups of 22: the last one is shorter than the others
    full = F.pad(adapter.logits(hidden), (0, 4), value=float("-inf")).unflatten(-1, (6, 22))  # [1, T, G, s]
    for groups in (torch.randint(6, (1, 5, 2)), torch.tensor([[[5, 0, 3]]])):
        groups = groups.to(device)
        expected = full.gather(2, groups.expand(1, 5, -1)[..., None].expand(-1, -1, -1, 22))
        for compute in (grouped_logits, gathered_logits):
            torch.testing.assert_close(compute(adapter, hidden, groups, 22), expected)


def train_a_step(folder, device, bf16):
    target = make_target(dtype=torch.float32)
    rng = random.Random(0)
    rows = [
        {"id": str(i), "prompt_ids": rng.choices(range(3, 128), k=5), "response_ids": rng.choices(range(3, 128), k=9)}
        for i in range(4)
    ]
    arguments = CoralTrainingArguments(
        output_dir=str(folder),
        rollout_schedule="3",
        use_cpu=device == "cpu",
        bf16=bf16,
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = CoralTrainer(make_drafter(target), target, arguments, train_dataset=rows)
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


@on_every_device
def test_a_bf16_step_has_nearly_the_float32_loss(device, tmp_path):
    exact = train_a_step(tmp_path / "exact", "cpu", bf16=False)
    assert train_a_step(tmp_path / "bf16", device, bf16=True) == pytest.approx(exact, rel=0.03)


@on_every_device
def test_regeneration_is_greedy_decoding(device, tmp_path):
    target, tokenizer = make_target().to(device), make_tokenizer()
    prompts = [{"id": str(i), "turns": [chr(65 + i) * (3 + 5 * i)]} for i in range(7)]
    regenerate(target, tokenizer, prompts, tmp_path / "out.jsonl", max_new_tokens=12, slots=4, progress=False)
    for row in iter_responses(tmp_path / "out.jsonl"):
        ids = torch.tensor([row["prompt_ids"]], device=device)
        plain = generate(target, ids, {}, max_new_tokens=12)
        assert plain[0, ids.shape[1] :].tolist() == row["response_ids"]
