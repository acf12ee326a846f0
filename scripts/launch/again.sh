#!/usr/bin/env bash
# Runs a command, and again as long as it exits with status 75: a training that saved and left when
# asked to, or lost a process. Asked to stop itself (SIGTERM, Ctrl-C), it passes that on and stops.
#
#   bash scripts/launch/again.sh COMMAND…              RESTARTS=N gives up after so many, 100 by default
set -uo pipefail

main() {
  local restarts=0 status
  stopping='' child=''
  trap 'stopping=1; kill -TERM "$child" 2>/dev/null' TERM INT
  while true; do
    "$@" &
    child=$!
    # Asked to stop before it was known whom to tell.
    [ -z "$stopping" ] || kill -TERM "$child" 2>/dev/null
    wait "$child"
    status=$?
    # A signal ends the wait and not the command.
    while kill -0 "$child" 2>/dev/null; do
      wait "$child"
      status=$?
    done
    if [ "$status" != 75 ] || [ -n "$stopping" ]; then return "$status"; fi
    restarts=$((restarts + 1))
    if [ "$restarts" -gt "${RESTARTS:-100}" ]; then
      printf 'error: gave up after %s restarts; see why it stopped, and start it again\n' \
        "$((restarts - 1))" >&2
      return "$status"
    fi
    printf 'starting again (%s)\n' "$restarts"
  done
}

if [ $# = 0 ]; then
  echo 'error: usage: bash scripts/launch/again.sh COMMAND…' >&2
  exit 1
fi
case " $* " in *" --overwrite"* | *" -overwrite"*)
  echo 'error: --overwrite would start anew every time; start the run with it once, then without' >&2
  exit 1
  ;;
esac
main "$@"
