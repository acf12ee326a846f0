"""Ctrl-C in a command: one line at the first, the end at the second, never a traceback."""

import signal
import subprocess
import sys
import time

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("ctrl_c")

START = """
import signal, sys, time
from dpo_jax.utils import interrupts
interrupts.install()
"""
COMMAND = """
try:
  {body}
except KeyboardInterrupt:
  print("cleaned up", flush=True)
  interrupts.end()
"""


def interrupted(program, times=1, between=0.4):
  """Runs a program and interrupts it once it has printed a line; returns status and output."""
  with subprocess.Popen(
    [sys.executable, "-c", program],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  ) as process:
    assert process.stdout.readline() == "begun\n"
    for _ in range(times):
      process.send_signal(signal.SIGINT)
      time.sleep(between)
    said = process.stdout.read()
  return process.returncode, said


def test_the_first_ends_a_command_in_one_line_after_its_clean_up():
  program = START + COMMAND.format(body="print('begun', flush=True); time.sleep(20)")
  assert interrupted(program) == (130, "cleaned up\n\ninterrupted\n")


def test_two_signals_at_once_are_one():
  program = START + COMMAND.format(body="print('begun', flush=True); time.sleep(20)")
  assert interrupted(program, times=2, between=0.0) == (130, "cleaned up\n\ninterrupted\n")


# A function in a module of that name, as the frame of a compilation has.
IN_JAX = """
module = type(sys)("jax._src.compiler")
exec('''
import time
def compiling():
  print("begun", flush=True)
  time.sleep(0.3)
  print("compiled", flush=True)
''', module.__dict__)
"""


def test_it_waits_for_a_compilation_to_end():
  program = START + IN_JAX + COMMAND.format(body="module.compiling(); time.sleep(20)")
  assert interrupted(program, between=0) == (130, "compiled\ncleaned up\n\ninterrupted\n")


def test_the_second_ends_the_process_whatever_it_does():
  program = START + IN_JAX.replace("0.3", "20") + COMMAND.format(body="module.compiling()")
  assert interrupted(program, times=2) == (130, "\nstopped at once\n")


def test_during_imports_nothing_is_raised(tmp_path):
  (tmp_path / "slow.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(20)\n")
  program = START + f"sys.path.insert(0, {str(tmp_path)!r})\nimport slow\n"
  assert interrupted(program) == (130, "\ninterrupted\n")


def test_one_that_is_lost_in_a_destructor_is_raised_anew():
  body = """
class Slow:
  def __del__(self):
    print("begun", flush=True)
    time.sleep(20)
try:
  x = Slow()
  del x
  time.sleep(20)
except KeyboardInterrupt:
  interrupts.end()
"""
  assert interrupted(START + body) == (130, "\ninterrupted\n")


@pytest.mark.parametrize("ignored", [True, False])
def test_a_handler_that_is_there_stays(ignored):
  """That of a notebook, say, or none in the background job of a script."""
  handler = "signal.SIG_IGN" if ignored else "lambda *_: print('mine', flush=True)"
  program = (
    f"import signal\nsignal.signal(signal.SIGINT, {handler})"
    + START
    + "print('begun', flush=True)\nfor _ in range(9): time.sleep(0.1)\nprint('end', flush=True)"
  )
  assert interrupted(program) == (0, "end\n" if ignored else "mine\nend\n")
