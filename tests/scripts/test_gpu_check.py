"""`scripts/gpu_check.sh` at small size on a CPU: every part writes its files, and is not repeated."""

import json
import os
import runpy
import subprocess

import pytest
import torch
from helpers.scripts import BENCHMARKS
from helpers.trees import tree_of


SCRIPT = BENCHMARKS.parent / "scripts" / "gpu_check.sh"


@pytest.mark.slow
def test_all_parts_at_small_size_and_nothing_twice(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run():
        command = ["bash", str(SCRIPT), str(tmp_path), "--small"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert found["tests"]["status"] == 0 and not found["tests"]["failed"]
    assert found["training"]["K"] == 3 and found["training"]["tokens_per_second"] > 0
    cells = {name: cell for name, cell in found.items() if name.startswith("steps_")}
    assert len(cells) == 6 and all(cell["ms_per_step"] > 0 for cell in cells.values())
    for name, cell in cells.items():
        assert (cell["tokens_per_step"] > 1) == ("tree" in name) and (cell["compile_seconds"] > 0.1) == cell[
            "compiled"
        ]
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    again = run()
    assert again.returncode == 0 and "all 6 cells are measured" in again.stdout and "tests: exists" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == files


def test_the_oracle_accepts_its_share():
    accepting = runpy.run_path(str(BENCHMARKS / "gpu_check.py"))["accepting"]
    from coral_hf.generation.tokens import token_choice

    tree = tree_of([5, 6, 7, 8], [-1, 0, 0, 1])
    accepted = 0
    with accepting(0.75):
        for _ in range(400):
            paths, tokens = token_choice.accept_greedy(tree, torch.tensor([[50, 60, 70, 80]]))
            assert (paths[0], tokens[0]) in [([0], [50]), ([0, 1], [6, 60]), ([0, 1, 3], [6, 8, 80])]
            accepted += len(paths[0]) - 1
    assert accepted / 400 == pytest.approx(0.75 + 0.75**2, abs=0.1)
    assert token_choice.accept_greedy(tree, torch.tensor([[50, 60, 70, 80]]))[1] == [[50]]
