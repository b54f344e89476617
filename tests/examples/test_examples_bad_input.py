"""Users' mistakes in the examples end with one line and status 2, before the work."""

import pytest
from helpers.scripts import BENCHMARKS, refused, run


def test_users_errors_are_one_line(tmp_path, monkeypatch, capsys):
    times = ["--plain_ms", "10", "--verify_ms", "15", "--draft_ms", "5"]
    with refused(capsys, "predict_speedup.py: acceptance_per_depth=[80.0, 75.0]: give shares from 0 to 1."):
        run(monkeypatch, "predict_speedup.py", *times, "--acceptance", "80", "75")
    (tmp_path / "broken.json").write_text("{")
    records = ["--tune", str(tmp_path / "broken.json"), "--benchmark", str(tmp_path / "gone.json")]
    with refused(capsys, f"predict_speedup.py: {tmp_path / 'broken.json'}: not valid JSON"):
        run(monkeypatch, "predict_speedup.py", *records)
    with refused(capsys, "chat.py: --target nowhere/at-all is not a folder here"):
        run(monkeypatch, "chat.py", "--target", "nowhere/at-all")
    with refused(capsys, "compare_runs.py: "):
        run(monkeypatch, "compare_runs.py", "--runs", str(tmp_path), str(tmp_path))


@pytest.mark.parametrize(
    ("name", "option", "others"),
    [
        ("ablate_training.py", "--output_dir", ["--data", "x", "--eval_data", "x"]),
        ("benchmark_head.py", "--json", []),
        ("benchmark_regeneration.py", "--json", ["--prompts", "x"]),
        ("benchmark_training.py", "--json", []),
        ("compare_heads.py", "--json", ["--drafter", "x", "--responses", "x", "--counts", "x"]),
        ("compare_runs.py", "--json", ["--runs", "x", "y"]),
        ("compare_tree_sizes.py", "--output", ["--data", "x"]),
        ("estimate_training.py", "--json", ["--target", "x", "--tokens", "1"]),
        ("finetune_for_my_model.py", "--output_dir", ["--data", "x"]),
        ("large_vocabulary.py", "--output", ["--data", "x", "--eval", "x"]),
        ("predict_from_bandwidth.py", "--json", []),
        ("predict_speedup.py", "--json", ["--tune", "x", "--benchmark", "x"]),
        ("refit_features.py", "--output", ["--layers", "1", "2", "--data", "x", "--drafter", "x"]),
        ("reproduce_tables.py", "--output", ["--data", "x"]),
        ("train_drafter.py", "--output_dir", ["--data", "x"]),
    ],
)
def test_where_nothing_can_be_written_is_told_first(name, option, others, tmp_path, monkeypatch, capsys):
    """Before anything is loaded: none of the other files exists."""
    if name == "finetune_for_my_model.py":
        pytest.importorskip("peft")
    (tmp_path / "file").touch()
    monkeypatch.syspath_prepend(BENCHMARKS)
    wrong = str(tmp_path if option == "--json" else tmp_path / "file" / "out")
    with refused(capsys, "is a folder; give" if option == "--json" else f"{tmp_path / 'file'} is a file; give"):
        run(monkeypatch, name, option, wrong, *others)
