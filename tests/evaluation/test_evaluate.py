"""Tests of evaluation on a language so small that every completion can be listed."""

import dataclasses
import itertools
import json
import pathlib
import re
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import logprobs
from dpo_jax.controlled import word_tokenizer
from dpo_jax.data import tokenizer
from dpo_jax.data.collate import collate
from dpo_jax.data.examples import Example
from dpo_jax.evaluation import estimates, evaluate
from dpo_jax.generation import rewards, rollouts
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.model import families, transformer
from dpo_jax.structs import UserError
from dpo_jax.utils import files
from tests.support import in_process, tiny
from tests.support.paths import ROOT

WORDS = (".", " a", " b")  # ids 3, 4, 5 after <unk>, <s>, </s>
END, LONGEST = 2, 3
PROMPTS = ["a a.", " b b.", " b."]
SIZES = {"num": 1024, "frontier_prompts": 3, "frontier_samples": 2048, "max_tokens": LONGEST}


def wanted(prompt, answer):
  """Returns a reward for the tests: a is good, b is bad, and both count more after a full stop."""
  return answer.count("a") - answer.count("b") * (1.5 if "." in prompt else 1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Makes model folders of one shape and tokenizer: seed -> path."""
  root = tmp_path_factory.mktemp("models")
  word_tokenizer.write(root / "tokenizer", WORDS)
  fields = {
    "model_type": "llama",
    "vocab_size": 6,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": END,
  }
  config = families.from_hf(fields)
  for seed in (0, 1):
    params = transformer.init_params(config, seed)
    hf_checkpoint.save(
      root / str(seed), config, jax.tree.map(np.asarray, params), source=root / "tokenizer"
    )
  return lambda seed: root / str(seed)


@pytest.fixture(scope="module")
def models(folders):
  return rollouts.load(folders(0)), rollouts.load(folders(1))


def every_answer():
  """Lists all completions of at most LONGEST tokens, ended or cut."""
  others = [id for id in range(6) if id != END]
  ended = [(*start, END) for n in range(LONGEST) for start in itertools.product(others, repeat=n)]
  return ended + list(itertools.product(others, repeat=LONGEST))


def log_probs(model, prompt):
  """Computes log π(y|x) of every completion to a prompt, in nats."""
  ids = np.array(model.tokenizer.encode_prompt(prompt), np.int32)
  examples = [Example(ids, (np.array(answer, np.int32),)) for answer in every_answer()]
  return evaluate.scorer(model.config)(model.params, examples).logp_BK[:, 0]


# --- Log-probs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("completions", [1, 2, 3])
def test_scorer_gives_every_answer_its_own_log_prob(completions):
  # Compares ragged batches and packed rows with the naive path, one example per batch.
  examples = tiny.with_context(tiny.pairs(7, completions=completions))
  params = tiny.init()
  scores = evaluate.make_scorer(tiny.MODEL, batch_size=3)(params, examples)

  @jax.jit
  def naive(params, batch):
    hidden = tiny.MODEL.hidden(params, batch)
    return logprobs.naive_slot_logps(hidden, tiny.MODEL.head(params), batch)

  for example, logp_K, tokens_K in zip(examples, *scores, strict=True):
    batch = collate([example], layout="padded", row_length=32)
    alone = naive(params, batch)
    np.testing.assert_allclose(logp_K, np.asarray(alone).reshape(-1)[:completions], rtol=1e-5)
    assert tokens_K.tolist() == [weights.sum() for weights in example.token_weights]
  # Numbers of tokens are whole.
  plain = evaluate.count_tokens(tiny.pairs(7, completions=completions))
  assert plain.dtype == int and plain[0, 0] == len(examples[0].completions[0])


def test_scores_as_pairs():
  pairs = evaluate.Scores(np.array([[-1.0, -2.0]]), np.array([[3, 4]])).pairs()
  assert [float(x[0]) for x in pairs] == [-1, -2, 3, 4]


def test_probabilities_of_all_answers_add_up_to_one(models):
  for model, prompt in itertools.product(models, PROMPTS):
    np.testing.assert_allclose(np.exp(log_probs(model, prompt)).sum(), 1, rtol=1e-5)


# --- Samples --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sampled_measures_agree_with_the_listed_language(models):
  policy, reference = models
  found = evaluate.evaluate_samples(
    policy,
    reference,
    PROMPTS,
    wanted,
    seed=0,
    **SIZES,
  )
  completions = [policy.tokenizer.decode(ids) for ids in every_answer()]
  kl, ours, theirs, points = [], [], [], []
  betas = np.geomspace(0.1, 50, 200)[:, None]
  for prompt in PROMPTS:
    reward_Y = np.array([wanted(prompt, answer) for answer in completions])
    ours_Y, theirs_Y = log_probs(policy, prompt), log_probs(reference, prompt)
    kl.append(np.exp(ours_Y) @ (ours_Y - theirs_Y))
    ours.append(np.exp(ours_Y) @ reward_Y)
    theirs.append(np.exp(theirs_Y) @ reward_Y)
    tilted = theirs_Y + reward_Y / betas
    log_z = np.logaddexp.reduce(tilted, axis=1)
    best = np.exp(tilted - log_z[:, None]) @ reward_Y
    points.append((best / betas[:, 0] - log_z, best))
  # The standard deviation of one prompt's mean is about 1.5 / √1024 = 0.05.
  np.testing.assert_allclose(found["kl"], np.mean(kl), atol=0.1)
  np.testing.assert_allclose(found["reward_policy"], np.mean(ours), atol=0.1)
  np.testing.assert_allclose(found["reward_reference"], np.mean(theirs), atol=0.1)
  kl_F, reward_F = np.mean(points, axis=0)[:, ::-1]
  best = np.interp(found["kl"], kl_F, reward_F)
  np.testing.assert_allclose(found["frontier_reward_at_kl"], best, atol=0.1)
  fraction = (found["reward_policy"] - found["reward_reference"]) / (
    found["frontier_reward_at_kl"] - found["reward_reference"]
  )
  np.testing.assert_allclose(found["fraction_of_frontier_gain"], fraction)
  assert found["fraction_of_frontier_gain"] < 1


def test_a_policy_that_is_its_reference_is_nowhere(models):
  model, _ = models
  found = evaluate.evaluate_samples(
    model,
    model,
    PROMPTS,
    wanted,
    seed=1,
    **SIZES,
  )
  assert found["kl"] == 0
  assert found["fraction_of_frontier_gain"] is None
  assert abs(found["win_rate"] - 0.5) < 0.04  # four deviations, with 3 x 1024 samples a side
  json.dumps(found, allow_nan=False)


def test_drawn_answers_are_what_was_sampled(models):
  model, _ = models
  rollout = rollouts.sample(model, PROMPTS, wanted, num=3, max_tokens=LONGEST, seed=5)
  again = rollouts.sample(model, PROMPTS, wanted, num=3, max_tokens=LONGEST, seed=5)
  assert rollout.completion_ids == again.completion_ids
  for x, prompt in enumerate(PROMPTS):
    for answer, ids, reward in zip(
      rollout.completions[x], rollout.completion_ids[x], rollout.reward_XK[x], strict=True
    ):
      assert answer == model.tokenizer.decode(ids)
      assert reward == wanted(prompt, answer)
      assert len(ids) == LONGEST or ids[-1] == END


# --- Labels ---------------------------------------------------------------------------------------


def _rollout(reward_XK):
  """Makes a rollout of distinct completions with the given rewards."""
  reward_XK = np.asarray(reward_XK, np.float64)
  names = [[f"{s}" for s in range(reward_XK.shape[1])]] * len(reward_XK)
  ids = [[[s] for s in range(reward_XK.shape[1])]] * len(reward_XK)
  return rollouts.Rollout(["p"] * len(reward_XK), [[1]] * len(reward_XK), names, ids, reward_XK)


@pytest.mark.parametrize("margin", [0.0, 1.0, -2.0])
def test_labels_follow_bradley_and_terry(margin):
  count = 20_000
  rows = rollouts.label(_rollout(np.tile([[3.0 + margin, 3.0]], (count, 1))))
  share = np.mean([row["chosen_ids"] == [0] for row in rows])
  expected = 1 / (1 + np.exp(-margin))
  assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / count)


def test_labels_are_sure_where_rewards_are_far_apart():
  rows = rollouts.label(_rollout(np.tile([[1e5, -1e5, -1e5, 1e5]], (10, 1))))
  assert [row["chosen"] for row in rows] == ["0", "3"] * 10
  assert all(row["chosen_reward"] == 1e5 for row in rows)
  assert all(row["rejected_reward"] == -1e5 for row in rows)


def test_equal_answers_make_no_pair():
  rollout = _rollout([[1.0, 2.0]])._replace(completion_ids=[[[7], [7]]])
  assert rollouts.label(rollout) == []


# --- Pairs ----------------------------------------------------------------------------------------


def test_rows_of_scores(models):
  policy, reference = models
  examples = [Example(np.array([1, 4]), (np.array([5, 5, 2]), np.array([4, 2])), row=7)]
  ask = evaluate.resolve_pair_loss("sigmoid", 0.5)
  (row,) = evaluate.score_pairs(policy, reference, examples, ask)
  assert (row["chosen_tokens"], row["rejected_tokens"]) == (3, 2)
  np.testing.assert_allclose(
    row["chosen_reward"], 0.5 * (row["chosen_logp"] - row["ref_chosen_logp"])
  )
  margin = row["chosen_reward"] - row["rejected_reward"]
  np.testing.assert_allclose(row["loss"], np.log1p(np.exp(-margin)), rtol=1e-5)
  (alone,) = evaluate.score_pairs(policy, None, examples, ask)
  assert row["row"] == alone["row"] == 7
  assert set(alone) == {"row", "chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens"}


def test_pairs_are_read_with_and_without_a_reference(models, tmp_path, capsys):
  policy, reference = models
  rows = [
    {"prompt": " a", "chosen": " a", "rejected": " b"},
    {"prompt": " a", "chosen": " a", "rejected": " a"},
  ]
  files.write_json_lines(tmp_path / "rows.jsonl", rows)
  (example,) = evaluate.read_pairs(tmp_path / "rows.jsonl", policy, None)
  assert "2 rows (strings), 1 kept, 1 dropped: equal completions" in capsys.readouterr().err
  assert [x.tolist() for x in (example.prompt, *example.completions)] == [
    [1, 4],
    [4, END],
    [5, END],
  ]
  assert len(evaluate.read_pairs(tmp_path / "rows.jsonl", policy, reference)) == 1
  word_tokenizer.write(tmp_path / "swapped", [" b", " a"])
  other = reference._replace(tokenizer=tokenizer.load_tokenizer(tmp_path / "swapped"))
  with pytest.raises(UserError, match="have different tokenizers"):
    evaluate.read_pairs(tmp_path / "rows.jsonl", policy, other)
  other = reference._replace(config=dataclasses.replace(reference.config, vocab=7))
  with pytest.raises(UserError, match="6 and 7 tokens"):
    evaluate.read_pairs(tmp_path / "rows.jsonl", policy, other)
  # " b" is 5, the last of six ids: beyond a model of five it would be read as another token.
  narrow = policy._replace(config=dataclasses.replace(policy.config, vocab=5))
  with pytest.raises(UserError, match="contains token id 5, and the model's vocabulary is 5"):
    evaluate.read_pairs(tmp_path / "rows.jsonl", narrow, None)


def test_pairs_under_the_reference_itself(models):
  model, _ = models
  examples = [Example(np.array([1, 4]), (np.array([5, 5, 2]), np.array([4, 2])))] * 3
  found = evaluate.evaluate_pairs(
    model, model, examples, evaluate.resolve_pair_loss("sigmoid", 0.1)
  )
  assert (found["pairs"], found["eval_accuracy"], found["eval_margin"]) == (3, 0.5, 0)
  np.testing.assert_allclose(found["eval_loss"], np.log(2), rtol=1e-6)


def test_a_loss_of_scored_pairs_reads_the_scores(models):
  """At the reference odpo is log(1 + e^Δ); rows without scores are refused."""
  model, _ = models
  plain = Example(np.array([1, 4]), (np.array([5, 5, 2]), np.array([4, 2])))
  scored = plain._replace(scores=(2.0, 0.5))
  ask = evaluate.resolve_pair_loss("odpo", 0.1)
  found = evaluate.evaluate_pairs(model, model, [scored] * 2, ask)
  np.testing.assert_allclose(found["eval_loss"], np.log1p(np.exp(1.5)), rtol=1e-6)
  with pytest.raises(UserError, match="give them a field margin"):
    evaluate.evaluate_pairs(model, model, [plain] * 2, ask)


def test_a_supervised_loss_is_no_loss_of_pairs():
  with pytest.raises(UserError, match="not computed from pairs"):
    evaluate.resolve_pair_loss("sft", 0.1)


# --- Rewards by name ------------------------------------------------------------------------------


def test_rewards_by_name_and_by_path():
  assert rewards.resolve("controlled") is rewards.REWARDS["controlled"]
  assert rewards.resolve("operator:add") is __import__("operator").add


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("controled", r"did you mean 'controlled'\? Give your own as module:function"),
    ("", r"there is controlled\. Give your own as module:function"),
    (":f", "':f' names no module; write it as module:function"),
    ("math:", "'math:' names no function"),
    (
      "no_such_module:f",
      "no module named 'no_such_module' is in the current folder, on",
    ),
    ("math:no_such", "'math'.* has no 'no_such'"),
    ("math:pi", "no function but float"),
    ("os:getcwd", r"'os:getcwd' takes \(\); it must take \(prompt, completion\)"),
    ("json:dumps", r"'json:dumps' takes \(obj, .* it must take"),
    (".x:f", "importing '.x' fails with TypeError"),
  ],
)
def test_a_reward_that_does_not_exist(name, message):
  with pytest.raises(UserError, match=message):
    rewards.resolve(name)


@pytest.mark.parametrize(
  "value", [float("nan"), None, "good", "0.5", b"1", [1.0, 2.0], 1e300, -(10**400)]
)
def test_a_reward_that_is_no_number(value):
  says = re.escape(
    f"gave {value!r} for prompt 'p' and completion 'a'; it must give one finite number"
  )
  with pytest.raises(UserError, match=says):
    rewards.values(lambda prompt, answer: value, ["p"], ["a"])


def test_rewards_of_every_kind_of_number():
  given = [True, 2, np.float32(0.5), np.array(3.0), jnp.array(4.0), 3e38]
  found = rewards.values(lambda prompt, answer: given[int(answer)], "pppppp", "012345")
  np.testing.assert_array_equal(found, [1, 2, 0.5, 3, 4, 3e38])


def test_a_reward_that_fails_is_named():
  with pytest.raises(UserError, match=r"the reward sub fails with TypeError: .* for prompt 'p'"):
    rewards.values(rewards.resolve("operator:sub"), ["p"], ["a"])

  def leaves(prompt, answer):
    sys.exit(3)

  with pytest.raises(
    UserError, match=r"fails with SystemExit: 3, for prompt 'p' and completion 'a'"
  ):
    rewards.values(leaves, ["p"], ["a"])


def test_a_reward_of_the_current_folder(tmp_path, monkeypatch):
  # As in a command of scripts/, which has the project on its path and not the current folder.
  away = {"", str(pathlib.Path.cwd()), str(tmp_path)}
  monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in away])
  monkeypatch.chdir(tmp_path)
  (tmp_path / "reward_of_this_folder.py").write_text("def f(prompt, answer):\n  return 7.0\n")
  found = rewards.resolve("reward_of_this_folder:f")
  np.testing.assert_array_equal(rewards.values(found, ["p"], ["a"]), [7.0])


@pytest.mark.parametrize(
  ("body", "says"),
  [
    ("import sys; sys.exit(3)", "SystemExit: 3"),
    ("raise ValueError('of its own')", "ValueError: of its own"),
    ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
  ],
)
def test_a_module_that_fails_is_told_from_one_that_is_missing(body, says, tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "path", [*sys.path])
  monkeypatch.chdir(tmp_path)
  name = f"reward_that_fails_{len(body)}"
  (tmp_path / f"{name}.py").write_text(body)
  with pytest.raises(UserError, match=f"importing '{name}' fails with {says}"):
    rewards.resolve(f"{name}:f")


# --- The commands ---------------------------------------------------------------------------------


def _run(script, **options):
  flags = [f"--{name}={value}" for name, value in options.items()]
  return in_process.run(shlex.join(["dpo-jax", script, *flags]), ROOT)


@pytest.mark.slow
def test_pairs_scores_and_summary_by_command(folders, tmp_path):
  prompts, pairs = tmp_path / "prompts.jsonl", tmp_path / "pairs.jsonl"
  files.write_json_lines(prompts, [{"prompt": prompt} for prompt in PROMPTS * 4])
  models = {"model": folders(1), "reference": folders(0)}
  sampling = {"prompts": prompts, "reward": "controlled", "max_tokens": 6}
  done = _run("make_pairs", model=folders(0), out=pairs, **sampling)
  assert done.status == 0, done.stderr
  made = [json.loads(line) for line in pairs.read_text().splitlines()]
  assert made

  done = _run("score", **models, data=pairs, out=tmp_path / "scores.jsonl")
  assert done.status == 0, done.stderr
  scored = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
  assert [row["chosen_tokens"] for row in scored] == [len(row["chosen_ids"]) for row in made]

  out = tmp_path / "run" / "summary.json"
  sizes = {"samples_per_prompt": 2, "frontier_prompts": 2, "frontier_samples": 32}
  done = _run("evaluate", **models, data=pairs, out=out, **sampling, **sizes)
  assert done.status == 0, done.stderr
  summary = json.loads(out.read_text())
  assert {
    "reward_reference",
    "reward_policy",
    "win_rate",
    "kl",
    "eval_accuracy",
    "frontier_reward_at_kl",
    "fraction_of_frontier_gain",
    "seconds",
  } <= set(summary)
  assert summary["pairs"] == len(made)
  assert (out.parent / "report.html").is_file()
  margins = [row["chosen_reward"] - row["rejected_reward"] for row in scored]
  np.testing.assert_allclose(summary["eval_margin"], np.mean(margins), rtol=1e-4, atol=1e-5)
  assert summary["frontier"][0]["kl"] == 0
  assert max(p["effective_samples"] for p in summary["frontier"]) <= 32
  assert min(p["effective_samples"] for p in summary["frontier"]) >= estimates.MIN_EFFECTIVE


@pytest.mark.parametrize(
  ("script", "change", "message"),
  [
    ("make_pairs", {"num": 3}, "--num=3 completions do not pair up; give an even number"),
    ("make_pairs", {"prompts": "missing.jsonl"}, "no data file missing.jsonl"),
    ("make_pairs", {"model": "missing"}, "there is no folder missing"),
    ("make_pairs", {"temperature": 0}, "every pair has two equal completions"),
  ],
)
def test_bad_input_is_one_line_and_nothing_written(folders, tmp_path, script, change, message):
  prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
  files.write_json_lines(prompts, [{"prompt": PROMPTS[0]}])
  options = {"model": folders(0), "prompts": prompts, "reward": "controlled", "out": out}
  done = _run(script, **options | change)
  assert done.status == 1
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
  assert message in done.stderr
  assert not out.exists()


def test_prompts_that_no_model_can_read(models, tmp_path):
  path = tmp_path / "prompts.jsonl"
  path.write_text('{"prompt": "\\ud800"}\n')
  with pytest.raises(UserError, match=r"jsonl:1: field 'prompt': text is not valid Unicode"):
    rollouts.read_prompts(path)
  for row, says in (
    ('{"prompt": ""}', "field 'prompt' is an empty text"),
    ('{"prompt": []}', "field 'prompt' is an empty list"),
    ('{"prompt": 3}', "field 'prompt' is 3; it must be a text or a list of messages"),
    ('{"question": "a"}', "field 'prompt' is missing; the row has question"),
  ):
    path.write_text(row)
    with pytest.raises(UserError, match=f"prompts.jsonl:1: {says}"):
      rollouts.read_prompts(path)
  path.write_text('{"prompt": [{"role": "user"}]}\n')
  with pytest.raises(UserError, match=r"prompts.jsonl:1: .* a message is a role and a text"):
    rollouts.read_prompts(path)
  with pytest.raises(UserError, match="prompt 1: text is not valid Unicode"):
    rollouts.encode_prompts(models[0].tokenizer, [" a", "\udcff"])
  folder = tmp_path / "chat"
  word_tokenizer.write(folder, WORDS)
  (folder / "chat_template.jinja").write_text("{{ 1 | no_such }}")
  with pytest.raises(UserError, match=r"prompt 0: chat template: .*no_such"):
    rollouts.encode_prompts(tokenizer.load_tokenizer(folder), [[{"role": "user", "content": "a"}]])


@pytest.mark.parametrize("script", ["score", "evaluate", "make_pairs", "sample"])
def test_commands_overwrite_nothing_and_say_so_before_they_load(tmp_path, script):
  out = tmp_path / "out.jsonl"
  out.write_text("kept")
  sampling = {"prompts": "missing", "reward": "controlled"}
  scoring = {"data": "missing"} | ({"reference": "missing"} if script == "evaluate" else {})
  rest = {"make_pairs": sampling, "sample": {"prompts": "missing"}}.get(script, scoring)
  done = _run(script, model="missing", out=out, **rest)
  assert (done.status, done.stderr) == (
    1,
    f"error: --out={out} exists; add --force to replace it, or name another file\n",
  )
  assert out.read_text() == "kept"


def test_lines_round_the_table_wrap_between_words_in_a_terminal(monkeypatch, capsys):
  note = "held out (87 pairs): " + "accuracy 50.0% → 86.2%, " * 5 + "better than chance"
  evaluate.print_summary({"loss": 0.25}, 0, "title", [note])
  assert note in capsys.readouterr().out.splitlines()
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
  monkeypatch.setenv("COLUMNS", "80")
  evaluate.print_summary({"loss": 0.25}, 0, "title", [note])
  lines = capsys.readouterr().out.rpartition("┘\n")[2].splitlines()
  assert max(map(len, lines)) <= 80
  assert " ".join(" ".join(lines).split()) == note


def test_the_result_opens_with_a_sentence():
  summary = {
    "win_rate": 0.892,
    "prompts": 1024,
    "reward_reference": 0.06,
    "reward_policy": 9.62,
    "frontier_reward_at_kl": 10.42,
  }
  assert evaluate.headline(summary) == (
    "better than the reference on 89% of 1,024 prompts; mean reward 0.06 → 9.62, of at most 10.42"
    " at the same KL"
  )
  assert evaluate.headline({"pairs": 1024, "eval_accuracy": 0.9}) == ""


def test_sampling_from_bytes_that_are_no_text_is_one_line(folders):
  done = _run("sample", model=folders(0), prompt="\udcff")
  assert done.status == 1 and done.stderr.count("\n") == 1
  assert done.stderr.startswith("error: prompt 0: text is not valid Unicode")
