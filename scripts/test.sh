#!/usr/bin/env bash
# Runs the tests, from nothing: makes .venv, installs requirements-dev.txt, calls pytest.
#
#   bash scripts/test.sh [pytest arguments]     for instance: -k losses, or -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

use_venv requirements-dev.txt
exec python -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
