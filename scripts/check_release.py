"""
Builds sdist and wheel, installs the wheel in a separate environment and uses it there, outside the checkout.

    python scripts/check_release.py                    # a fresh environment with every core dependency
    python scripts/check_release.py --reuse-packages   # over this interpreter's packages: seconds, for CI

The sdist must build the same wheel, so that `pip install` works from either.
"""

import argparse
import os
import site
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path


ROOT = Path(__file__).parents[1]
# Data files of the package, whose absence no import would notice.
NEEDED = [
    "coral_hf/model_cards/smollm2-135m-instruct-coral/config.json",
    "coral_hf/model_cards/smollm2-135m-instruct-coral/model.safetensors",
    "coral_hf/hub/model_card_template.md",
    "coral_hf/hub/custom_generate/generate.py",
    "coral_hf/conversion/schemas.json",
]
USE = """
import tempfile
from importlib.metadata import version
from pathlib import Path
import torch
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM
import coral_hf
from coral_hf import CoralDraftModel, demo
from coral_hf.conversion.schema import load_schemas
from coral_hf.hub.publish import prepare_folder

assert Path(coral_hf.__file__).is_relative_to(Path(ENVIRONMENT)), coral_hf.__file__
assert load_schemas()
assert coral_hf.__version__ == version("coral-hf")
drafter = demo.load_drafter()
assert Path(demo.drafter_path()).is_relative_to(Path(ENVIRONMENT))
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
target = LlamaForCausalLM(config).eval()
small = CoralDraftModel.from_target(target)
ids = torch.tensor([[5, 6, 7]])
settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
assert torch.equal(target.generate(ids, **settings), target.generate(ids, assistant_model=small, **settings))
with tempfile.TemporaryDirectory() as folder:
    small.save_pretrained(folder)
    prepare_folder(folder)
    assert Path(folder, "README.md").is_file() and Path(folder, "modeling_coral.py").is_file()
    AutoModel.from_pretrained(folder)
print("used", version("coral-hf"), "from", Path(coral_hf.__file__).parent)
"""


def build(folder: Path) -> tuple[Path, Path]:
    """Sdist from the checkout, wheel from the sdist; checks what is in both."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True)
    [wheel], [sdist] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    missing = [name for name in NEEDED if name not in names]
    stray = [name for name in names if not name.startswith(("coral_hf/", "coral_hf-"))]
    if missing or stray:
        raise SystemExit(f"{wheel.name} lacks {missing} and should not contain {stray}")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    missing = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "tests/conftest.py"} - inside
    if missing:
        raise SystemExit(f"{sdist.name} lacks {sorted(missing)}")
    for path in (wheel, sdist):
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    return wheel, sdist


def use(wheel: Path, folder: Path, reuse_packages: bool) -> None:
    """Installs the wheel and runs its command line and `USE`, with the working directory elsewhere."""
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if reuse_packages:
        purelib = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        Path(purelib, "packages.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        install += ["--no-deps", "--force-reinstall"]
    subprocess.run([*install, str(wheel)], check=True)
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    run = {"check": True, "cwd": folder, "env": variables}
    subprocess.run([str(environment / "bin" / "coral-hf"), "--help"], **run, stdout=subprocess.DEVNULL)
    code = USE.replace("ENVIRONMENT", repr(str(environment.resolve())))
    subprocess.run([str(python), "-c", code], **run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reuse-packages", action="store_true", help="install nothing but the wheel")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel, _ = build(folder / "dist")
        use(wheel, folder, arguments.reuse_packages)
    print("the release works")


if __name__ == "__main__":
    main()
