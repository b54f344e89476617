"""`--drafter_revision`: the revision of a Hub drafter that a verb loads, and the refusals."""

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_drafter, make_target, make_tokenizer

from coral_hf import CoralDraftModel
from coral_hf.cli import main
from coral_hf.commands.loading import load_drafter
from coral_hf.drafter.weight_files import file_sha256


@pytest.fixture
def digests(hub, tmp_path, monkeypatch):
    """`org/drafter` with other weights on its branches `main` and `v2`, a target and prompts; returns the weights' hashes."""
    monkeypatch.chdir(tmp_path)
    target = make_target(dtype=torch.float32)
    target.save_pretrained("target")
    make_tokenizer().save_pretrained("target")
    Path("prompts.jsonl").write_text(json.dumps({"id": "p0", "turns": ["w1 w"]}) + "\n")
    found = {}
    for seed, branch in enumerate(("main", "v2")):
        make_drafter(target, seed=seed).save_pretrained(branch)
        hub.commit("org/drafter", {path.name: path.read_bytes() for path in Path(branch).iterdir()}, branch)
        found[branch] = file_sha256(Path(branch) / "model.safetensors")
    return found


MEASURE = [
    "--target",
    "target",
    "--data",
    "prompts.jsonl",
    "--max-new-tokens",
    "4",
    "--output",
    "out",
    "--device",
    "cpu",
]
RECORDS = {"verify": "check_coral.json", "benchmark": "benchmark.json", "tune": "tune.json"}


@pytest.mark.slow
@pytest.mark.parametrize("verb", list(RECORDS))
def test_the_revision_is_measured(verb, digests, monkeypatch):
    monkeypatch.setenv("CORAL_HF_CACHE", "costs")
    sizes = ["--draft_depth", "2", "--draft_top_k", "1", "--draft_total_tokens", "3"] if verb == "tune" else []
    for given, branch in (
        ([], "main"),
        (["--drafter_revision", "v2"], "v2"),
        (["--drafter-revision", "main"], "main"),
    ):
        assert (
            main([verb, *MEASURE, *sizes, "--dtype", "float32", "--drafter", "org/drafter", "--overwrite", *given])
            == 0
        )
        record = json.loads((Path("out") / RECORDS[verb]).read_text())
        assert (record["drafter"], record["drafter_sha256"]) == ("org/drafter", digests[branch])


def test_a_training_goes_on_from_the_revision(digests):
    rows = [{"prompt_ids": [5, 6, 7], "response_ids": [9, 8, 7, 6 + index]} for index in range(4)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ["train", "--target", "target", "--data", "rows.jsonl", "--dtype", "float32", "--report_to", "none"]
    train += ["--eval_rows", "0", "--output_dir", "trained", "--max_steps", "1", "--learning_rate", "0"]
    assert main([*train, "--drafter", "org/drafter", "--drafter_revision", "v2"]) == 0
    trained, v2 = (CoralDraftModel.from_pretrained(name).state_dict() for name in ("trained", "v2"))
    assert all(torch.equal(value, v2[name]) for name, value in trained.items())


def test_the_commit_is_known(hub, digests):
    for branch in ("main", "v2"):
        assert load_drafter("org/drafter", branch).config._commit_hash == hub.repos["org/drafter"]["branches"][branch]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", *MEASURE, "--drafter", "main"], "--drafter_revision v3: --drafter main is a folder, which has no"),
        (["verify", *MEASURE], "--drafter_revision v3 is for a drafter on the Hub, but 'demo' has only one version"),
        (["verify", *MEASURE, "--drafter", "org/drafter"], "under that id at --drafter_revision v3"),
        (["benchmark", *MEASURE, "--drafter", "org/drafter", "main"], "at --drafter_revision v3"),
        (
            ["train", "--data", "x", "--output_dir", "o"],
            "--drafter_revision v3 requires --drafter",
        ),
        (["demo"], "demo only runs the shipped pair"),
    ],
)
def test_what_has_no_such_revision_is_refused(arguments, message, digests, capsys):
    assert main([*arguments, "--drafter_revision", "v3"]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not Path("out").exists()
