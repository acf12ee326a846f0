#!/usr/bin/env bash
# Compares with transformers and peft, from nothing: makes .venv-parity with torch, calls pytest.
#
#   bash scripts/parity.sh [pytest arguments]     for instance: -k gemma
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

use_venv requirements-parity.txt .venv-parity
exec python -m pytest -m parity "$@"
