"""The card: figures come from records of this very drafter, and the committed one is the command's output."""

import json
from pathlib import Path

import pytest
import torch
from helpers.records import ENVIRONMENT, add_record, make_record
from helpers.tiny_models import make_drafter, make_target
from huggingface_hub import ModelCard

from coral_hf import CoralDraftModel
from coral_hf.cli import main
from coral_hf.drafter.weight_files import drafter_sha256, file_sha256
from coral_hf.evaluation.environment import describe_drafter
from coral_hf.hub.card_tables import _draft
from coral_hf.hub.model_card import render_card, write_card
from coral_hf.hub.records import read_records
from coral_hf.hub.training_tables import STORY_FILE, training_story


MODEL_CARDS = Path(__file__).parents[2] / "model_cards"


@pytest.mark.parametrize("name", sorted(path.name for path in MODEL_CARDS.iterdir()))
def test_committed_card_is_the_output_of_the_command(name):
    """When its records change: `coral-hf card model_cards/NAME`."""
    folder = MODEL_CARDS / name
    committed = (folder / "README.md").read_bytes()
    assert training_story(read_records(folder)) == (folder / "training" / STORY_FILE).read_text()
    assert committed == render_card(folder).encode() == render_card(folder).encode()
    ModelCard(committed.decode())


def test_the_shipped_drafter_published_is_the_repositorys():
    """Not the package's own copy. If its text names a file that is not pushed, it says where the file is."""
    folder = MODEL_CARDS / "smollm2-135m-instruct-coral"
    here, there = render_card(folder), render_card(folder, repo_id="org/copy")
    assert "demo.load_drafter(" in here and "org/copy" not in here
    assert "demo.load_drafter(" not in there and "$drafter" not in there
    snippet = there.split("```python\n")[1].split("```")[0]
    assert 'AutoModel.from_pretrained("org/copy", dtype=target.dtype)' in snippet
    compile(snippet, "card", "exec")
    assert "model_cards/smollm2-135m-instruct-coral/responses`" in there
    stated = json.loads((folder / "training" / "card.json").read_text())
    assert "`responses/`" not in " ".join([stated["data"], *stated["limits"]])


def test_figures_are_the_records(folder, capsys):
    add_record(folder)
    assert main(["card", str(folder)]) == 0
    path = folder / "README.md"
    assert capsys.readouterr().out.strip() == str(path)
    first = path.read_bytes()
    assert main(["card", str(folder)]) == 0
    assert path.read_bytes() == first
    text = first.decode()
    assert "| `coral` | gsm8k (10) | 2.35 | 80%, 65% | 1.62x (1.52 to 1.72) | 9 of 10 |" in text
    assert "| `lookup` | gsm8k (10) | not measured | not measured | 1.10x (1.00 to 1.20) | 9 of 10 |" in text
    assert "chain of 3 nodes" in text
    for value in ("Abacus 3000", "bfloat16", "2 CPU threads", "torch 2.13.0", "commit 0123456789ab"):
        assert value in text
    assert "float32 on real prompts: not measured" in text
    data = ModelCard(text).data
    assert data.base_model == "org/target" and data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation" and "coral" in data.tags
    values = {(result.dataset_type, result.metric_type): result.metric_value for result in data.eval_results}
    assert values[("gsm8k", "acceptance_length")] == 2.35 and values[("all", "speedup")] == 1.5


def test_names_with_a_bar_keep_the_table(folder):
    row = {**make_record(None)["runs"][1], "method": "a|b", "benchmark": "left|right\nbelow"}
    add_record(folder, runs=[row], draft_settings={"a|b": make_record(None)["draft_settings"]["coral"]}, methods={})
    text = render_card(folder)
    assert "| `a\\|b` | left\\|right below (10) | 2.35 |" in text
    assert ModelCard(text).data.eval_results[0].dataset_type == "left|right\nbelow"


def test_a_benchmark_of_several_drafters_gives_each_its_own(folder):
    digest = file_sha256(folder / "model.safetensors")
    rows = make_record(None)["runs"]
    runs = [
        {**row, "method": f"{name}/coral"} for name in ("other", "own") for row in rows if row["method"] == "coral"
    ]
    runs = [row if row["method"] == "own/coral" else {**row, "speedup": 9.87} for row in runs]
    runs += [row for row in rows if row["method"] == "lookup"]
    drafters = {"other/coral": {"drafter_sha256": "f" * 64}, "own/coral": {"drafter_sha256": digest}}
    methods = {name: {} for name in drafters}
    add_record(folder, digest=None, runs=runs, drafters=drafters, methods=methods, draft_settings={})
    text = render_card(folder)
    assert "`own/coral` | gsm8k (10) | 2.35" in text and "`lookup` | gsm8k" in text
    assert "other/coral" not in text and "9.87" not in text
    assert {row.metric_value for row in ModelCard(text).data.eval_results} == {2.35, 1.62, 2.22, 1.5}


def test_other_records(folder):
    """Stated facts, commands, log, training runs, identity checks and settings side by side."""
    add_record(folder)
    add_record(folder, "benchmark_methods.json")
    digest = file_sha256(folder / "model.safetensors")
    training = folder / "training"
    check = {
        "n_prompts": 40,
        "n_turns": 40,
        "identical": 40,
        "acceptance_length": {"all": 1.519},
        "settings": {"draft_top_k": 1},
        "sampled": [{"temperature": 1.0, "n_turns": 40, "identical": 39}],
        "max_new_tokens": 128,
        "environment": ENVIRONMENT,
        "drafter_sha256": digest,
    }
    (training / "check_float32.json").write_text(json.dumps(check))
    heads = {"environment": ENVIRONMENT, "drafter_sha256": digest, "curve": []}
    heads["curve"] = [{"head": "router", "active_share": 0.0625, "uncovered": 0.1234, "recall": 0.9}]
    (training / "compare_heads.json").write_text(json.dumps(heads))
    rows = [
        {"response_tokens_seen": 1000 * step, "eval_acceptance_length": 1 + step / 20, "eval_acceptance_1": 0.5}
        for step in range(1, 20)
    ]
    (training / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (training / "commands.sh").write_text("coral-hf train\n")
    stated = {"license": "mit", "datasets": ["org/data"], "limits": ["It only knows verse."], "title": "Poet"}
    (training / "card.json").write_text(json.dumps(stated))
    text = render_card(folder)
    assert text.count("1.62x") == 1  # per benchmark in the first record only
    assert "Sampled with the same seed at temperature 1: 39 of 40. Tau:" in text
    assert "Identity: 40 of 40" in text and "all 1.52" in text
    assert "| router | 6.2% | 12.3% | 90.0% |" in text
    assert "- It only knows verse." in text and "# Poet" in text
    assert f"(training/{STORY_FILE})" in text and "coral-hf train" not in text
    story = training_story(read_records(folder))
    assert "| 1,000 | 1.05 | 50% |" in story and "| 19,000 | 1.95 | 50% |" in story and story.count("| 50% |") == 8
    assert "coral-hf train" in story
    data = ModelCard(text).data
    assert data.license == "mit" and data.datasets == ["org/data"]


def test_ablation(folder):
    add_record(folder)
    record = {
        "environment": ENVIRONMENT,
        "runs": [
            {"variant": "hass", "seed": seed, "steps": 138, "eval_acceptance_length": tau}
            for seed, tau in enumerate((1.31047, 1.33446))
        ],
        "response_tokens": 200_082,
        "chain_depth": 5,
        # rounded already, as the script writes it: once more would give 1.323 and 1.335
        "acceptance_length": {"hass": {"mean": 1.3225, "stdev": 0.017, "values": [1.3105, 1.3345]}},
    }
    path = folder / "training" / "ablation.json"
    path.write_text(json.dumps(record))
    text = training_story(read_records(folder))
    assert "| `hass` | 1.322 | 0.017 | 1.310, 1.334 |" in text and "200,082 response tokens for 138 steps" in text
    path.write_text(json.dumps(record | {"runs": [{**record["runs"][0], "eval_acceptance_length": "high"}]}))
    with pytest.raises(ValueError, match=r"ablation\.json is not in coral_hf.s format"):
        render_card(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: None, "contains no benchmark.json: measure this drafter with `coral-hf benchmark"),
        (lambda folder: add_record(folder, digest="f" * 64), "measured another drafter"),
        (
            lambda folder: add_record(folder, digest=None),
            "benchmark.json that says which drafter it measured: measure",
        ),
        (
            lambda folder: add_record(folder, digest=None, drafters={"coral": {"drafter_sha256": "f" * 64}}),
            "measured another drafter",
        ),
        (lambda folder: add_record(folder, "benchmark_b.json", digest="f" * 64), "benchmark_b.json"),
        (lambda folder: add_record(folder, partial=True), "is incomplete"),
        (lambda folder: (folder / "training" / "benchmark.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "training" / "benchmark.json").write_text("[]"), "JSON object"),
        (lambda folder: (folder / "training" / "card.json").write_text('{"tau": 9}') and add_record(folder), "'tau'"),
        (lambda folder: (folder / "model.safetensors").unlink(), "contains no model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "contains no config.json"),
        (
            lambda folder: (folder / "config.json").write_text("Infinity") and add_record(folder),
            "JSON object, got 'inf'",
        ),
        (lambda folder: (folder / "config.json").write_text('{"dtype": [1]}') and add_record(folder), "dtype='[1]'"),
    ],
)
def test_refused(folder, spoil, message, capsys):
    spoil(folder)
    assert main(["card", str(folder)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (folder / "README.md").exists()


def test_unmeasured(folder):
    """Without a record on request; a record without a hash may be of any drafter."""
    assert main(["card", str(folder), "--unmeasured", "true"]) == 0
    text = (folder / "README.md").read_text()
    assert "| all | not measured | not measured |" in text and "model-index" not in text
    add_record(folder, digest=None)
    text = render_card(folder, unmeasured=True)
    assert "does not say which drafter it measured" in text and "2.35" not in text
    add_record(folder, digest="f" * 64)
    text = render_card(folder, strict=False)
    assert "measured another drafter: its figures are not shown" in text and "2.35" not in text


def test_what_is_cut_off_or_damaged_can_be_left_out(folder):
    """As at the end of a training: the card is written, and says what is missing."""
    add_record(folder, partial=True)
    for name in ("benchmark_b.json", "check_a.json", "ablation.json", "training-1.json"):
        (folder / "training" / name).write_text("{")
    text = write_card(folder, unmeasured=True, strict=False).read_text()
    assert text.count("is damaged or incomplete: it is left out.") == 5
    assert "2.35" not in text and "| all | not measured | not measured |" in text


def test_no_path_of_a_machine(folder, tmp_path):
    drafter = CoralDraftModel.from_pretrained(folder)
    drafter.config.target_name_or_path = str(tmp_path / "target")
    drafter.save_pretrained(folder)
    write_card(folder, unmeasured=True)
    assert str(tmp_path) not in (folder / "README.md").read_text()
    assert describe_drafter(CoralDraftModel.from_pretrained(folder))["drafter"] == "drafter"


def test_what_may_be_a_folder_is_no_link(folder):
    """`models/my-llama` on another machine looks like a Hub id, but has no revision."""
    assert "https://huggingface.co/org/target" in render_card(folder, unmeasured=True)
    drafter = CoralDraftModel.from_pretrained(folder)
    drafter.config.target_name_or_path, drafter.config.target_revision = "models/my-llama", None
    drafter.save_pretrained(folder)
    text = render_card(folder, unmeasured=True)
    assert "models/my-llama" not in text and ModelCard(text).data.base_model is None


def test_hash_is_of_the_weights_in_use(folder):
    digest = file_sha256(folder / "model.safetensors")
    drafter = CoralDraftModel.from_pretrained(folder)
    assert drafter_sha256(drafter) == drafter_sha256(drafter.bfloat16()) == digest
    with torch.no_grad():
        drafter.norm.weight.add_(1.0)
    assert drafter_sha256(drafter) is None
    assert drafter_sha256(make_drafter(make_target(dtype=torch.float32))) is None


def test_curve(folder, capsys):
    pytest.importorskip("matplotlib")
    assert main(["card", str(folder), "--unmeasured", "true", "--curve", "true"]) == 2
    assert "no evaluation" in capsys.readouterr().err
    rows = [{"response_tokens_seen": 1000 * step, "eval_acceptance_length": 1.5} for step in (1, 2)]
    (folder / "training" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pictures = []
    for _ in range(2):
        assert main(["card", str(folder), "--unmeasured", "true", "--curve", "true"]) == 0
        pictures.append((folder / "training" / "curve.png").read_bytes())
    assert pictures[0] == pictures[1]
    assert "(training/curve.png)" in (folder / "README.md").read_text()


def test_says_which_draft_was_sized_by_costs():
    settings = {"draft_depth": 8, "draft_top_k": 3, "draft_total_tokens": 16, "draft_cost_aware": True}
    record = {"draft_settings": {"coral": settings}}
    config = CoralDraftModel.from_target(make_target()).config
    config.draft_depth, config.draft_top_k, config.draft_total_tokens = 8, 3, 16
    text = "tree of up to 16 nodes, the root included, depth 8, 3 branches per node, head: default, size chosen at every step "
    assert _draft(record, "coral", config) == text + "from measured costs"
    config.draft_cost_aware = True
    assert _draft(record, "coral", config).endswith("costs (the drafter's default)")
