#!/usr/bin/env bash
# The whole project in minutes, from nothing: makes .venv, installs requirements.txt, then trains a
# small language model, samples from it, learns a reward's preferences by DPO, and measures the
# result against the best that is possible. Every command is shown before it runs.
#
#   bash scripts/quickstart.sh [DIR]            results go to DIR, runs/quickstart by default
#   SEED=1 bash scripts/quickstart.sh DIR       the same with other random numbers
#
# Given a DIR that it was stopped in (by Ctrl-C, say), it goes on there: what training has saved is
# not done again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

main() {
  local dir=${1:-runs/quickstart} seed=${SEED:-0} started status
  case $dir in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"; return ;; -*) fail "usage: bash scripts/quickstart.sh [DIR]" ;; esac
  # A run that is interrupted saves first; this line comes below what it prints.
  trap 'status=$?; [ "$status" != 130 ] || say "to go on: bash scripts/quickstart.sh $dir"' EXIT
  use_venv requirements.txt
  started=$(date +%s)

  step 1 "Texts of a small world: a grammar of reviews, prompts, and a word-level tokenizer"
  run python scripts/make_controlled.py --out="$dir/task" --seed="$seed"

  step 2 "The reference: a language model trained on those texts from nothing"
  run python -m dpo_jax.train --config=configs/controlled.py:sft --workdir="$dir/sft" \
    --config.model.tokenizer="$dir/task/tokenizer" --config.data.path="$dir/task/sft.jsonl" \
    --config.seed="$seed"

  step 3 "Preferences: two answers a prompt sampled from it, compared under the true reward"
  pairs "$dir/pairs_1.jsonl" --model="$dir/sft/export" --prompts="$dir/task/prompts.jsonl" \
    --limit=16000
  pairs "$dir/eval_pairs.jsonl" --model="$dir/sft/export" --prompts="$dir/task/eval_prompts.jsonl"

  step 4 "Direct Preference Optimization of that model on those pairs"
  dpo "$dir/dpo_1" --config.model.path="$dir/sft/export" --config.data.path="$dir/pairs_1.jsonl"

  step 5 "A second round: pairs of what the policy says now, beside the first, the reference as it was"
  pairs "$dir/pairs_2.jsonl" --model="$dir/dpo_1/export" --prompts="$dir/task/prompts.jsonl" \
    --skip=16000
  cat "$dir/pairs_1.jsonl" "$dir/pairs_2.jsonl" > "$dir/pairs.jsonl"
  dpo "$dir/dpo" --config.model.path="$dir/dpo_1/export" --config.data.path="$dir/pairs.jsonl" \
    --config.reference.path="$dir/sft/export" --config.train.epochs=1

  step 6 "What came out, against the best that is possible"
  run python scripts/evaluate.py --model="$dir/dpo/export" --reference="$dir/sft/export" \
    --data="$dir/eval_pairs.jsonl" --beta=2.5 --reward=controlled \
    --prompts="$dir/task/eval_prompts.jsonl" --out="$dir/summary.json" --seed="$seed" \
    --started="$started"
}

# pairs OUT FLAGS: two answers to every prompt, compared by Bradley-Terry under the true reward.
pairs() {
  local out=$1
  shift
  run python scripts/make_pairs.py --out="$out" "$@" --reward=controlled --seed="$seed"
}

# dpo WORKDIR FLAGS: one training by preferences.
dpo() {
  local workdir=$1
  shift
  run python -m dpo_jax.train --config=configs/controlled.py:dpo --workdir="$workdir" "$@" \
    --config.data.eval_path="$dir/eval_pairs.jsonl" --config.seed="$seed"
}

step() { printf '\n%s\n' "$bold$1. $2$plain"; }

# In a function, so that an edit of this file does not disturb a run of it.
main "$@"
