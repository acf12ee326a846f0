"""Tests the flags, the arithmetic and the folders of the frontier study, without any training."""

import itertools
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dpo_jax.evaluation import estimates
from dpo_jax.experiments import frontier
from dpo_jax.experiments.frontier import results, runs, settings
from dpo_jax.experiments.frontier.yardstick import Yardstick, best_of_n, best_of_n_points
from dpo_jax.monitoring import plots
from dpo_jax.structs import UserError
from tests.support import in_process

ROOT = runs.ROOT


# --- Best of n ------------------------------------------------------------------------------------


def test_best_of_two_by_hand():
  # Of 4 samples, 6 ways to take 2; the largest is 1, 2, 3 in 1, 2, 3 of them.
  reward, kl = best_of_n(np.array([3.0, 0.0, 2.0, 1.0]), 2)
  assert reward == pytest.approx((1 * 1 + 2 * 2 + 3 * 3) / 6)
  expected = sum(p * math.log(p / 0.25) for p in (1 / 6, 2 / 6, 3 / 6))
  assert kl == pytest.approx(expected)


def test_best_of_one_is_the_reference():
  reward_S = np.random.default_rng(0).normal(size=50)
  reward, kl = best_of_n(reward_S, 1)
  assert reward == pytest.approx(reward_S.mean())
  assert kl == pytest.approx(0, abs=1e-12)


def test_best_of_equal_rewards_is_the_reference():
  assert best_of_n(np.full(9, 2.5), 4) == pytest.approx((2.5, 0.0))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets_with_ties(n):
  reward_S = np.array([0.0, 1.0, 1.0, 1.0, 4.0, 4.0, -2.0, 0.0])
  largest = [max(some) for some in itertools.combinations(reward_S, n)]
  reward, kl = best_of_n(reward_S, n)
  assert reward == pytest.approx(np.mean(largest))
  chance = {r: largest.count(r) / len(largest) for r in set(largest)}
  share = {r: np.mean(reward_S == r) for r in chance}
  assert kl == pytest.approx(sum(p * math.log(p / share[r]) for r, p in chance.items()))


def test_without_ties_the_kl_is_log_n_minus_n_minus_1_over_n():
  # The formula is for sampling with replacement; the difference is of order n / S.
  for n in (2, 8, 32):
    _, kl = best_of_n(np.arange(200_000.0), n)
    assert kl == pytest.approx(math.log(n) - (n - 1) / n, abs=1e-3)


def test_best_of_n_never_exceeds_the_frontier():
  rng = np.random.default_rng(0)
  # Few distinct rewards: with ties the bound on the KL is strict.
  many_XK = rng.choice([-3.0, 0.0, 1.0, 4.0], (8, 512), p=[0.3, 0.4, 0.2, 0.1])
  points = best_of_n_points(yardstick(many_XK))
  assert [point["n"] for point in points] == [1, 2, 4, 8, 16, 32]
  assert points[0]["kl"] == 0 and points[0]["fraction"] is None
  for point in points[1:]:
    assert 0.8 < point["fraction"] < 1.001
    assert point["kl"] < point["kl_bound"]


def yardstick(many_XK):
  return Yardstick(None, [], many_XK.mean(1), many_XK, estimates.exact_frontier(many_XK))


# --- Flags ----------------------------------------------------------------------------------------


def test_all_methods_and_their_betas_by_default():
  methods = settings.read_methods("")
  assert methods == ["dpo", "dpo_again", "ipo", "on_policy", "sft", "best_of_n"]
  betas = settings.read_betas([], methods)
  assert betas == {name: list(method.betas) for name, method in settings.METHODS.items()}


def test_betas_of_one_method_leave_the_others():
  betas = settings.read_betas(["dpo:5,2.5,5"], ["dpo", "ipo"])
  assert betas["dpo"] == [5.0, 2.5]
  assert betas["ipo"] == list(settings.METHODS["ipo"].betas)


def test_a_quick_study_has_one_seed_and_one_beta_per_method_unless_given(tmp_path):
  # Runs the command itself, with the study replaced by an exit that prints what it was given.
  code = (
    "import runpy, sys; from dpo_jax.experiments import frontier;"
    "frontier.study = lambda out, settings, betas, seeds, **_: sys.exit(f'{betas} {seeds}');"
    "sys.argv = sys.argv[1:]; sys.path.insert(0, 'scripts');"
    "runpy.run_path(sys.argv[0], run_name='__main__')"
  )
  arguments = ["scripts/frontier.py", f"--out={tmp_path}", "--quick", "--betas=ipo:2,1"]
  finished = subprocess.run(
    [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
  )
  betas = {name: list(method.betas[:1]) for name, method in settings.METHODS.items()}
  assert finished.stderr.strip() == f"{betas | {'ipo': [2.0, 1.0]}} [0]"
  assert settings.read_seeds(None) == [0, 1, 2]
  assert settings.read_seeds("3,4", quick=True) == [3, 4]


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--out=a.txt"], "--out=a.txt: '.txt' is no kind of picture; end it in one of"),
    (["--out=file/a.png"], "file is a file, and nothing can lie in it"),
    (["--out=a.png", "--betas=1,nan"], "--betas=1,nan: give numbers from 0.01 to 1e6"),
  ],
)
def test_finite_samples_refuses_before_anything_is_drawn(flags, message, tmp_path):
  (tmp_path / "file").touch()
  finished = subprocess.run(
    [
      sys.executable,
      ROOT / "scripts/studies/finite_samples.py",
      *flags,
      "--samples=1",
      "--sizes=2",
    ],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert finished.returncode == 1 and finished.stdout == ""
  assert message in finished.stderr and finished.stderr.count("\n") == 1


@pytest.mark.parametrize(
  ("read", "message"),
  [
    (lambda: settings.read_methods("dpo,ppo"), "there is no 'ppo', only dpo, dpo_again"),
    (
      lambda: settings.read_methods(","),
      "--methods=,: a name is missing beside a comma",
    ),
    (lambda: settings.read_betas(["2.5"], ["dpo"]), "write METHOD:1,2,4 with METHOD one of dpo"),
    (lambda: settings.read_betas(["ipo:1"], ["dpo"]), "names no method with a β"),
    (lambda: settings.read_betas(["sft:1"], ["sft"]), "none: there is none"),
    (lambda: settings.read_betas(["dpo:1,x"], ["dpo"]), "--betas=dpo:1,x: 'x' is not a number"),
    (lambda: settings.read_betas(["on_policy:"], ["on_policy"]), "'' is not a number"),
    (lambda: settings.read_betas(["dpo:0"], ["dpo"]), "must be above 0"),
    (lambda: settings.read_betas(["dpo:nan"], ["dpo"]), "must be above 0"),
    (lambda: settings.read_seeds("0,1.5"), "--seeds=0,1.5: '1.5' is not an integer"),
    (lambda: settings.read_seeds("-1"), "-1 does not lie between"),
    (lambda: settings.check(settings.Settings(pairs=0)), "--pairs=0; it must be above 0"),
    (lambda: settings.check(settings.Settings(epochs=math.nan)), "--epochs=nan"),
    (
      lambda: settings.check(settings.Settings(eval_prompts=8)),
      "--frontier_prompts=32 are taken from --eval_prompts=8",
    ),
    (
      lambda: settings.check(settings.Settings(frontier_samples=1)),
      "must be 2 or more",
    ),
  ],
)
def test_bad_flags_report_the_value_and_the_way_out(read, message):
  with pytest.raises(UserError) as error:
    read()
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_the_command_refuses_before_anything_is_written(tmp_path):
  finished = subprocess.run(
    [sys.executable, ROOT / "scripts/frontier.py", f"--out={tmp_path / 'a'}", "--methods=ppo"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert finished.returncode == 1
  assert finished.stderr.startswith("error: --methods=ppo")
  assert finished.stderr.count("\n") == 1
  assert not (tmp_path / "a").exists()


# --- Folders and commands -------------------------------------------------------------------------


def test_a_study_of_other_settings_is_refused(tmp_path):
  settings.claim(tmp_path, settings.Settings(pairs=10))
  settings.claim(tmp_path, settings.Settings(pairs=10))
  with pytest.raises(UserError, match="pairs was 10, now 20"):
    settings.claim(tmp_path, settings.Settings(pairs=20))
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="is a file"):
    settings.claim(tmp_path / "file", settings.Settings())


def test_runs_are_ordered_by_seed():
  found = settings.tasks({"dpo": [2.0, 1.0], "sft": []}, [3, 4])
  one = [("dpo", 2.0), ("dpo", 1.0), ("sft", None)]
  assert found == [settings.Task(*what, seed) for seed in (3, 4) for what in one]


def test_every_point_has_a_folder_of_its_own(tmp_path):
  found = settings.tasks(settings.read_betas([], list(settings.METHODS)), [0, 1])
  folders = {task.folder(tmp_path) for task in found}
  assert len(folders) == len(found)
  assert tmp_path / "seed1" / "dpo-1.5" in folders
  assert tmp_path / "seed0" / "sft" in folders


@pytest.mark.parametrize("name", [name for name in settings.METHODS if name != "sft"])
def test_a_method_without_a_beta_is_refused_before_anything_is_written(name, tmp_path, monkeypatch):
  monkeypatch.setattr(runs, "run", lambda *_: pytest.fail("started"))
  out = tmp_path / "a"
  with pytest.raises(UserError, match=f"{name} is requested without a β"):
    frontier.study(out, settings.QUICK, {"sft": [], name: []}, [0], with_best_of_n=True)
  assert not out.exists()


@pytest.mark.parametrize("name", settings.METHODS)
def test_commands_contain_seed_and_data_and_no_unfilled_name(name, tmp_path):
  task = settings.Task(name, 0.5 if settings.METHODS[name].betas else None, 7)
  arguments = runs.command(task, tmp_path, settings.Settings())
  assert f"--workdir={task.folder(tmp_path)}" in arguments
  reference = tmp_path / "sft" / "export"
  if task.predecessor is None:
    assert f"--config.model.path={reference}" in arguments
  else:
    assert f"--config.model.path={tmp_path / 'seed7' / 'dpo-0.5' / 'export'}" in arguments
    assert f"--config.reference.path={reference}" in arguments
  assert "--config.seed=7" in arguments
  assert not any("{" in argument for argument in arguments)
  assert ("--config.loss.beta=0.5" in arguments) == (task.beta is not None)


def test_a_measured_point_is_not_trained_again(tmp_path, monkeypatch):
  monkeypatch.setattr(runs, "run", lambda *_: pytest.fail("trained"))
  task = settings.Task("dpo", 2.5, 0)
  task.folder(tmp_path).mkdir(parents=True)
  (task.folder(tmp_path) / "point.json").write_text(json.dumps({"kl": 1.0}))
  assert runs.train_point(task, tmp_path, settings.Settings(), None) == {"kl": 1.0}


def test_a_second_round_adds_as_many_pairs_of_the_first_rounds_policy(tmp_path, monkeypatch):
  seen = []

  def fake(words, log):
    assert words[:3] == ["-m", "dpo_jax", "make-pairs"]
    flags = dict(word.removeprefix("--").split("=", 1) for word in words[3:])
    seen.append(flags)
    pathlib.Path(flags["out"]).write_text(f"{flags['model']}\n", encoding="utf-8")

  monkeypatch.setattr(runs, "run", fake)
  (tmp_path / "seed3").mkdir()
  again = settings.Task("dpo_again", 1.5, 3)
  assert again.predecessor == settings.Task("dpo", 1.5, 3)
  for task in (again.predecessor, again, again):
    runs.make_training_pairs(task, tmp_path)
  reference, policy = tmp_path / "sft" / "export", tmp_path / "seed3" / "dpo-1.5" / "export"
  assert runs.training_pairs(again, tmp_path).read_text() == f"{reference}\n{policy}\n"
  assert len(seen) == 2 and seen[0]["seed"] != seen[1]["seed"]


def test_a_failed_run_is_one_line(tmp_path):
  log = tmp_path / "x.log"
  with pytest.raises(UserError, match=r"failed: error: no such thing .*x.log has all of it"):
    runs.run(["-c", "import sys; print(1); sys.exit('error: no such thing')"], log)
  assert log.read_text() == "1\nerror: no such thing\n"


# --- Results ----------------------------------------------------------------------------------


def point(method="dpo", beta=2.5, seed=0, kl=1.0, reward=4.0, fraction=0.8, **more):
  found = {"method": method, "beta": beta, "seed": seed, "n": None, "kl": kl, "reward": reward}
  return found | {"fraction": fraction, "within_reach": True, "seconds": 10.0} | more


def test_equal_kl_interpolates_within_each_seed():
  points = [
    point(kl=1.0, fraction=0.8),
    point(kl=3.0, fraction=1.0),
    point(kl=0.5, fraction=0.6, seed=1),
    point(kl=2.0, fraction=0.6, seed=1),
    point(kl=9.0, fraction=0.1, seed=1, within_reach=False),
  ]
  found = results.at_equal_kl(points, (0.5, 1.0, 2.0, 3.0))
  assert found[0] is None and found[3] is None  # one seed has no point on that side
  assert found[1:3] == pytest.approx([(0.8 + 0.6) / 2, (0.9 + 0.6) / 2])


def test_equal_kl_of_points_without_a_share_is_none():
  assert results.at_equal_kl([point(fraction=None)], (1.0,)) == [None]


def test_rows_are_means_over_seeds():
  rows = results.rows(
    [
      point(fraction=0.7, kl=1.0, reward=4.0, seconds=10.0),
      point(fraction=0.9, kl=2.0, reward=5.0, seconds=20.0, seed=1),
      point("sft", None, fraction=0.1),
      point("best_of_n", None, None, n=4, seconds=None, within_reach=False),
    ]
  )
  assert rows == [
    ["DPO", "β 2.5", "1.50", "4.50", "0.800 (0.700–0.900)", "15"],
    ["SFT on chosen", "–", "1.00", "4.00", "0.100", "10"],
    ["best of n", "n 4", "1.00", "4.00", "at most 0.800", "–"],
  ]


def test_summary_table_and_picture(tmp_path, capsys):
  many_XK = np.random.default_rng(0).normal(0, 3, (8, 256))
  found = yardstick(many_XK)
  points = [point(kl=k, beta=b, seed=s) for k, b in ((0.5, 4), (2, 1)) for s in (0, 1)]
  points += [point("sft", None, fraction=None), *best_of_n_points(found)]
  summary = results.summarise(settings.QUICK, found, points)
  json.dumps(summary, allow_nan=False)
  assert summary["exact"][0]["beta"] is None
  assert summary["fraction_at_kl"]["dpo"][:3] == pytest.approx([0.8, 0.8, 0.8])
  assert summary["fraction_at_kl"]["sft"] == [None] * len(results.KLS)
  results.show(summary)
  assert "SFT on chosen" in capsys.readouterr().out
  plots.save_png(results.draw(summary), tmp_path / "a.png")
  assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_small_study_from_nothing_and_repeated(tmp_path):
  sizes = "--pairs=200 --epochs=8 --sft_rows=320 --sft_steps=4 --eval_prompts=16"
  study = (
    f"dpo-jax frontier --out={tmp_path} --quick {sizes} --frontier_samples=32"
    " --methods=dpo,best_of_n --betas=dpo:2.5 --seeds=0"
  )
  first = in_process.run(study, tmp_path)
  assert first.status == 0, first.stderr
  summary = json.loads((tmp_path / "frontier.json").read_text())
  dpo = [point for point in summary["points"] if point["method"] == "dpo"]
  assert [(point["beta"], point["seed"]) for point in dpo] == [(2.5, 0)]
  assert dpo[0]["kl"] >= 0 and (tmp_path / "frontier.png").is_file()
  made = (tmp_path / "seed0" / "dpo-2.5" / "export" / "config.json").stat().st_mtime_ns
  assert in_process.run(study, tmp_path).status == 0
  assert json.loads((tmp_path / "frontier.json").read_text()) == summary
  assert (tmp_path / "seed0" / "dpo-2.5" / "export" / "config.json").stat().st_mtime_ns == made
