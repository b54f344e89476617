"""Unmodified libraries that call `generate`, with an attached drafter: they draft, and the results are the same.

They are installed by `scripts/library_environment.sh`; a test is skipped where its library is missing. CI has lm-eval.
"""

import json

import pytest
import torch

import coral_hf
from coral_hf import demo
from coral_hf.generation import hook


pytestmark = [pytest.mark.real_model, pytest.mark.slow]

QUESTIONS = [f"What is {first} plus {second}?" for first in (2, 3) for second in range(4, 9)]


@pytest.fixture(scope="module")
def pair():
    """The demo pair in float32: target, tokenizer, drafter."""
    target, tokenizer = demo.load_target(torch.float32)
    return target, tokenizer, demo.load_drafter(torch.float32)


class Accepted:
    """Attaches a drafter, and counts the calls that draft and the tokens that were accepted in them."""

    def __init__(self, target, drafter):
        self.attachment, self.drafter = coral_hf.attach(target, drafter, draft_depth=3, draft_top_k=1), drafter
        self.calls = self.count = 0

    def __enter__(self):
        self.decode = hook.coral_decoding
        hook.coral_decoding = self.counted
        return self

    def counted(self, *args, **kwargs):
        output = self.decode(*args, **kwargs)
        self.calls, self.count = self.calls + 1, self.count + self.drafter.last_stats.n_accepted
        return output

    def __exit__(self, *_):
        hook.coral_decoding = self.decode
        coral_hf.detach(self.attachment.target)


def chats(tokenizer):
    """The questions in the target's chat template."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in QUESTIONS
    ]


def test_lm_eval(pair, tmp_path, monkeypatch):
    """A local task of ten rows in batches of four."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: scripts/library_environment.sh")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    target, tokenizer, drafter = pair
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": question, "answer": "a number"} for question in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "bypass", "aggregation": "bypass", "higher_is_better": True}],
    }
    (tmp_path / "sums.yaml").write_text(json.dumps(task))  # JSON is YAML

    def answers():
        model = HFLM(pretrained=target, tokenizer=tokenizer, batch_size=4)
        manager = TaskManager(include_path=str(tmp_path))
        found = lm_eval.simple_evaluate(model=model, tasks=["sums"], task_manager=manager, bootstrap_iters=0)
        return [sample["resps"] for sample in sorted(found["samples"]["sums"], key=lambda sample: sample["doc_id"])]

    plain = answers()
    with Accepted(target, drafter) as accepted:
        assert answers() == plain
    assert accepted.calls == 3 and accepted.count > 0


def test_langchain(pair):
    library = pytest.importorskip(
        "langchain_huggingface", reason="needs langchain-huggingface: scripts/library_environment.sh"
    )
    from transformers import pipeline

    target, tokenizer, drafter = pair
    settings = {"max_new_tokens": 16, "do_sample": False, "return_full_text": False, "batch_size": 4}
    chain = library.HuggingFacePipeline(pipeline=pipeline("text-generation", model=target, tokenizer=tokenizer))
    plain = chain.batch(chats(tokenizer)[:4], pipeline_kwargs=settings)
    with Accepted(target, drafter) as accepted:
        assert chain.batch(chats(tokenizer)[:4], pipeline_kwargs=settings) == plain
    assert accepted.count > 0


def test_pipeline_in_batches(pair):
    from transformers import pipeline

    target, tokenizer, drafter = pair
    pipe = pipeline("text-generation", model=target, tokenizer=tokenizer)
    settings = {"max_new_tokens": 16, "do_sample": False, "return_full_text": False, "batch_size": 4}
    plain = pipe(chats(tokenizer), **settings)
    with Accepted(target, drafter) as accepted:
        assert pipe(chats(tokenizer), **settings) == plain
    assert accepted.count > 0


def test_grpo(pair, tmp_path):
    """Two steps of TRL's trainer, which changes the drafter's target."""
    trl = pytest.importorskip("trl", reason="needs trl: scripts/library_environment.sh")
    from datasets import Dataset

    _, tokenizer, drafter = pair
    target, _ = demo.load_target(torch.float32)
    before = target.get_input_embeddings().weight.detach().clone()
    args = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=12,
        max_steps=2,
        use_vllm=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        bf16=False,
        learning_rate=1e-5,
    )
    trainer = trl.GRPOTrainer(
        model=target,
        reward_funcs=lambda completions, **_: [float(len(completion)) for completion in completions],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": question} for question in QUESTIONS]),
        processing_class=tokenizer,
    )
    with Accepted(target, drafter) as accepted:
        trainer.train()
    assert accepted.calls == 2 and accepted.count > 0
    assert not torch.equal(before, target.get_input_embeddings().weight)
