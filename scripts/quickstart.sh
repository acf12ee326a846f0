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
  run python scripts/make_controlled.py --out="$dir/task" --force --seed="$seed"

  step 2 "The reference: a language model trained on those texts from nothing"
  found "$dir/sft"
  run python -m dpo_jax.train --config=configs/controlled.py:sft --workdir="$dir/sft" \
    --config.model.tokenizer="$dir/task/tokenizer" --data="$dir/task/sft.jsonl" \
    --seed="$seed"

  step 3 "Preferences: two answers a prompt sampled from it, compared under the true reward"
  pairs "$dir/pairs_1.jsonl" --model="$dir/sft/export" --prompts="$dir/task/prompts.jsonl" \
    --limit=16000
  pairs "$dir/eval_pairs.jsonl" --model="$dir/sft/export" --prompts="$dir/task/eval_prompts.jsonl"

  step 4 "Direct Preference Optimization of that model on those pairs"
  dpo "$dir/dpo_1" --model="$dir/sft/export" --data="$dir/pairs_1.jsonl"

  step 5 "A second round: pairs of what the policy says now, beside the first, the reference as it was"
  pairs "$dir/pairs_2.jsonl" --model="$dir/dpo_1/export" --prompts="$dir/task/prompts.jsonl" \
    --skip=16000
  cat "$dir/pairs_1.jsonl" "$dir/pairs_2.jsonl" > "$dir/pairs.jsonl"
  dpo "$dir/dpo" --model="$dir/dpo_1/export" --data="$dir/pairs.jsonl" \
    --reference="$dir/sft/export" --epochs=1

  step 6 "What came out on 1,024 unseen prompts, against the best that is possible"
  run python scripts/evaluate.py --model="$dir/dpo/export" --reference="$dir/sft/export" \
    --data="$dir/eval_pairs.jsonl" --beta=2.5 --reward=controlled \
    --prompts="$dir/task/eval_prompts.jsonl" --out="$dir/summary.json" --force --seed="$seed" \
    --started="$started"
  say ""
  say "on your own data: python -m dpo_jax.train --model=MODEL_DIR --data=PREFERENCES.jsonl --workdir=runs/mine"
}

# pairs OUT FLAGS: two answers to every prompt, compared by Bradley-Terry under the true reward.
pairs() {
  local out=$1
  shift
  run python scripts/make_pairs.py --out="$out" --force "$@" --reward=controlled --seed="$seed"
}

# dpo WORKDIR FLAGS: one training by preferences.
dpo() {
  local workdir=$1
  shift
  found "$workdir"
  run python -m dpo_jax.train --config=configs/controlled.py:dpo --workdir="$workdir" "$@" \
    --eval_data="$dir/eval_pairs.jsonl" --seed="$seed"
}

# Seconds of each step on two idle cores. What counts are their shares: how long the rest may take
# here is told by the steps that are done, of which the first few seconds tell little.
usual=(3 27 17 54 78 24)
done_usual=20 done_seconds=20 begun='' was_there=''

# found WORKDIR: notes whether a run has ended there already, whose time then tells nothing.
found() { [ ! -f "$1/result.json" ] || was_there=yes; }

# step N TITLE: begins a step, with how long it and the rest may take.
step() {
  local number=$1 title=$2 now left=0 seconds
  now=$(date +%s)
  if [ -n "$begun" ] && [ -z "$was_there" ]; then
    done_usual=$((done_usual + usual[number - 2]))
    done_seconds=$((done_seconds + now - begun))
  fi
  for seconds in "${usual[@]:number - 1}"; do left=$((left + seconds)); done
  begun=$now was_there=''
  left=$((left * done_seconds / done_usual))
  printf '\n%s\n' "${bold}Step $number of ${#usual[@]}, about $(minutes "$left") left: $title$plain"
}

# minutes SECONDS: in words.
minutes() {
  local count=$((($1 + 30) / 60))
  case $count in 0) echo "half a minute" ;; 1) echo "a minute" ;; *) echo "$count minutes" ;; esac
}

# In a function, so that an edit of this file does not disturb a run of it.
main "$@"
