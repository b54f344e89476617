"""Estimates the cost of training a drafter from the target's config, without its weights.

python benchmarks/estimate_training.py --target examples/recipes/llama-3-8b-instruct.config.json --tokens 40000000 \
    --flops_per_second 4e14
Missing settings are those that `coral-hf train` would choose on an accelerator. Every figure is an estimate. To measure two
real steps instead, use `coral-hf train --estimate`.
"""

import json
from dataclasses import asdict, dataclass, field

from transformers import AutoConfig

from coral_hf.commands.outputs import check_output_file
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.training.recipe import choose_recipe, drafter_settings
from coral_hf.training.report.estimate import estimate_on_paper


@dataclass
class ScriptArguments:
    target: str = field(metadata={"help": "Hub id, folder or config.json of the target."})
    tokens: int = field(metadata={"help": "Tokens in the data, including prompts."})
    epochs: float | None = field(default=None, metadata={"help": "Passes over the data."})
    batch_size: int | None = field(default=None, metadata={"help": "Conversations in a micro-batch on one device."})
    length: int = field(default=2048, metadata={"help": "Longest conversation in tokens."})
    activation_checkpointing: bool = field(default=False, metadata={"help": "As in training."})
    rollout_steps: int | None = field(default=None, metadata={"help": "K, the deepest."})
    tokens_per_second: float | None = field(default=None, metadata={"help": "Speed of all devices together."})
    flops_per_second: float | None = field(default=None, metadata={"help": "Or: FLOP/s that they reach in practice."})
    json: str | None = field(default=None, metadata={"help": "Write the figures here too."})


def main() -> None:
    (script,) = parse_script(ScriptArguments)
    check_output_file(script.json)
    config = AutoConfig.from_pretrained(script.target)
    settings = {
        "batch_size": script.batch_size,
        "length": script.length,
        "num_steps": script.rollout_steps,
        "tokens": script.tokens,
        "epochs": script.epochs,
        "tokens_per_second": script.tokens_per_second,
        "flops_per_second": script.flops_per_second,
    }
    estimate = estimate_on_paper(config, **settings, activation_checkpointing=script.activation_checkpointing)
    print(f"Estimate for {script.target}:", *estimate.lines(), sep="\n")
    if script.json is not None:
        text = config.get_text_config()
        recipe = choose_recipe(
            text.hidden_size, text.vocab_size, response_tokens=script.tokens, device_type="cuda"
        ).to_dict()
        checkpointed = estimate_on_paper(config, **settings, activation_checkpointing=True).memory["peak"]
        record = {**asdict(estimate), "hours": estimate.hours, "peak_with_activation_checkpointing": checkpointed}
        record |= {"drafter": drafter_settings(config), "recipe": recipe}
        given = {name: value for name, value in asdict(script).items() if name != "json"}
        with open(script.json, "w") as file:
            json.dump({**record, "settings": given}, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    run_script(main)
