#!/usr/bin/env bash
# Compares the training step with TRL's, from nothing: makes .venv and .venv-peers, then calls
# compare.py beside it, which says what is measured.
#
#   bash scripts/benchmarks/compare.sh [cpu|gpu] [OUT] [flags of compare.py]     for instance: cpu runs/c --only=a
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/venv.sh

suite=${1:-cpu}
out=${2:-runs/compare-$suite}
case $suite in
  cpu) ours=requirements.txt peers=requirements-peers.txt ;;
  gpu) ours=requirements-gpu.txt peers=requirements-peers-gpu.txt ;;
  *) fail "the suite is cpu or gpu, not $suite" ;;
esac
case $out in -*) fail "the folder comes before flags: bash scripts/benchmarks/compare.sh $suite OUT $out" ;; esac
shift $(($# < 2 ? $# : 2))
(use_venv "$peers" .venv-peers)
use_venv "$ours"
run python scripts/benchmarks/compare.py --suite="$suite" --out="$out" "$@"
