"""
Runs a selection of the tests in one environment per combination of Python, torch and Transformers.

    python scripts/run_matrix.py                                     # this Python, its torch, Transformers' floor and newest
    python scripts/run_matrix.py --select full --torch 2.13.0 --python python3.10 python3.12
    python scripts/run_matrix.py --list quick                        # the files of a selection, for .ci/run
    python scripts/run_matrix.py --requirement transformers floor    # what pip is asked for, for .ci/run

Environments are kept under `--environments` and reused. `--transformers` and `--torch` take versions, `floor` (the lowest that
pyproject.toml allows) and `newest`. On Linux, `pip install torch` downloads the large CUDA build unless a CPU wheel of that
version is available (`PIP_FIND_LINKS`). By default, the matrix therefore keeps this interpreter's torch version.
"""

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
SELECTIONS = {
    # Two to three minutes on one core: the tests that fail first with another release.
    "quick": [
        *(
            "test_imports.py",
            "utils/test_compat.py",
            "generation/key_values/test_dynamic.py",
            "generation/test_lossless.py::test_families",
        ),
        *(
            "generation/test_lossless.py::test_continuing_a_conversation",
            "generation/test_lossless.py::test_returned_dict",
        ),
        *("generation/test_prefill.py::test_prefilled_cache", "training/test_trainer.py::test_two_epochs"),
        *(
            "responses/test_regenerate.py",
            "responses/test_response_files.py",
            "generation/key_values/test_slot_cache.py",
        ),
    ],
    "generation": [
        *(
            "utils/test_compat.py",
            "generation/key_values/test_dynamic.py",
            "generation/test_lossless.py",
            "generation/test_target_kinds.py",
            "generation/test_generate_features.py",
            "generation/test_prefill.py",
        ),
        *(
            "generation/test_generate_bad_input.py",
            "generation/key_values/test_kept_rows.py",
            "generation/test_rope_limits.py",
            "drafter/test_modeling_coral.py",
            "drafter/test_rollout.py",
            "drafter/test_target_adapter.py",
        ),
        "test_real_model.py",
    ],
    "training": [
        "training/test_trainer.py",
        "training/test_trainer_inputs.py",
        "training/test_trainer_evaluation.py",
        "training/test_checkpoints.py",
        "training/test_checkpoint_refusals.py",
        "training/test_feature_cache.py",
        *(
            "responses/test_regenerate.py",
            "responses/test_response_files.py",
            "generation/key_values/test_slot_cache.py",
        ),
        "training/test_adapters.py",
    ],
    "publishing": [
        "hub/test_hub.py",
        "test_demo.py",
        "examples/test_examples.py",
        "conversion/test_conversion.py",
        "commands/test_cli.py",
    ],
    "full": [],
}


def files_of(selection: str) -> list[str]:
    """Paths (and test ids) from the root; the whole folder for `full`."""
    return [f"tests/{name}" for name in SELECTIONS[selection]] or ["tests"]


def requirement(package: str, version: str) -> str:
    """The requirement for pip: `floor` is the lowest version of pyproject.toml, `newest` the range itself."""
    specifier = re.search(rf'"{package}(>=([\d.]+)[^"]*)"', (ROOT / "pyproject.toml").read_text())
    if version == "newest":
        return package + specifier[1]
    return f"{package}=={specifier[2] if version == 'floor' else version}"


def prepare(python: str, torch: str, transformers: str, folder: Path) -> Path:
    """Makes or completes the environment of a combination and returns its interpreter."""
    environment = folder / "-".join([Path(python).name, f"torch{torch}", f"transformers{transformers}"])
    interpreter = environment / "bin" / "python"
    if not interpreter.exists():
        subprocess.run([python, "-m", "venv", str(environment)], check=True)
    install = [str(interpreter), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    # torch first, because pip may prefer another build if it resolves torch together with the rest
    subprocess.run([*install, requirement("torch", torch)], check=True)
    subprocess.run([*install, "-e", ".[dev]", requirement("transformers", transformers)], check=True, cwd=ROOT)
    return interpreter


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=[sys.executable])
    parser.add_argument("--torch", nargs="+", default=None, help="default: the version of this interpreter, or 2.13.0")
    parser.add_argument("--transformers", nargs="+", default=["floor", "newest"])
    parser.add_argument("--select", choices=SELECTIONS, default="quick")
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "environments")
    parser.add_argument("--list", choices=SELECTIONS, help="print the files of a selection and stop")
    parser.add_argument(
        "--requirement", nargs=2, metavar=("PACKAGE", "VERSION"), help="print what pip is asked for and stop"
    )
    arguments = parser.parse_args()
    if arguments.requirement:
        print(requirement(*arguments.requirement))
        return 0
    if arguments.list:
        print(*files_of(arguments.list))
        return 0
    if arguments.torch is None:
        try:
            arguments.torch = [importlib.metadata.version("torch").split("+")[0]]
        except importlib.metadata.PackageNotFoundError:
            arguments.torch = ["2.13.0"]
    results = {}
    for python in arguments.python:
        for torch in arguments.torch:
            for transformers in arguments.transformers:
                name = f"{Path(python).name}, torch {torch}, transformers {transformers}"
                try:
                    interpreter = prepare(python, torch, transformers, arguments.environments)
                except (OSError, subprocess.CalledProcessError) as error:
                    results[name] = f"no environment: {error}"
                    continue
                command = [str(interpreter), "-m", "pytest", "-m", "", *files_of(arguments.select)]
                status = subprocess.run(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode
                results[name] = "passed" if status == 0 else f"failed (pytest's status {status})"
    for name, result in results.items():
        print(f"{name}: {result}")
    return int(any(result != "passed" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
