#!/usr/bin/env bash
# Compiles a small step for TPUs in every mode, without a TPU: tests/benchmarking/test_targets.py.
#
#   bash scripts/test_targets.sh
#
# Google's compiler (libtpu, 700 MB) goes into .libtpu, beside the environment and not into it: an
# environment that has it looks for TPUs whenever JAX starts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

use_venv requirements-dev.txt
# The version that the installed JAX asks for.
wanted=$(python -c 'import importlib.metadata, re
print(re.search(r"libtpu[=.*\d]+", " ".join(importlib.metadata.requires("jax")))[0])')
if [ "$(cat .libtpu/installed 2>/dev/null)" != "$wanted" ]; then
  say "Installing $wanted into .libtpu (700 MB)"
  pip_install python --no-deps --upgrade --target .libtpu "$wanted" ||
    fail "pip could not install $wanted; is there a network, and room on the disk?"
  echo "$wanted" >.libtpu/installed
fi
PYTHONPATH=$PWD/.libtpu exec python -m pytest -n 0 -m slow tests/benchmarking/test_targets.py "$@"
