"""Whole runs on the embedded task, in the small: what comes out, what resumes, what is refused."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import dpo_jax
from configs import controlled as controlled_config
from configs import preferences
from dpo_jax import losses, step, train
from dpo_jax.controlled import reviews as controlled_reviews
from dpo_jax.controlled import word_tokenizer
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.monitoring.divergence import Diverged
from dpo_jax.monitoring.loggers import read_metrics
from dpo_jax.structs import UserError
from dpo_jax.training.checkpoint import Best, Checkpoints
from dpo_jax.training.setup import build
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("one_picture")

CLOCK = ("pairs_per_second", "tokens_per_second")


def write_rows(path: pathlib.Path, rows) -> str:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  return str(path)


def pairs_of(folder: pathlib.Path) -> list[dict[str, str]]:
  return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> pathlib.Path:
  """Tokenizer, texts and preferences of the embedded task, and a model trained on the texts."""
  folder = tmp_path_factory.mktemp("task")
  word_tokenizer.write(folder / "tokenizer", controlled_reviews.vocabulary())
  reviews = controlled_reviews.distinct(160, seed=0)
  write_rows(folder / "sft.jsonl", [{"prompt": p, "completion": a} for p, a in reviews])
  pairs = []
  for (prompt, answer), (_, other) in zip(reviews[::2], reviews[1::2], strict=True):
    ranked = sorted((answer, other), key=lambda text: -controlled_reviews.reward(prompt, text))
    pairs.append({"prompt": prompt, "chosen": ranked[0], "rejected": ranked[1]})
  write_rows(folder / "pairs.jsonl", pairs)
  train.execute(sft_config(folder), folder / "sft")
  return folder


def small(config: ConfigDict) -> ConfigDict:
  """A run of seconds."""
  config.train.steps = 6
  config.train.batch_size = 16
  config.eval.every = 3
  config.checkpoint.every = 3
  config.optimizer.warmup_steps = 2
  config.optimizer.schedule = "linear"
  config.data.row_length = 128
  return config


def sft_config(folder: pathlib.Path) -> ConfigDict:
  config = small(controlled_config.get_config("sft"))
  config.model.scratch.update(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=64,
  )
  config.model.tokenizer = str(folder / "tokenizer")
  config.data.path = str(folder / "sft.jsonl")
  return config


def dpo_config(folder: pathlib.Path) -> ConfigDict:
  config = small(controlled_config.get_config("dpo"))
  config.model.path = str(folder / "sft" / "export")
  config.data.path = str(folder / "pairs.jsonl")
  config.parallel.devices = 2
  return config


@pytest.fixture(scope="module")
def fitted(task):
  """A DPO run from its first step to its last, begun from Python, and what its callback saw."""
  told = []
  finished = dpo_jax.fit(
    config="controlled:dpo",
    model=task / "sft" / "export",
    data=task / "pairs.jsonl",
    steps=6,
    batch_size=16,
    eval={"every": 3},
    optimizer={"warmup_steps": 2, "schedule": "linear"},
    **{"checkpoint.every": "3", "data.row_length": 128, "parallel.devices": 2},
    workdir=task / "dpo",
    callbacks=lambda step, metrics: told.append((step, metrics)),
  )
  return finished, told


@pytest.fixture(scope="module")
def straight(fitted) -> pathlib.Path:
  """The folder of that run."""
  return fitted[0].workdir


def test_training_from_python_is_that_of_the_command(task, fitted):
  finished, told = fitted
  assert finished.workdir == task / "dpo" and (finished.export / "config.json").is_file()
  stored = json.loads((finished.workdir / "config.json").read_text())
  # What was left open is stored as it was chosen.
  config = dpo_config(task)
  assert (config.train.accumulate, config.model.remat) == (0, "auto")
  config.train.accumulate, config.model.remat = 1, "dots"
  assert stored == json.loads(config.to_json_best_effort())
  # Each step in order and each evaluation behind its step: a line of the file has both.
  assert [at for at, _ in told] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
  joined = {}
  for at, metrics in told:
    joined.setdefault(at, {"step": at}).update(metrics)
  assert list(joined.values()) == finished.metrics
  assert finished.metrics == read_metrics(finished.workdir / "metrics.jsonl")


def test_supervised_training_lowers_the_loss(task):
  losses = [
    line["eval/loss"]
    for line in read_metrics(task / "sft" / "metrics.jsonl")
    if "eval/loss" in line
  ]
  # An untrained model is uniform over the words.
  np.testing.assert_allclose(losses[0], np.log(len(controlled_reviews.vocabulary())), atol=0.2)
  assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.05


def test_a_run_leaves_what_it_promises(straight):
  names = {path.name for path in straight.iterdir()}
  assert {
    "config.json",
    "data.json",
    "metrics.jsonl",
    "checkpoints",
    "export",
    "report.html",
  } <= names
  assert any(name.startswith("events.") for name in names)
  ledger = json.loads((straight / "data.json").read_text())
  assert ledger["rows"] == 80 and ledger["pairs"] + sum(ledger["dropped"].values()) == 80
  lines = read_metrics(straight / "metrics.jsonl")
  assert [line["step"] for line in lines] == list(range(7))
  assert {"eval/loss", "eval/rewards/accuracies"} <= lines[0].keys()


def test_dpo_starts_at_log_2_with_every_margin_zero(straight):
  lines = read_metrics(straight / "metrics.jsonl")
  np.testing.assert_allclose(lines[1]["loss"], np.log(2), rtol=1e-5)
  np.testing.assert_allclose(lines[0]["eval/loss"], np.log(2), rtol=1e-5)
  # All margins are equal, in evaluation and, before the first update, in training.
  assert lines[0]["eval/rewards/accuracies"] == lines[1]["rewards/accuracies"] == 0.5
  assert lines[-1]["loss"] < np.log(2) - 0.01


def test_the_export_is_the_trained_policy_and_the_reference_is_untouched(task, straight):
  _, reference = hf_checkpoint.load(task / "sft" / "export")
  _, policy = hf_checkpoint.load(straight / "export")
  moved = np.abs(
    policy["params"]["embed"]["embedding"] - reference["params"]["embed"]["embedding"]
  ).max()
  assert moved > 1e-4


def resume_from_step_3(config: ConfigDict, straight: pathlib.Path) -> None:
  """The second half again, in a folder that a kill could have left: nothing differs by a bit."""
  resumed = straight.with_name(straight.name + "_resumed")
  shutil.copytree(straight, resumed)
  shutil.rmtree(resumed / "checkpoints" / "6")
  shutil.rmtree(resumed / "export")
  train.execute(config, resumed)
  bare = lambda line: {key: value for key, value in line.items() if key not in CLOCK}
  one, other = (read_metrics(folder / "metrics.jsonl") for folder in (straight, resumed))
  assert list(map(bare, one)) == list(map(bare, other))
  weights = [folder / "export" / "model.safetensors" for folder in (straight, resumed)]
  assert weights[0].read_bytes() == weights[1].read_bytes()


def test_resumed_is_straight_to_the_bit(task, straight):
  resume_from_step_3(dpo_config(task), straight)


@pytest.mark.slow
def test_what_evolves_beside_the_policy_resumes_too(task):
  """A reference that follows the policy (TR-DPO) and the running δ of bco_pair, under pmap."""
  config = dpo_config(task)
  config.loss.update(name="0.5*sigmoid + 0.5*bco_pair", running_decay=0.5)
  config.reference.update(sync_every=2, sync_alpha=0.6)
  config.parallel.update(mode="pmap", devices=2)
  train.execute(config, task / "follows")
  run, params, reference, _ = build(config, task / "follows")
  like = jax.eval_shape(lambda x: step.init_state(x, run.tx, run.objective.loss), params)
  checkpoints = Checkpoints(task / "follows" / "checkpoints")
  saved = checkpoints.restore(like._replace(reference=reference), 6)
  checkpoints.close()
  assert saved.running_stats["delta"] != 0
  table = lambda tree: np.asarray(tree["params"]["embed"]["embedding"])
  # Step 6 has just carried the reference most of the way to the policy.
  gone, left = (np.abs(table(saved.params) - table(x)).max() for x in (reference, saved.reference))
  assert 0 < left < gone
  resume_from_step_3(config, task / "follows")


@pytest.mark.slow
def test_a_mix_resumes_to_the_bit_and_not_as_another(task):
  rows = pairs_of(task)
  mix = {
    "a": {"path": write_rows(task / "a.jsonl", rows[:50]), "weight": 1.0},
    "b": {"path": write_rows(task / "b.jsonl", rows[50:70]), "weight": 2.0},
  }
  config = dpo_config(task)
  config.data.path, config.data.mix = "", mix
  config.data.eval_sets = {"rest": write_rows(task / "rest.jsonl", rows[70:])}
  train.execute(config, task / "mix")
  last = read_metrics(task / "mix" / "metrics.jsonl")[-1]
  assert last["by_source/a/pairs"] + last["by_source/b/pairs"] == 16
  assert last["eval/rest/loss"] == last["eval/loss"]  # the only evaluation set
  resume_from_step_3(config, task / "mix")
  config.data.mix.a.weight = 2.0
  with pytest.raises(UserError, match=r"data\.mix\.a\.weight was 1\.0, now 2\.0"):
    train.execute(config, task / "mix")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mesh", "pmap"])
def test_a_reference_that_is_an_average_resumes_too(task, mode):
  """Its mean is in the checkpoint; where it began comes from the model's folder again."""
  config = dpo_config(task)
  config.reference.update(sync_every=2, bema=True)
  config.parallel.update(mode=mode, devices=2)
  train.execute(config, task / f"average_{mode}")
  resume_from_step_3(config, task / f"average_{mode}")


def on_policy_config(folder: pathlib.Path) -> ConfigDict:
  config = small(controlled_config.get_config("on_policy"))
  config.model.path = str(folder / "sft" / "export")
  config.data.path = str(folder / "prompts.jsonl")
  config.data.eval_path = ""
  config.on_policy.max_tokens = 12
  config.data.row_length = 0
  config.eval.samples = 8
  config.train.batch_size = 8
  return config


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "prefer"), [("policy_gradient", "rank"), ("sigmoid", "bradley_terry")]
)
def test_training_on_samples_resumes_to_the_bit(task, name, prefer):
  """Order, samples and preferences are functions of the seed, the step and the policy."""
  write_rows(task / "prompts.jsonl", [{"prompt": row["prompt"]} for row in pairs_of(task)])
  config = on_policy_config(task)
  config.loss.name = name
  config.on_policy.prefer = prefer
  if prefer == "bradley_terry":
    config.parallel.update(mode="pmap", devices=2)
  train.execute(config, task / f"on_{name}")
  lines = read_metrics(task / f"on_{name}" / "metrics.jsonl")
  assert all(np.isfinite(line["reward"]) for line in lines[1:])
  assert lines[0]["eval/sampled/kl"] == 0 and lines[-1]["eval/sampled/kl"] != 0
  resume_from_step_3(config, task / f"on_{name}")


def test_samples_need_prompts_that_are_held_out(task):
  config = dpo_config(task)
  config.eval.samples = 8
  config.data.eval_fraction = 0.0
  with pytest.raises(UserError, match=r"eval\.samples is 8, .* data\.eval_fraction above 0"):
    train.execute(config, task / "unheld")
  assert not (task / "unheld").exists()


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_every_loss_is_reached_from_the_configuration(task, name):
  """Built from rows such as it wants, with the value that it has while policy equals reference."""
  config = dpo_config(task)
  config.loss.update(name=name, beta=None)
  rows = pairs_of(task)
  with_scores = [row | {"chosen_score": 2.0, "rejected_score": 1.0} for row in rows]
  config.data.path = write_rows(task / "scores.jsonl", with_scores)
  if name == "policy_gradient":
    config = on_policy_config(task)
    config.data.path = write_rows(task / "p.jsonl", [{"prompt": row["prompt"]} for row in rows])
  if losses.resolve(name).completions > 2:
    ranked = [
      {"prompt": row["prompt"], "answers": [row["chosen"], row["rejected"], row["chosen"] + " bad"]}
      for row in rows
    ]
    config.data.path = write_rows(task / "ranked.jsonl", ranked)
  run, _, reference, _ = build(config, task / "never")
  assert run.objective.loss.name == name
  assert (reference is None) == (name in losses.REFERENCE_FREE)
  completions = {"sft": 1, "npo": 1, "simnpo": 1, "tpo": 3, "policy_gradient": 4}
  assert run.objective.completions == completions.get(name, 2)


@pytest.mark.slow
def test_layouts_and_modes_take_the_same_steps(task, straight):
  """Padded rows under pmap on four devices, in micro-batches, against the run above."""
  config = dpo_config(task)
  config.data.layout = "padded"
  config.data.row_length = 64
  config.parallel.update(mode="pmap", devices=4)
  config.train.accumulate = 2
  train.execute(config, task / "padded")
  for one, other in zip(
    read_metrics(straight / "metrics.jsonl"),
    read_metrics(task / "padded" / "metrics.jsonl"),
    strict=True,
  ):
    for key in ("loss", "rewards/margins", "eval/loss"):
      if key in one:
        np.testing.assert_allclose(other[key], one[key], rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.parametrize(
  ("rate", "words"),
  [
    pytest.param(1e18, r"step \d: the loss is .*; no model is exported$", marks=pytest.mark.slow),
    (
      30.0,
      r"step 6: training has diverged: the loss is .* at the start\).*; no model is exported$",
    ),
  ],
)
def test_a_run_that_diverges_stops_with_the_likely_cause_and_keeps_what_was_good(task, rate, words):
  config = dpo_config(task)
  config.optimizer.update(learning_rate=rate, schedule="constant", warmup_steps=0)
  config.checkpoint.every = 1
  folder = task / f"burst_{rate}"
  with pytest.raises(Diverged, match=words) as error:
    train.execute(config, folder)
  assert "\n" not in str(error.value)
  assert f"Likely cause: optimizer.learning_rate={rate:g} is too high (usual: " in str(error.value)
  kept = [int(path.name) for path in (folder / "checkpoints").iterdir()]
  assert f"The checkpoint of step {max(kept)} is kept" in str(error.value)
  # The weights after step 1 are broken already, which shows in step 2: it is not saved any more.
  assert all(np.isfinite(_leaves(folder, step)).all() for step in kept) and max(kept) == 1
  assert (folder / "report.html").is_file() and not (folder / "export").exists()


def test_the_best_checkpoint_is_exported_where_that_is_set(task, monkeypatch, capsys):
  """The best is the one after step 3 here, whatever its numbers are."""
  monkeypatch.setattr(Checkpoints, "best", lambda self: Best(3, "rewards/accuracies", 0.75))
  config = dpo_config(task)
  config.export.best = True
  config.checkpoint.update(every=0, keep=9)  # each evaluation saves
  folder = train.execute(config, task / "best")
  result = json.loads((folder / "result.json").read_text())
  assert (result["step"], result["exported"], result["best"]["step"]) == (6, 3, 3)
  exported = hf_checkpoint.load(folder / "export")[1]
  leaves = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(exported)])
  np.testing.assert_array_equal(leaves, _leaves(folder, 3))
  assert "| exported step | 3 |" in (folder / "export" / "README.md").read_text()
  # The verdict and the card are about what is exported.
  accuracy = read_metrics(folder / "metrics.jsonl")[3]["eval/rewards/accuracies"]
  assert f"→ {accuracy:.1%} (95%" in result["result"]
  said = capsys.readouterr().out.splitlines()
  assert f"exporting to {folder / 'export'}, the best checkpoint (step 3)" in said
  assert len(said[said.index(result["result"]) + 2 :]) <= 5


def command(script: str, *arguments: str) -> subprocess.CompletedProcess:
  """Runs one of the scripts as a user would."""
  return subprocess.run(
    [sys.executable, str(ROOT / "scripts" / script), *arguments],
    capture_output=True,
    text=True,
    check=False,
    cwd=ROOT,
  )


def test_a_converted_checkpoint_is_the_export(straight, tmp_path):
  done = command("convert_hf.py", f"--workdir={straight}", f"--out={tmp_path / 'hf'}")
  assert done.returncode == 0, done.stderr
  for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md"):
    assert (tmp_path / "hf" / name).read_bytes() == (straight / "export" / name).read_bytes()
  again = command("convert_hf.py", f"--workdir={straight}", f"--out={tmp_path / 'hf'}")
  assert again.returncode == 1 and again.stderr.startswith("error: ")


@pytest.mark.slow
def test_the_export_speaks_the_same_words_for_the_same_seed(straight):
  ask = (f"--model={straight / 'export'}", "--prompt=I read this novel.", "--max_tokens=8")
  one, two, other = (
    command("sample.py", *ask, *more) for more in (["--seed=1"], ["--seed=1"], ["--seed=2"])
  )
  assert one.returncode == 0, one.stderr
  assert one.stdout.startswith("I read this novel.") and one.stdout == two.stdout != other.stdout


def _leaves(run, step):
  import jax

  from dpo_jax.training.checkpoint import Checkpoints

  params = Checkpoints(run / "checkpoints", keep=9).restore_params(step)
  return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)])


def _broken(folder, **changes):
  config = dpo_config(folder)
  config.update_from_flattened_dict(changes)
  return config


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"data.path": ""}, "data.path is empty"),
    ({"data.path": "no/such.jsonl"}, "no data file"),
    ({"model.path": "no/such"}, "no/such"),
    ({"model.path": ""}, "model.path is empty"),
    ({"loss.name": "sigmod"}, "did you mean 'sigmoid'"),
    ({"loss.label_smoothing": 0.1}, "does not read label_smoothing"),
    ({"loss.beta": -1.0}, "above 0"),
    ({"train.batch_size": 31}, "not divisible by 2 devices"),
    ({"data.max_length": 2}, "max_length"),
    ({"data.max_length": 1}, "needs 2 tokens"),
    ({"data.layout": "ragged"}, "layout"),
    ({"data.eval_fraction": 1.5}, "eval"),
    ({"model.compute_dtype": "float31"}, "float31"),
    ({"optimizer.schedule": "steps"}, "known: constant"),
    ({"parallel.mode": "ddp"}, "known: mesh, pmap"),
    ({"train.steps": -1}, "train.steps"),
    ({"data.row_length": 8}, "raise row_length"),
  ],
)
def test_bad_input_is_one_line_and_leaves_no_trace(task, tmp_path, changes, words):
  with pytest.raises(UserError, match=words) as error:
    train.execute(_broken(task, **changes), tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_bfloat16_policy_starts_as_its_reference_and_learns(task, straight, capsys):
  """The reference is taken from the rounded weights; a resumed run rounds as one left alone."""
  config = dpo_config(task)
  config.model.param_dtype = "bfloat16"
  config.optimizer.learning_rate = 1e-4  # an update is less than half an ulp of most weights
  train.execute(config, task / "narrow")
  said = capsys.readouterr().out
  assert "check passed: loss at the start is log 2 = 0.693147" in said
  assert "bfloat16 weights: step 1 changed" in said and "alert" not in said
  resume_from_step_3(config, task / "narrow")
  lines = read_metrics(task / "narrow" / "metrics.jsonl")[1:]
  # In expectation the whole update arrives, in few of the weights.
  np.testing.assert_allclose([line["update/kept"] for line in lines], 1.0, atol=0.2)
  assert all(line["update/changed"] < 0.5 for line in lines)
  for name, parallel in {"pmap": {"mode": "pmap"}, "fsdp": {"fsdp": 2}}.items():
    config.parallel.update(parallel)
    train.execute(config, task / name)
    config.parallel.update(mode="mesh", fsdp=1)
    for one, other in zip(lines, read_metrics(task / name / "metrics.jsonl")[1:], strict=True):
      # Gradients are bfloat16, and devices add theirs in another order.
      np.testing.assert_allclose(other["loss"], one["loss"], rtol=2e-3)
      np.testing.assert_allclose(other["update/changed"], one["update/changed"], rtol=0.1)


def test_broken_weights_are_found_before_the_folder_is_claimed(task, tmp_path):
  broken = tmp_path / "broken"
  shutil.copytree(task / "sft" / "export", broken)
  model_config, params = hf_checkpoint.load(broken)
  scale = params["params"]["final_norm"]["scale"]
  params["params"]["final_norm"]["scale"] = np.full_like(scale, 1e38)
  hf_checkpoint.save(broken, model_config, params, source=task / "sft" / "export")
  config = dpo_config(task)
  config.model.path = str(broken)
  with pytest.raises(UserError, match="not finite before any training"):
    train.execute(config, tmp_path / "run")
  assert not (tmp_path / "run" / "config.json").exists()


def test_a_loss_argument_is_reachable_from_the_command_line(task, tmp_path):
  """An override of an argument that the configuration leaves open, beside short flags."""
  done = subprocess.run(
    [
      *(sys.executable, "-m", "dpo_jax", "train", "--model", task / "sft" / "export"),
      *("--data", task / "pairs.jsonl", "--loss", "robust", "--beta", "0.1", "--lr", "1e-6"),
      "--config.loss.label_smoothing=0.7",
    ],
    capture_output=True,
    text=True,
    check=False,
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  assert done.returncode == 1
  assert done.stderr.strip().startswith("error: loss.label_smoothing is 0.7")
  assert not any(tmp_path.iterdir())  # no folder of a run that did not begin


def test_a_finished_run_says_so_and_another_may_take_its_place(task, straight, capsys):
  capsys.readouterr()
  before = (straight / "export" / "model.safetensors").stat().st_mtime_ns
  train.execute(dpo_config(task), straight)
  said = capsys.readouterr().out
  assert f"{straight} has finished all 6 steps; to train longer, raise" in said
  assert "held out (8 pairs): accuracy 50.0% → " in said and f"--model={straight}/export" in said
  assert (straight / "export" / "model.safetensors").stat().st_mtime_ns == before
  anew = straight.with_name("anew")
  shutil.copytree(straight, anew)
  (anew / "notes.txt").touch()  # of another run's folder nothing is lost
  train.execute(dpo_config(task), anew, overwrite=True)
  aside = anew.with_name("anew.old-1")
  assert f"the run that was in {anew} is now in {aside}" in capsys.readouterr().out
  assert (aside / "notes.txt").is_file() and not (anew / "notes.txt").exists()
  # It began anew: the same steps, with the same numbers.
  weights = [folder / "export" / "model.safetensors" for folder in (aside, anew)]
  assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_saves_and_says_how_to_continue(task):
  """The first one; what comes before training and the second are in tests/utils."""
  words = [
    *(sys.executable, "-m", "dpo_jax.train", "--config=configs/preferences.py"),
    *(f"--workdir={task / 'stopped'}", f"--config.model.path={task / 'sft' / 'export'}"),
    *(f"--config.data.path={task / 'pairs.jsonl'}", "--config.train.batch_size=16"),
    *("--config.train.steps=9999", "--config.data.row_length=128", "--overwrite"),
  ]
  lines = task / "stopped" / "metrics.jsonl"
  with subprocess.Popen(
    words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  ) as process:
    while process.poll() is None and not (lines.is_file() and len(read_metrics(lines)) > 2):
      time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.stdout.read()
  step = read_metrics(lines)[-1]["step"]
  assert process.returncode == 130 and "Traceback" not in said
  assert "stopping: this step is finished and saved first; Ctrl-C again stops at once" in said
  assert f"stopped and saved at step {step} of 9999" in said
  assert (task / "stopped" / "report.html").is_file()
  assert [path.name for path in (task / "stopped" / "checkpoints").iterdir()] == [str(step)]
  command = shlex.join(["python", *words[1:-1]])  # with --overwrite it would start anew
  assert said.splitlines()[-1] == f"continue: {command}"


def test_another_configuration_in_the_same_folder_is_refused(task, straight):
  before = (straight / "metrics.jsonl").read_bytes()
  config = dpo_config(task)
  config.loss.beta = 0.7
  with pytest.raises(UserError, match=r"loss\.beta was 2\.5, now 0\.7"):
    train.execute(config, straight)
  assert (straight / "metrics.jsonl").read_bytes() == before


def swap_labels(data: bytes) -> bytes:
  rows = map(json.loads, data.splitlines())
  swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
  return "".join(json.dumps(row) + "\n" for row in swapped).encode()


def flip_last_bit(data: bytes) -> bytes:
  return data[:-1] + bytes([data[-1] ^ 1])


def change_epsilon(data: bytes) -> bytes:
  return json.dumps(json.loads(data) | {"rms_norm_eps": 1e-5}).encode()


@pytest.mark.parametrize(
  ("name", "change", "words"),
  [
    # As many rows, of the same lengths: only what they say is other.
    ("pairs.jsonl", swap_labels, r"the rows to train on \(.*\), the held-out rows \(.*\)\. Put"),
    ("sft/export/model.safetensors", flip_last_bit, r"began: the weights at model\.path="),
    ("sft/export/config.json", change_epsilon, r"began: config\.json at model\.path="),
  ],
)
def test_a_finished_run_whose_inputs_changed_is_not_done(task, straight, name, change, words):
  file = task / name
  before, kept = file.read_bytes(), (straight / "metrics.jsonl").read_bytes()
  file.write_bytes(change(before))
  try:
    with pytest.raises(UserError, match=words):
      train.execute(dpo_config(task), straight)
  finally:
    file.write_bytes(before)
  assert (straight / "metrics.jsonl").read_bytes() == kept


@pytest.mark.slow
def test_a_run_that_is_given_more_steps_is_one_that_had_them(task):
  """At a constant rate: three steps and three more are six, to the bit."""
  config = dpo_config(task)
  config.optimizer.schedule = "constant"
  config.train.steps = 3
  train.execute(config, task / "longer")
  config.train.steps = 6
  train.execute(config, task / "at_once")
  train.execute(config, task / "longer")
  assert json.loads((task / "longer" / "config.json").read_text())["train"]["steps"] == 6
  weights = [task / name / "export" / "model.safetensors" for name in ("longer", "at_once")]
  assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_configuration_argument_of_preferences(task):
  config = preferences.get_config("model=m,data=d,loss=ipo,beta=0.3")
  assert (config.model.path, config.data.path) == ("m", "d")
  assert (config.loss.name, config.loss.beta) == ("ipo", 0.3)
  with pytest.raises(UserError, match="lr=1"):
    preferences.get_config("lr=1")
