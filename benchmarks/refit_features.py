"""Makes a drafter read other layers of its target without training it again, so that a serving engine supports it.

coral-hf convert --to sglang outputs/drafter outputs/for-sglang     # names the layers that SGLang cannot capture
python benchmarks/refit_features.py --drafter outputs/drafter --layers 3 15 26 29 --data responses/ --output outputs/refitted

The script fits a new `fc` by least squares, on conversations with the target, so that its output from the new layers equals
that of the old `fc` from its layers. The rest of the drafter stays unchanged. It prints the share of the old output's
variance that is not reproduced on held-out rows. Below 1 %, the acceptance length hardly changes; measure it with `coral-hf
benchmark`. Calibrations and heads are kept.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch

from coral_hf import CoralDraftModel, TargetAdapter
from coral_hf.commands.loading import DEMO, load_drafter, load_target
from coral_hf.commands.outputs import check_output_folder
from coral_hf.commands.scripts import parse_script, run_script
from coral_hf.data.dataset import ConversationDataset, read_rows


HELD_OUT = 8  # every eighth row is used to measure the fit
RIDGE = 1e-4  # relative to each feature's mean square, because some channels of residual streams are nearly equal


@dataclass
class ScriptArguments:
    drafter: str = field(metadata={"help": "Folder or Hub id of an eagle3 drafter of several features, or 'demo'."})
    layers: list[int] = field(metadata={"help": "Layers to read instead, as in target_feature_layers."})
    data: list[str] = field(metadata={"help": "Responses of the target."})
    output: str = field(metadata={"help": "Folder of the new drafter."})
    target: str = field(default=DEMO, metadata={"help": "Path or Hub id of the target, or 'demo'."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the target."})
    device: str | None = field(default=None, metadata={"help": "Device (default: the accelerator, else cpu)."})
    rows: int = field(default=500, metadata={"help": "Conversations to fit on, drawn at random."})
    max_length: int = field(default=1024, metadata={"help": "Longer conversations are cut to this many tokens."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads."})


@torch.no_grad()
def refit(drafter: CoralDraftModel, target, dataset, layers: list[int]) -> tuple[CoralDraftModel, float]:
    """A drafter that reads `layers`, and the share of the old `fc` output's variance that it misses on held-out rows.

    Raises:
        ValueError: if the drafter has no plain `fc` over several features, or `layers` has only one entry.
    """
    config = drafter.config
    if config.shape != "eagle3" or config.num_target_features < 2 or config.norm_before_fc or config.fc_norm:
        raise ValueError(
            f"shape={config.shape!r} with target_feature_layers={config.target_feature_layers}: only an eagle3 drafter of "
            "several features that are not normed before fc can be refitted; train one for these layers instead."
        )
    if len(layers) < 2:
        raise ValueError(f"layers={layers}: a single feature has no fc; name at least two layers.")
    settings = {**config.to_dict(), "target_feature_layers": layers}
    refitted = CoralDraftModel(type(config).from_dict(settings)).to(torch.float32)  # checks the layers
    adapter = TargetAdapter(target, [*layers, *config.target_feature_layers])
    width = len(layers) * adapter.hidden_size
    old = drafter.fc.weight.double()  # [H, m * H]
    squares = torch.zeros(width, width, dtype=torch.float64)  # products of the new features, summed over rows
    products = torch.zeros(width, config.hidden_size, dtype=torch.float64)
    held_out = []

    def split(features):
        """The new features `[S, n * H]`, and the old `fc`'s output from the old features `[S, H]`."""
        return features[:, :width].double(), features[:, width:].double() @ old.T

    for index in range(len(dataset)):
        item = dataset[index]
        features = adapter.compute_features(item["input_ids"][None].to(adapter.device))[0].cpu()
        features = features[1:]  # the first token's residual stream is a hundred times larger in many models
        if index % HELD_OUT == HELD_OUT - 1:
            held_out.append(features)
            continue
        new, wanted = split(features)
        squares += new.T @ new
        products += new.T @ wanted
    if not held_out:
        raise ValueError(f"{len(dataset)} rows to fit on: give at least {HELD_OUT}.")
    squares += torch.diag(RIDGE * squares.diagonal())
    fitted = torch.linalg.solve(squares, products).T  # [H, n * H]
    new, wanted = split(torch.cat(held_out))
    missed = (new @ fitted.T - wanted).square().sum() / (wanted - wanted.mean(dim=0)).square().sum()
    refitted.load_state_dict({**drafter.state_dict(), "fc.weight": fitted.float()})
    return refitted, missed.item()


def main() -> None:
    (script,) = parse_script(ScriptArguments)
    if script.threads:
        torch.set_num_threads(script.threads)
    if Path(script.output).exists():
        raise ValueError(f"{script.output} exists; name another folder.")
    check_output_folder(script.output)
    target, tokenizer = load_target(script.target, script.dtype, script.device)
    drafter = load_drafter(script.drafter)
    dtype = drafter.dtype
    rows = read_rows(script.data)
    rows = random.Random(0).sample(rows, min(script.rows, len(rows)))
    dataset = ConversationDataset(rows, tokenizer, max_length=script.max_length)
    refitted, missed = refit(drafter.float().cpu(), target, dataset, script.layers)
    refitted.to(dtype).save_pretrained(script.output)
    print(f"{script.output}: reads layers {script.layers}; {missed:.2%} of the old fc's output is not reproduced.")


if __name__ == "__main__":
    run_script(main)
