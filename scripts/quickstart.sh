#!/usr/bin/env bash
# The whole project in minutes: makes .venv, installs requirements.txt, trains a
# small language model, samples pairs of completions from it, labels them by a
# known reward, trains on them by DPO in two rounds, and measures the result
# against the best possible policy. It prints every command before it runs it.
#
#   bash scripts/quickstart.sh [DIR]        writes to DIR, or runs/quickstart
#   SEED=1 bash scripts/quickstart.sh DIR   the same with other random numbers
#
# If it was stopped (by Ctrl-C, for example), the same command continues from the
# last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

main() {
  local dir=${1:-runs/quickstart} seed=${SEED:-0} started status
  case $dir in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"; return ;; -*) fail "usage: bash scripts/quickstart.sh [DIR]" ;; esac
  # A run that is interrupted saves first; this line comes below what it prints.
  trap 'status=$?; [ "$status" != 130 ] || say "continue: bash scripts/quickstart.sh $dir"' EXIT
  use_venv requirements.txt
  started=$(date +%s)

  step 1 "Write reviews, prompts and a tokenizer"
  run python scripts/make_controlled.py --out="$dir/task" --force --seed="$seed"

  step 2 "Train the reference on the reviews (SFT)"
  found "$dir/sft"
  run python -m dpo_jax.train --config=configs/controlled.py:sft --workdir="$dir/sft" \
    --config.model.tokenizer="$dir/task/tokenizer" --data="$dir/task/sft.jsonl" \
    --seed="$seed"

  step 3 "Sample pairs from it and label them"
  pairs "$dir/pairs_1.jsonl" --model="$dir/sft/export" --prompts="$dir/task/prompts.jsonl" \
    --limit=16000
  pairs "$dir/eval_pairs.jsonl" --model="$dir/sft/export" --prompts="$dir/task/eval_prompts.jsonl"

  step 4 "Train on those pairs by DPO"
  dpo "$dir/dpo_1" --model="$dir/sft/export" --data="$dir/pairs_1.jsonl"

  step 5 "A second round of DPO, with new pairs added"
  pairs "$dir/pairs_2.jsonl" --model="$dir/dpo_1/export" --prompts="$dir/task/prompts.jsonl" \
    --skip=16000
  cat "$dir/pairs_1.jsonl" "$dir/pairs_2.jsonl" > "$dir/pairs.jsonl"
  dpo "$dir/dpo" --model="$dir/dpo_1/export" --data="$dir/pairs.jsonl" \
    --reference="$dir/sft/export" --epochs=1

  step 6 "Measure against the best possible policy"
  run python scripts/evaluate.py --model="$dir/dpo/export" --reference="$dir/sft/export" \
    --data="$dir/eval_pairs.jsonl" --beta=2.5 --reward=controlled \
    --prompts="$dir/task/eval_prompts.jsonl" --out="$dir/summary.json" --force --seed="$seed" \
    --started="$started"
  say ""
  say "on your own data:"
  say "python -m dpo_jax.train --model=MODEL_DIR --data=PREFERENCES.jsonl"
}

# pairs OUT FLAGS: samples two completions per prompt, and labels them with Bradley-Terry
# probabilities of the true reward.
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

# Seconds of each step on two idle cores. Only their shares matter: the time left is estimated from
# the steps that are done. It starts as if 20 seconds had taken 20, since step 1 is too short to
# measure a machine.
usual=(3 27 17 54 78 24)
done_usual=20 done_seconds=20 begun='' was_there=''

# found WORKDIR: notes whether that run has finished before, so that the step's time does not count.
found() { [ ! -f "$1/result.json" ] || was_there=yes; }

# step N TITLE: prints a step, with the time that it and the rest may take. At most 80 columns.
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
