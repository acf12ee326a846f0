#!/usr/bin/env bash
# Training on Cloud TPU VMs, of one host or a pod slice, by gcloud from your machine.
#
#   export NAME=my-tpu ZONE=us-central2-b ACCELERATOR_TYPE=v4-32
#   bash scripts/tpu_vm.sh create               asks for the TPU
#   bash scripts/tpu_vm.sh setup                this checkout and its .venv, on every host
#   bash scripts/tpu_vm.sh run FLAGS            python -m dpo_jax.train FLAGS on every host, detached
#   bash scripts/tpu_vm.sh keep FLAGS           all of that, and anew whenever the TPU is taken away
#   bash scripts/tpu_vm.sh logs | status | stop | delete
#
# Model, data and --workdir must be where every host sees them, such as a mounted bucket or Filestore.
#
#   RUNTIME_VERSION  of the VM's image; tpu-ubuntu2204-base by default
#   PROJECT          as of gcloud's configuration unless given
#   SPOT=1           a TPU that may be taken away, at a lower price
#   QUEUED=1         ask through a queued resource, which waits until there is one
#   POLL=60          seconds between two looks at the state, for keep
#   DRY_RUN=1        print the commands, run none
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

folder=dpo_jax

main() {
  local command=${1:-} word
  case $command in
    create | setup | logs | status | stop | delete) [ $# = 1 ] || fail "$command takes no arguments" ;;
    run | keep) [ $# -gt 1 ] || fail "$command takes the flags of python -m dpo_jax.train" ;;
    *) fail "usage: bash scripts/tpu_vm.sh create | setup | run FLAGS | keep FLAGS | logs | status | stop | delete" ;;
  esac
  for word in NAME ZONE ACCELERATOR_TYPE; do
    [ -n "${!word:-}" ] || fail "$word is not set; export it (see the head of scripts/tpu_vm.sh)"
  done
  [ -n "${DRY_RUN:-}" ] || command -v gcloud >/dev/null ||
    fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
  shift
  "$command" "$@"
}

# cloud VERB… : a gcloud command on the TPU's zone and project; printed, and run unless DRY_RUN is set.
cloud() {
  set -- gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}

# on HOSTS COMMAND: runs it in the checkout on one host, or on all.
on() { cloud tpu-vm ssh "$NAME" --worker="$1" --command="mkdir -p $folder && cd $folder && $2"; }

create() {
  local ask=(--accelerator-type="$ACCELERATOR_TYPE"
    --version="${RUNTIME_VERSION:-tpu-ubuntu2204-base}" ${SPOT:+--spot})
  if [ -n "${QUEUED:-}" ]; then
    ask[1]=--runtime-version=${RUNTIME_VERSION:-tpu-ubuntu2204-base}
    cloud queued-resources create "$NAME" --node-id="$NAME" "${ask[@]}"
  else
    cloud tpu-vm create "$NAME" "${ask[@]}"
  fi
}

setup() {
  local archive
  archive=$(mktemp -d)/dpo_jax.tar.gz
  git archive --format=tar.gz --output="$archive" HEAD
  [ -z "${DRY_RUN:-}" ] || archive=dpo_jax.tar.gz
  cloud tpu-vm scp "$archive" "$NAME:dpo_jax.tar.gz" --worker=all
  on all "tar -xzf ../dpo_jax.tar.gz && source scripts/venv.sh && use_venv requirements-tpu.txt"
}

run() {
  local flags
  flags=$(printf ' %q' "$@")
  on all "rm -f train.status && (nohup bash -c 'bash scripts/launch/again.sh .venv/bin/python -m dpo_jax.train --config.parallel.coordinator=auto \"\$@\"; echo \$? > train.status' train$flags > train.log 2>&1 < /dev/null &)"
}

logs() { on 0 "tail -n 100 -F train.log"; }

status() {
  state
  on 0 "if [ -f train.status ]; then echo ended with status \$(cat train.status); else pgrep -f '[d]po_jax.train' > /dev/null && echo training || echo not started; fi"
}

# Every process saves after the step it is at.
stop() { on all "pkill -TERM -f '[s]cripts/launch/again.sh' || true"; }

delete() {
  if [ -n "${QUEUED:-}" ]; then
    cloud queued-resources delete "$NAME" --force --quiet
  else
    cloud tpu-vm delete "$NAME" --quiet
  fi
}

# What the TPU is doing: READY (of a queued resource ACTIVE), CREATING, PREEMPTED, …
state() {
  if [ -n "${QUEUED:-}" ]; then
    cloud queued-resources describe "$NAME" --format='value(state.state)'
  else
    cloud tpu-vm describe "$NAME" --format='value(state)'
  fi
}

keep() {
  local now ended started=''
  while true; do
    if [ -n "${DRY_RUN:-}" ]; then
      now=MISSING
    elif ! now=$(state 2>&1); then
      case $now in *NOT_FOUND* | *'not found'*) now=MISSING ;; *) now=UNKNOWN ;; esac
    fi
    case ${now##*$'\n'} in
      READY | ACTIVE)
        if [ -z "$started" ]; then
          setup
          run "$@"
          started=1
        fi
        ended=$(on 0 "cat train.status 2>/dev/null || true" 2>/dev/null) || ended=''
        if [ -n "$ended" ]; then
          say "the training ended with status $ended; the TPU is still there, see delete"
          return "$ended"
        fi
        ;;
      MISSING | PREEMPTED | TERMINATED | SUSPENDED | FAILED)
        started=''
        [ "$now" = MISSING ] || delete
        create
        if [ -n "${DRY_RUN:-}" ]; then
          setup
          run "$@"
          return
        fi
        ;;
    esac
    sleep "${POLL:-60}"
  done
}

# In a function, so that an edit of this file does not disturb a run of it.
main "$@"
