#!/usr/bin/env bash
# A virtual environment with the libraries that call `generate` themselves, for tests/libraries:
#     scripts/library_environment.sh FOLDER && FOLDER/bin/python -m pytest -n 0 -m "" tests/libraries
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: scripts/library_environment.sh FOLDER"; exit 2; }
case "$1" in -h | --help) sed -n 2,3p "$0"; exit 0 ;; esac
cd "$(dirname "$0")/.."
python3 -m venv "$1"
# The version whose CPU wheel is taken where one is at hand, as in .ci/run.
"$1/bin/python" -c "import torch" 2>/dev/null || "$1/bin/pip" install -q torch==2.13.0
"$1/bin/pip" install -q -e '.[dev]' lm-eval==0.4.13 trl==1.16.0 langchain-huggingface==1.2.3
