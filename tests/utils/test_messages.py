"""Messages wrap between words: flags and paths stay whole, and a file gets one line each."""

import io
import re
import sys

import pytest

from dpo_jax.monitoring import alerts
from dpo_jax.utils import cli, messages
from tests.monitoring import test_alerts

PATH = "/a/folder-with-hyphens/and-a-long/name" + "/x" * 40 + "/model-00001-of-00002.safetensors"


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.mark.parametrize("width", [20, 40, 80])
@pytest.mark.parametrize("name", sorted(test_alerts.WRONG))
def test_no_flag_of_an_alert_breaks(name, width):
  (alert,) = alerts.scan(test_alerts.run(test_alerts.WRONG[name][0]))
  lines = messages.wrap(f"warning: {alert.text}", width).splitlines()
  longest = max(map(len, re.findall(r"\S+", alert.text)))
  assert len(lines) > 1 and all(len(line) <= max(width, longest + 2) for line in lines)
  # Joined again, it is the same text: nothing was broken but at spaces.
  assert " ".join(" ".join(lines).split()) == f"warning: {alert.text}"


def test_a_path_longer_than_the_screen_stays_whole():
  lines = messages.wrap(f"warning: {PATH} is not there; set --config.model.path=DIR", 40)
  assert any(PATH in line for line in lines.splitlines()) and "--config.model.path=DIR" in lines


def test_lines_that_fit_and_their_indents_stay_as_they_are():
  text = "rows.jsonl: 3 rows\n  dropped one\nwarning: word word word"
  assert messages.wrap(text, 30) == text
  assert messages.wrap("  a note of more words", 14) == "  a note of\n    more words"


def test_a_terminal_gets_wrapped_lines_and_a_file_gets_one(monkeypatch, capsys):
  text = "word " * 30 + "--lr=1e-6"
  messages.warn(text)
  assert capsys.readouterr() == ("", f"warning: {text}\n")
  monkeypatch.setattr(sys, "stderr", terminal := Terminal())
  monkeypatch.setenv("COLUMNS", "40")
  messages.warn(text)
  lines = terminal.getvalue().splitlines()
  assert len(lines) > 3 and lines[0].startswith("warning: word") and max(map(len, lines)) <= 40
  with pytest.raises(SystemExit):
    cli.fail(text)
  assert "error: word" in terminal.getvalue() and "--lr=1e-6" in terminal.getvalue()


def test_results_go_to_stdout_and_wrap_there_too(monkeypatch, capsys):
  messages.say("done: " + PATH)
  assert capsys.readouterr() == (f"done: {PATH}\n", "")
  monkeypatch.setattr(sys, "stdout", terminal := Terminal())
  monkeypatch.setenv("COLUMNS", "80")
  messages.say(
    "done: runs/quickstart/sft/export (the model), runs/quickstart/sft/report.html (the report)"
  )
  lines = terminal.getvalue().splitlines()
  assert lines[1] == "  (the report)" and len(lines) == 2


def test_a_command_is_never_wrapped_and_has_a_line_of_its_own_if_that_helps(monkeypatch, capsys):
  command = "python scripts/convert_hf.py --workdir=runs/mine --out=runs/mine/best --best"
  messages.say_command("export the best", command)
  assert capsys.readouterr().out == f"export the best: {command}\n"
  monkeypatch.setattr(sys, "stdout", terminal := Terminal())
  monkeypatch.setenv("COLUMNS", "80")
  messages.say_command("export the best", command)
  messages.say_command("try it", "ls")
  assert terminal.getvalue() == f"export the best:\n{command}\ntry it: ls\n"
