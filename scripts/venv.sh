# shellcheck shell=bash
# Sourced by the other scripts: `use_venv FILE [DIR]` makes .venv (or DIR) hold the packages of a
# requirements file, installing only when that file has changed since, and puts it on the PATH;
# `pack_wheels DIR FILE …` fetches the packages of requirements files for machines without a network,
# where WHEELS=DIR makes use_venv install from there; `run COMMAND` shows a command and runs it.

bold='' cyan='' plain=''
if [ -t 1 ]; then bold=$'\033[1m' cyan=$'\033[1;36m' plain=$'\033[0m'; fi

say() { printf '%s\n' "$bold$*$plain"; }
run() {
  printf '\n%s\n' "$cyan\$ $*$plain"
  "$@"
}
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# The first Python that is new enough and can make virtual environments; $PYTHON goes first.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3.11 python3.13 python3 python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
      >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

# A requirements file and those that it includes by -r, one after the other.
whole() {
  cat "$1"
  sed -n 's/^-r *//p' "$1" | while read -r included; do whole "$included"; done
}

# pip_install PYTHON ARGUMENTS: pip install; in a terminal, one line is redrawn with what pip is doing.
pip_install() {
  local python=$1
  shift
  if [ ! -t 1 ]; then
    "$python" -m pip install --quiet --disable-pip-version-check "$@"
    return
  fi
  "$python" -m pip install --progress-bar off --disable-pip-version-check "$@" | redraw
  return "${PIPESTATUS[0]}"
}

# Shows the latest line of its input, cut to fit 80 columns, and nothing at the end.
redraw() {
  local line began=$SECONDS
  while IFS= read -r line; do
    line=${line%% (from *} # who asks for a package
    line="  $((SECONDS - began)) s  ${line#"${line%%[! ]*}"}"
    # Back to the first column, where an error begins.
    printf '\r\033[K%s\r' "${line:0:79}"
  done
  printf '\r\033[K'
}

# What to look at where pip failed.
what_is_missing() {
  if [ -z "${WHEELS:-}" ]; then
    echo "is there a network, and room on the disk?"
  else
    echo "was $WHEELS packed for this suite, Python and processor, and is there room on the disk?"
  fi
}

use_venv() {
  local requirements=$1 venv=${2:-.venv} python digest stamp size
  if ! "$venv/bin/python" -c 'import pip' >/dev/null 2>&1; then
    python=$(find_python) || fail "no Python >= 3.11 with venv found; install one" \
      "(Debian and Ubuntu: apt-get install python3 python3-venv), or name it: PYTHON=/path/to/python3"
    say "Making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" || fail "could not make $venv; is this folder writable?"
  fi
  "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$venv holds $("$venv/bin/python" --version), and 3.11 is needed; remove it and try again"

  digest=$(whole "$requirements" | cksum | tr ' ' -) # changes when any of them does
  stamp=$venv/installed-$requirements
  if [ "$(cat "$stamp" 2>/dev/null)" != "$digest" ]; then
    if [ -n "${WHEELS:-}" ]; then
      [ -n "$(find "$WHEELS" -name '*.whl' 2>/dev/null | head -1)" ] ||
        fail "WHEELS=$WHEELS holds no wheels; fill it where there is a network:" \
          "bash scripts/benchmarks/compare.sh pack"
      # pip's own settings: no index, and a folder in its place.
      export PIP_NO_INDEX=1 PIP_FIND_LINKS=$WHEELS
    fi
    case $requirements in
      requirements.txt) size="about 1.2 GB, " ;; # on disk, measured with Python 3.12 on Linux
      requirements-dev.txt) size="about 1.4 GB, " ;;
      *) size="" ;;
    esac
    say "Installing $requirements into $venv (${size}minutes, the first time)"
    pip_install "$venv/bin/python" -r "$requirements" ||
      fail "pip could not install $requirements; $(what_is_missing)"
    echo "$digest" >"$stamp"
  fi
  PATH=$PWD/$venv/bin:$PATH
}

# pack_wheels DIR FILE …: the wheels of the files' packages, and of what makes an environment.
pack_wheels() {
  local wheels=$1 python requirements
  shift
  python=$(find_python) || fail "no Python >= 3.11 with venv found; name it: PYTHON=/path/to/python3"
  mkdir -p "$wheels" || fail "could not make $wheels; name a folder that may be written"
  "$python" -m venv --clear "$wheels/venv"
  for requirements in "$@"; do
    say "Fetching the wheels of $requirements into $wheels, for $("$python" --version)"
    # `wheel` and not `download`: it also builds what is published as source alone.
    "$wheels/venv/bin/python" -m pip wheel --quiet --disable-pip-version-check \
      --wheel-dir "$wheels" --find-links "$wheels" -r "$requirements" ||
      fail "pip could not fetch $requirements; is there a network, and room on the disk?"
  done
  rm -rf "$wheels/venv"
  say "$wheels holds $(find "$wheels" -name '*.whl' | wc -l) wheels, $(du -sh "$wheels" | cut -f1)"
}
