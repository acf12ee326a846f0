"""The launch scripts: what they would run, and when they start it again."""

import os
import pathlib
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.support.paths import ROOT

TPU = {"NAME": "mine", "ZONE": "us-central2-b", "ACCELERATOR_TYPE": "v4-32"}
PLACE = ["--zone=us-central2-b"]


def bash(*arguments, path=None, **env):
  """A script, with fakes of other programs in the folder `path` before the real ones."""
  clean = {k: v for k, v in os.environ.items() if k not in TPU and not k.startswith("SLURM")}
  if path is not None:
    env["PATH"] = f"{path}:{clean['PATH']}"
  return subprocess.run(
    ["bash", *arguments], cwd=ROOT, env=clean | env, capture_output=True, text=True, timeout=60
  )


def planned(*arguments, **env):
  """The commands of a dry run, each as the words it is made of."""
  done = bash(*arguments, DRY_RUN="1", **env)
  assert done.returncode == 0, done.stderr
  return [shlex.split(line) for line in done.stdout.splitlines()]


def fake(folder, name, text):
  path = folder / name
  path.write_text(f"#!/usr/bin/env bash\n{text}\n")
  path.chmod(0o755)


def test_the_scripts_are_clean():
  scripts = [*ROOT.glob("scripts/**/*.sh"), ROOT / "scripts" / "slurm.sbatch", ROOT / ".ci" / "run"]
  checked = subprocess.run(
    [pathlib.Path(sys.executable).with_name("shellcheck"), "-x", *scripts],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
  ("env", "words"),
  [
    ({}, ["tpu-vm", "create", "mine", "--accelerator-type=v4-32", "--version=tpu-ubuntu2204-base"]),
    (
      {"SPOT": "1", "RUNTIME_VERSION": "v2-alpha-tpuv6e", "PROJECT": "ours"},
      [
        "tpu-vm",
        "create",
        "mine",
        "--accelerator-type=v4-32",
        "--version=v2-alpha-tpuv6e",
        "--spot",
      ],
    ),
    (
      {"QUEUED": "1"},
      [
        "queued-resources",
        "create",
        "mine",
        "--node-id=mine",
        "--accelerator-type=v4-32",
        "--runtime-version=tpu-ubuntu2204-base",
      ],
    ),
  ],
)
def test_a_tpu_is_asked_for(env, words):
  place = PLACE + (["--project=ours"] if "PROJECT" in env else [])
  found = planned("scripts/tpu_vm.sh", "create", **TPU, **env)
  assert found == [["gcloud", "compute", "tpus", *words, *place]]


def remote(words):
  """What a planned `tpu-vm ssh` runs, and on which hosts."""
  assert words[3:6] == ["tpu-vm", "ssh", "mine"]
  (hosts,) = (w.removeprefix("--worker=") for w in words if w.startswith("--worker="))
  (command,) = (w.removeprefix("--command=") for w in words if w.startswith("--command="))
  return hosts, command


def test_all_hosts_are_set_up_as_the_quickstart_does_it():
  copied, made = planned("scripts/tpu_vm.sh", "setup", **TPU)
  assert copied[3:] == [
    "tpu-vm",
    "scp",
    "dpo_jax.tar.gz",
    "mine:dpo_jax.tar.gz",
    "--worker=all",
    *PLACE,
  ]
  hosts, command = remote(made)
  assert hosts == "all" and command.endswith("use_venv requirements-tpu.txt")
  assert (ROOT / "requirements-tpu.txt").is_file()


def test_training_starts_on_all_hosts_with_flags_as_they_were_given(tmp_path):
  """The remote command is run here, by a Python that writes down what it is given."""
  flags = ["--config=configs/preferences.py", "--workdir=/mnt/my runs/$HOME 'a'"]
  (words,) = planned("scripts/tpu_vm.sh", "run", *flags, **TPU)
  hosts, command = remote(words)
  assert hosts == "all"
  (tmp_path / "dpo_jax" / ".venv" / "bin").mkdir(parents=True)
  fake(tmp_path / "dpo_jax" / ".venv" / "bin", "python", 'printf "%s\\n" "$@" > given; exit 3')
  shutil.copytree(ROOT / "scripts", tmp_path / "dpo_jax" / "scripts")
  subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, timeout=60)
  status = tmp_path / "dpo_jax" / "train.status"
  for _ in range(500):
    if status.is_file() and status.read_text():
      break
    time.sleep(0.02)
  given = (tmp_path / "dpo_jax" / "given").read_text().splitlines()
  assert given == ["-m", "dpo_jax.train", "--config.parallel.coordinator=auto", *flags]
  assert status.read_text() == "3\n"


def test_a_tpu_that_was_taken_away_is_asked_for_again(tmp_path):
  """Preempted, then deleted, made anew, set up, and trained on until that ends."""
  fake(
    tmp_path,
    "gcloud",
    'echo "$3 $4" >> "$LOG"\n'
    'case "$3 $4 $*" in\n'
    '  "tpu-vm describe"*) if grep -q create "$LOG"; then echo READY; else echo PREEMPTED; fi ;;\n'
    '  *"cat train.status"*) echo 0 ;;\n'
    "esac",
  )
  log = tmp_path / "log"
  done = bash(
    "scripts/tpu_vm.sh", "keep", "--workdir=x", path=tmp_path, LOG=str(log), POLL="0", **TPU
  )
  assert done.returncode == 0, done.stderr
  verbs = [line.split()[1] for line in log.read_text().splitlines()]
  assert verbs == ["describe", "delete", "create", "describe", "scp", "ssh", "ssh", "ssh"]


@pytest.mark.parametrize(
  ("arguments", "env", "words"),
  [
    (["scripts/tpu_vm.sh"], TPU, "usage: bash scripts/tpu_vm.sh create"),
    (["scripts/tpu_vm.sh", "create"], {"NAME": "x", "ZONE": "y"}, "ACCELERATOR_TYPE is not set"),
    (["scripts/tpu_vm.sh", "run"], TPU, "run takes the flags of python -m dpo_jax.train"),
    (["scripts/tpu_vm.sh", "logs", "now"], TPU, "logs takes no arguments"),
    (["scripts/slurm.sbatch"], {}, "usage: sbatch scripts/slurm.sbatch FLAGS"),
    (["scripts/slurm.sbatch", "--config=x"], {}, "this is no SLURM job; submit it"),
    (["scripts/launch/again.sh"], {}, "usage: bash scripts/launch/again.sh COMMAND"),
  ],
)
def test_what_is_missing_is_said_in_one_line(arguments, env, words):
  done = bash(*arguments, **env)
  assert done.returncode == 1
  assert done.stderr.startswith("error: ") and words in done.stderr
  assert done.stderr.count("\n") == 1 and not done.stdout


def counting(folder, statuses):
  """A program that ends with one status after another, and counts its starts."""
  fake(
    folder,
    "srun",
    f"echo x >> {folder}/starts; set -- {' '.join(map(str, statuses))}\n"
    f"shift $(($(wc -l < {folder}/starts) - 1)); exit $1",
  )
  return folder / "srun", folder / "starts"


@pytest.mark.parametrize(
  ("statuses", "starts", "status"),
  [([75, 75, 0], 3, 0), ([1], 1, 1), ([75, 1], 2, 1), ([75] * 9, 4, 75)],
)
def test_a_command_is_started_again_when_it_asks_for_it(tmp_path, statuses, starts, status):
  program, log = counting(tmp_path, statuses)
  done = bash("scripts/launch/again.sh", str(program), RESTARTS="3")
  assert done.returncode == status
  assert len(log.read_text().splitlines()) == starts
  assert ("gave up after 3 restarts" in done.stderr) == (starts == 4)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=["term", "ctrl-c"])
def test_asked_to_stop_it_passes_that_on_and_starts_nothing_more(tmp_path, sent):
  ready = tmp_path / "ready"
  fake(
    tmp_path,
    "train",
    f"trap 'echo saved; exit 75' TERM\necho x >> {ready}\nwhile :; do sleep 0.05; done",
  )
  command = ["bash", "scripts/launch/again.sh", str(tmp_path / "train")]
  with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
    while not ready.exists():
      time.sleep(0.02)
    process.send_signal(sent)
    said = process.communicate(timeout=30)[0]
  assert said == "saved\n" and process.returncode == 75
  assert ready.read_text() == "x\n"


def test_a_run_that_would_start_anew_every_time_is_not_repeated(tmp_path):
  program, log = counting(tmp_path, [75, 0])
  done = bash("scripts/launch/again.sh", str(program), "--overwrite")
  assert done.returncode == 1 and "--overwrite would start anew every time" in done.stderr
  assert not log.exists()


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (75, True)])
def test_a_slurm_job_that_was_told_to_stop_queues_itself_again(tmp_path, status, requeued):
  counting(tmp_path, [status])
  fake(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/queued')
  env = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "CONTAINER": "image"}
  done = bash("scripts/slurm.sbatch", "--workdir=x", path=tmp_path, **env)
  assert done.returncode == status, done.stderr
  assert (tmp_path / "queued").exists() == requeued
  if requeued:
    assert (tmp_path / "queued").read_text() == "requeue 7\n"


def test_slurm_starts_a_process_for_every_gpu():
  (words,) = planned("scripts/slurm.sbatch", "--workdir=my runs")
  assert words[:3] == ["srun", "--kill-on-bad-exit=0", ".venv/bin/python"]
  assert words[-2:] == ["--config.parallel.coordinator=auto", "--workdir=my runs"]
  text = (ROOT / "scripts" / "slurm.sbatch").read_text()
  asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
  assert asked["ntasks-per-node"] == asked["gpus-per-node"]
  assert asked["signal"].startswith("TERM@")


def test_pods_find_each_other_where_the_jobset_puts_them():
  described = yaml.safe_load((ROOT / "scripts" / "launch" / "jobset.yaml").read_text())
  (job,) = described["spec"]["replicatedJobs"]
  spec = job["template"]["spec"]
  (container,) = spec["template"]["spec"]["containers"]
  words = shlex.split(container["args"][0].replace("$JOB_COMPLETION_INDEX", "1"))
  name = described["metadata"]["name"]
  port = container["ports"][0]["containerPort"]
  assert f"--config.parallel.coordinator={name}-{job['name']}-0-0.{name}:{port}" in words
  assert f"--config.parallel.processes={spec['completions']}" in words
  assert "--config.parallel.process=1" in words
  assert spec["parallelism"] == spec["completions"] and spec["completionMode"] == "Indexed"


# -- the quickstart --------------------------------------------------------------------------------


@pytest.mark.parametrize(("there", "third"), [([], 70), (["sft"], 78)])
def test_the_quickstart_says_how_far_it_is_and_how_long_the_rest_takes(tmp_path, there, third):
  """With fakes: each step takes ten minutes, and every command writes what it is to write."""
  copied(tmp_path, "scripts/quickstart.sh", "scripts/venv.sh", "requirements.txt")
  programs = tmp_path / ".venv" / "bin"
  programs.mkdir(parents=True)
  fake(
    programs,
    "python",
    'for word; do case $word in --out=*.jsonl) mkdir -p "$(dirname "${word#--out=}")";'
    ' touch "${word#--out=}" ;; esac; done',
  )
  fake(programs, "date", "echo x >> clock; echo $(($(wc -l < clock) * 600))")
  for run in there:
    (tmp_path / "runs" / "quickstart" / run).mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / run / "result.json").touch()
  done = run_in(tmp_path, "scripts/quickstart.sh")
  assert done.returncode == 0, done.stderr
  steps = [line for line in done.stdout.splitlines() if line.startswith("Step ")]
  # Usual seconds are 3, 27, 17, 54, 78, 24. The estimate starts with 20 for 20; after the first
  # step it is 200 * 620 / 23 seconds. A run that had ended before tells nothing.
  left = [line.split(" left: ")[0] for line in steps]
  assert left[:3] == [
    "Step 1 of 6, about 3 minutes",
    "Step 2 of 6, about 90 minutes",
    f"Step 3 of 6, about {third} minutes",
  ]
  assert len(steps) == 6 and max(map(len, steps)) <= 80  # a terminal would break a word
  assert done.stdout.splitlines()[-2] == "on your own data:"
  last = done.stdout.splitlines()[-1]
  assert last.startswith("python -m dpo_jax.train --model") and len(last) <= 80


def test_the_help_of_the_quickstart_fits_a_terminal():
  done = subprocess.run(
    ["bash", ROOT / "scripts" / "quickstart.sh", "--help"],
    capture_output=True,
    text=True,
    check=True,
  )
  lines = done.stdout.splitlines()
  assert lines[0].startswith("The whole project") and max(map(len, lines)) <= 80


@pytest.mark.parametrize("status", [0, 3])
def test_an_installation_shows_what_it_does_in_a_terminal_and_its_error(tmp_path, status):
  copied(tmp_path, "scripts/venv.sh")
  (tmp_path / "requirements.txt").touch()
  programs = tmp_path / ".venv" / "bin"
  programs.mkdir(parents=True)
  lines = f'echo "Collecting flax (from -r x)"; echo "  Downloading jax-{"1" * 90}.whl"'
  pip = f'{lines}; echo "no network" >&2; exit {status}'
  fake(programs, "python", f'case $* in *"pip install"*) {pip} ;; esac')
  command = "set -euo pipefail; source scripts/venv.sh; use_venv requirements.txt; echo over"
  ours, theirs = pty.openpty()
  done = subprocess.run(
    ["bash", "-c", command],
    cwd=tmp_path,
    stdout=theirs,
    stderr=subprocess.PIPE,
    text=True,
    check=False,
    timeout=60,
  )
  os.close(theirs)
  shown = os.read(ours, 10_000).decode()
  os.close(ours)
  assert re.search(r"\r\x1b\[K  \d+ s  Downloading jax-111", shown)
  assert re.search(r"\r\x1b\[K  \d+ s  Collecting flax\r", shown)
  drawn = re.split(r"[\r\n]+", shown.replace("\x1b[K", ""))
  assert max(map(len, drawn[1:])) <= 79  # after the title, which is bold
  stamp = tmp_path / ".venv" / "installed-requirements.txt"
  assert ("over" in drawn) == stamp.exists() == (status == 0)
  assert "no network" in done.stderr
  assert ("error: pip could not install requirements.txt" in done.stderr) == (status == 3)


# -- continuous integration ------------------------------------------------------------------------


def copied(folder, *names):
  """Some files of the project, in a folder."""
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / name, folder / name)


def run_in(folder, script, *arguments, **variables):
  words, env = ["bash", script, *arguments], os.environ | variables
  return subprocess.run(
    words, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=60
  )


@pytest.mark.parametrize(
  ("failing", "ran"),
  [(None, "lint test test-slow test_targets"), ("lint", "lint"), ("test", "lint test")],
)
def test_integration_asks_lint_first_and_names_what_fails(tmp_path, failing, ran):
  copied(tmp_path, ".ci/run")
  (tmp_path / "scripts").mkdir()
  for name in ("lint", "test", "test_targets"):
    status = 3 if failing == name else 0
    fake(tmp_path / "scripts", f"{name}.sh", f'echo "{name}${{2:+-$2}}" >> ran; exit {status}')
  done = run_in(tmp_path, ".ci/run")
  assert (tmp_path / "ran").read_text().split() == ran.split()
  assert done.returncode == (3 if failing else 0)
  says = f"error: bash scripts/{failing}.sh failed with status 3; what it found is above"
  assert (says in done.stderr) == bool(failing)


@pytest.mark.parametrize(
  ("failing", "words"),
  [
    ((), "lint: nothing to report"),
    (("ruff", "pyright"), "error: lint: ruff check, ruff format --check, pyright --warnings;"),
    (("pyright",), "error: lint: pyright --warnings; see above"),
  ],
)
def test_lint_runs_all_three_and_names_those_that_found_something(tmp_path, failing, words):
  copied(tmp_path, "scripts/lint.sh", "scripts/venv.sh", "requirements-dev.txt", "requirements.txt")
  programs = tmp_path / ".venv" / "bin"
  programs.mkdir(parents=True)
  fake(programs, "python", "exit 0")
  for name in ("ruff", "pyright"):
    fake(programs, name, f'echo "{name} $*" >> ran; exit {int(name in failing)}')
  done = run_in(tmp_path, "scripts/lint.sh")
  assert done.returncode == bool(failing)
  assert words in (done.stderr if failing else done.stdout)
  ran = (tmp_path / "ran").read_text().splitlines()
  assert ran == ["ruff check", "ruff format --check", "pyright --warnings"]


def test_what_lints_is_pinned():
  """Another release finds other things, in code that has not changed."""
  text = (ROOT / "requirements-dev.txt").read_text()
  assert re.search(r"^ruff==[\d.]+ ", text, re.MULTILINE)
  assert re.search(r"^pyright\[nodejs\]==[\d.]+ ", text, re.MULTILINE)


# -- machines without a network --------------------------------------------------------------------


def test_packing_fetches_the_wheels_of_both_sides_and_says_how_to_go_on(tmp_path):
  copied(tmp_path, "scripts/venv.sh", "scripts/benchmarks/compare.sh")
  # Of `-m venv`, it makes itself again; of `-m pip wheel`, it says what it was asked.
  again = 'case $* in *"-m venv"*) mkdir -p w/venv/bin; cp "$0" w/venv/bin/python ;; esac'
  asks = 'case $* in *"pip wheel"*) echo "$*" >> calls; touch w/a.whl ;; esac'
  fake(tmp_path, "python", f"{again}; {asks}")
  done = run_in(
    tmp_path, "scripts/benchmarks/compare.sh", "pack", "gpu", "w", PYTHON=str(tmp_path / "python")
  )
  assert done.returncode == 0, done.stderr
  asked = [line for line in (tmp_path / "calls").read_text().splitlines() if "pip wheel" in line]
  assert [line.split(" -r ")[1] for line in asked] == [
    "requirements-gpu.txt",
    "requirements-peers-gpu.txt",
  ]
  assert all("--wheel-dir w " in line for line in asked)
  assert done.stdout.splitlines()[-2].startswith("w holds 1 wheels, ")
  assert done.stdout.splitlines()[-1] == "There: WHEELS=w bash scripts/benchmarks/compare.sh gpu"
  assert not (tmp_path / "w" / "venv").exists()


def test_packed_wheels_are_installed_without_an_index(tmp_path):
  copied(tmp_path, "scripts/venv.sh")
  (tmp_path / "requirements.txt").touch()
  programs = tmp_path / ".venv" / "bin"
  programs.mkdir(parents=True)
  told = 'case $* in *"pip install"*) echo "$PIP_NO_INDEX $PIP_FIND_LINKS" > told ;; esac'
  fake(programs, "python", told)
  command = "set -euo pipefail; source scripts/venv.sh; use_venv requirements.txt"

  def install():
    words = ["bash", "-c", command]
    env = os.environ | {"WHEELS": "w"}
    return subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

  done = install()
  assert done.returncode == 1 and not (tmp_path / "told").exists()
  assert done.stderr.startswith("error: WHEELS=w holds no wheels; fill it where there is a network")
  (tmp_path / "w").mkdir()
  (tmp_path / "w" / "a.whl").touch()
  done = install()
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "told").read_text() == "1 w\n"
