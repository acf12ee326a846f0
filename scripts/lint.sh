#!/usr/bin/env bash
# Checks style, format and types, from nothing: makes .venv, installs requirements-dev.txt, then runs
# ruff and pyright. All three run, whichever of them finds something; none may report anything.
#
#   bash scripts/lint.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

failed=''
check() { run "$@" || failed="$failed${failed:+, }$*"; }

use_venv requirements-dev.txt
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1 # it is pinned, so a newer one is no news
check ruff check
check ruff format --check
check pyright --warnings
[ -z "$failed" ] || fail "lint: $failed; see above"
say "lint: nothing to report"
