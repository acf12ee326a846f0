#!/usr/bin/env bash
# Compares the training step with TRL's, from nothing: makes .venv and .venv-peers, then calls
# compare.py beside it, which says what is measured.
#
#   bash scripts/benchmarks/compare.sh [cpu|gpu] [OUT] [flags of compare.py]     for instance: cpu runs/c --only=a
#
# Compute nodes often have no network. Where there is one, pack; carry the checkout and the folder
# over, unless both machines share a disk; there, name the folder:
#
#   bash scripts/benchmarks/compare.sh pack gpu WHEELS
#   WHEELS=WHEELS bash scripts/benchmarks/compare.sh gpu runs/compare
#
# Wheels are made for the Python and the processor of the machine that packs; PYTHON=python3.12 names
# another interpreter than the one found.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/venv.sh

pack=''
if [ "${1:-}" = pack ]; then pack=yes && shift; fi
suite=${1:-cpu}
case $suite in
  cpu) ours=requirements.txt peers=requirements-peers.txt ;;
  gpu) ours=requirements-gpu.txt peers=requirements-peers-gpu.txt ;;
  *) fail "the suite is cpu or gpu, not $suite" ;;
esac

if [ -n "$pack" ]; then
  [ $# -le 2 ] || fail "bash scripts/benchmarks/compare.sh pack $suite WHEELS takes no more arguments"
  wheels=${2:-wheels-$suite}
  pack_wheels "$wheels" "$ours" "$peers"
  say "There: WHEELS=$wheels bash scripts/benchmarks/compare.sh $suite"
  exit
fi

out=${2:-runs/compare-$suite}
case $out in -*) fail "the folder comes before flags: bash scripts/benchmarks/compare.sh $suite OUT $out" ;; esac
shift $(($# < 2 ? $# : 2))
(use_venv "$peers" .venv-peers)
use_venv "$ours"
run python scripts/benchmarks/compare.py --suite="$suite" --out="$out" "$@"
