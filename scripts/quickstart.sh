#!/usr/bin/env bash
# The whole project in minutes, from nothing: makes .venv, installs requirements.txt, then trains a
# small language model, samples from it, learns a reward's preferences by DPO, and measures the
# result against the best that is possible. Every command is printed before it runs.
#
#   bash scripts/quickstart.sh [DIR]            results go to DIR, runs/quickstart by default
#   SEED=1 bash scripts/quickstart.sh DIR       the same with other random numbers
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

DIR=${1:-runs/quickstart}
SEED=${SEED:-0}
case $DIR in -*) fail "usage: bash scripts/quickstart.sh [DIR]" ;; esac

run() {
  printf '\n\033[1;36m$ %s\033[0m\n' "$*"
  "$@"
}

use_venv requirements.txt
started=$(date +%s)

say "
1. Texts of a small world: a grammar of reviews, prompts, and a word-level tokenizer"
run python scripts/make_controlled.py --out="$DIR/task" --seed="$SEED"

say "
2. The reference: a language model trained on those texts from nothing"
run python -m dpo_jax.train --config=configs/controlled.py:sft --workdir="$DIR/sft" \
  --config.model.tokenizer="$DIR/task/tokenizer" --config.data.path="$DIR/task/sft.jsonl" \
  --config.seed="$SEED"

say "
3. Preferences: two answers a prompt sampled from it, compared under the true reward"
run python scripts/make_pairs.py --model="$DIR/sft/export" --prompts="$DIR/task/prompts.jsonl" \
  --reward=controlled --out="$DIR/pairs.jsonl" --seed="$SEED"
run python scripts/make_pairs.py --model="$DIR/sft/export" --prompts="$DIR/task/eval_prompts.jsonl" \
  --reward=controlled --out="$DIR/eval_pairs.jsonl" --seed="$SEED"

say "
4. Direct Preference Optimization of the same model on those pairs"
run python -m dpo_jax.train --config=configs/controlled.py:dpo --workdir="$DIR/dpo" \
  --config.model.path="$DIR/sft/export" --config.data.path="$DIR/pairs.jsonl" \
  --config.data.eval_path="$DIR/eval_pairs.jsonl" --config.seed="$SEED"

say "
5. What came out, against the best that is possible"
run python scripts/evaluate.py --model="$DIR/dpo/export" --reference="$DIR/sft/export" \
  --data="$DIR/eval_pairs.jsonl" --reward=controlled --prompts="$DIR/task/eval_prompts.jsonl" \
  --out="$DIR/summary.json" --seed="$SEED" --started="$started"
