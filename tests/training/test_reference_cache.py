"""The store of reference log-probs: what it gives is what the reference gives, or nothing."""

import functools
import re
import shutil

import jax
import numpy as np
import optax
import pytest

from dpo_jax import logprobs, losses, step, train
from dpo_jax.controlled import reviews, word_tokenizer
from dpo_jax.data import batches, collate, packing
from dpo_jax.data.examples import Example, fill_up
from dpo_jax.distributed.executor import Executor
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.hf import safetensors_files
from dpo_jax.monitoring.loggers import read_metrics
from dpo_jax.structs import UserError
from dpo_jax.training import loop, reference_cache, setup
from dpo_jax.training.setup import build
from tests.support import small_task, tiny

pytestmark = pytest.mark.usefixtures("one_picture")

KEY = {"weights": "a"}
ROWS = batches.Batching(row_length=64)


def token_fn(params=None, mode="mesh", devices=1):
  executor = Executor(mode, devices)
  forward = executor.compile_forward(logprobs.make_token_fn(tiny.MODEL))
  placed = executor.place(tiny.init() if params is None else params)
  return lambda batch: forward(placed, jax.tree.map(lambda x: x[None], batch))


def filled(path, examples, fn=None, **batching):
  """A store of the tiny model's log-probs of some examples."""
  store = reference_cache.Store(path, KEY)
  how = ROWS._replace(**batching)
  list(reference_cache.fill(store, examples, fn or token_fn(), batch_size=4, batching=how))
  return store


def ids(*numbers):
  return np.array(numbers, np.int32)


# --- equal to the reference -----------------------------------------------------------------------


@functools.cache
def compiled(beyond=1.0):
  """Returns functions of the stored and the computed log-probs, compiled once per shape."""
  live_fn = logprobs.make_logps_fn(tiny.MODEL, beyond_shorter=beyond)
  return jax.jit(logprobs.make_stored_fn(beyond_shorter=beyond)), jax.jit(live_fn)


@pytest.mark.parametrize("name", packing.LAYOUTS)
@pytest.mark.parametrize(("mode", "devices"), [("mesh", 1), ("mesh", 4), ("pmap", 4)])
def test_what_is_stored_is_what_the_reference_computes(tmp_path, name, mode, devices):
  """Token by token, in whatever rows it was computed and is asked for, scored or context."""
  pairs = tiny.with_context(tiny.pairs(13, completions=2))
  fn = token_fn(mode=mode, devices=devices)
  store = filled(tmp_path, pairs, fn, layout=name, groups=devices)
  # Of context too: another run may score it.
  assert not reference_cache.lacking(tiny.pairs(13, completions=2), store)
  for beyond in (1.0, 0.3):
    stored_fn, live_fn = compiled(beyond)
    stream = batches.batches(
      reference_cache.stored(pairs, store),
      batch_size=6,
      accumulate=2,
      batching=batches.Batching(layout=name, row_length=64),
    )
    for _ in range(2):
      micro = jax.tree.map(lambda x: x[1], next(stream))
      live_NS = live_fn(tiny.init(), micro)
      assert np.abs(live_NS).max() > 1
      np.testing.assert_allclose(stored_fn(micro), live_NS, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", packing.LAYOUTS)
def test_answers_that_are_not_there_are_no_matter(tmp_path, name):
  ragged = [
    example._replace(completions=example.completions[: 2 + i % 3])
    for i, example in enumerate(tiny.pairs(9, completions=4))
  ]
  examples = fill_up(ragged)
  store = filled(tmp_path, examples, layout=name)
  batch = collate.collate(reference_cache.stored(examples, store), row_length=64, layout=name)
  stored_fn, live_fn = compiled()
  live_NS = live_fn(tiny.init(), batch)
  np.testing.assert_allclose(stored_fn(batch), live_NS, rtol=1e-5, atol=1e-5)


def test_a_step_needs_no_reference_then(tmp_path):
  pairs = tiny.pairs(8)
  store = filled(tmp_path, pairs)
  loss, tx = losses.resolve("sigmoid", beta=0.5), optax.sgd(0.1)
  live = step.Objective(logprobs.make_logps_fn(tiny.MODEL), loss)
  stored = live._replace(reference=step.StoredReference(logprobs.make_stored_fn()))
  after = []
  for objective, reference_params, examples in (
    (live, tiny.init(), pairs),
    (stored, None, reference_cache.stored(pairs, store)),
  ):
    batch = collate.collate_many([examples[:4], examples[4:]], row_length=64)
    state = step.init_state(tiny.init(seed=1), tx, loss)  # a policy that has moved away
    take = jax.jit(functools.partial(step.train_step, objective=objective, tx=tx))
    after.append(take(state, reference_params, batch))
  (one, means), (other, more) = after
  np.testing.assert_allclose(means["rewards/margins"], more["rewards/margins"], rtol=1e-5)
  for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)


# --- found, or not --------------------------------------------------------------------------------


def test_what_is_found_is_the_same_text_divided_alike(tmp_path):
  known = Example(ids(1, 2, 3), (ids(4, 5, 6, 7), ids(8, 9)))
  store = filled(tmp_path, [known])
  (whole, other) = store.find(known)
  assert len(whole) == 4 and len(other) == 2
  # A window that cuts an answer leaves its start what it was.
  np.testing.assert_array_equal(store.find(known._replace(completions=(ids(4, 5),)))[0], whole[:2])
  again = reference_cache.Store(tmp_path, KEY)
  np.testing.assert_array_equal(again.find(known)[0], whole)
  for missing in (
    known._replace(prompt=ids(2, 3)),  # cut from the left: other predecessors
    known._replace(prompt=ids(1, 2, 3, 4), completions=(ids(5, 6, 7),)),  # another mask
    known._replace(completions=(ids(4, 5, 6, 8),)),  # another tokenizer
    known._replace(completions=(ids(4, 5, 6, 7, 0),)),  # longer
    known._replace(completions=(ids(8, 9), ids(9, 8))),  # one of two
  ):
    assert store.find(missing) is None
  assert len(reference_cache.lacking([known, missing], store)) == 1
  assert reference_cache.Store(tmp_path, {"weights": "b"}).find(known) is None


def test_prompts_of_one_half_of_a_digest_are_kept_apart(tmp_path, monkeypatch):
  """The first half orders the answers, the second tells prompts apart."""
  halves = lambda prompt: np.array([7, prompt.sum()], np.uint64)
  monkeypatch.setattr(reference_cache, "_digest", halves)
  completions = tiny.pairs(1)[0].completions
  pairs = [Example(ids(1, n), completions, row=n) for n in range(6)]
  store = filled(tmp_path, pairs)
  for example in pairs:
    expected = filled(tmp_path / "alone" / str(example.row), [example]).find(example)
    for one, other in zip(store.find(example), expected, strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


# --- killed, or not alone -------------------------------------------------------------------------


def test_a_pass_that_is_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
  monkeypatch.setattr(reference_cache, "PART_TOKENS", 1)  # a part a batch
  pairs, seen = tiny.pairs(12), []
  once = token_fn()

  def counted(batch):
    seen.append(set(batch.row_NS[batch.row_NS >= 0].tolist()))
    return once(batch)

  store = reference_cache.Store(tmp_path, KEY)
  going = reference_cache.fill(store, pairs, counted, batch_size=4, batching=ROWS)
  assert [next(going), next(going)] == [4, 8]
  going.close()
  (store.folder / ".partial").write_bytes(b"half a part")
  store = reference_cache.Store(tmp_path, KEY)
  rest = reference_cache.lacking(pairs, store)
  assert [example.row for example in rest] == [8, 9, 10, 11]
  list(reference_cache.fill(store, rest, counted, batch_size=4, batching=ROWS))
  assert len(seen) == 3 and not len(reference_cache.lacking(pairs, store))


def test_two_writers_do_not_harm_each_other(tmp_path, monkeypatch):
  monkeypatch.setattr(reference_cache, "PART_TOKENS", 1)
  pairs, fn = tiny.pairs(12), token_fn()
  stores = [reference_cache.Store(tmp_path, KEY) for _ in range(2)]
  both = [reference_cache.fill(store, pairs, fn, batch_size=4, batching=ROWS) for store in stores]
  for _ in zip(*both, strict=True):
    pass
  third = reference_cache.Store(tmp_path, KEY)
  for example in pairs:
    for found in zip(*(store.find(example) for store in (*stores, third)), strict=True):
      np.testing.assert_array_equal(found[0], found[1])
      np.testing.assert_array_equal(found[0], found[2])


# --- refused --------------------------------------------------------------------------------------


def test_what_is_no_store_is_left_alone(tmp_path):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.txt").write_text("years of work")
  with pytest.raises(UserError, match="mine holds files and is not a reference store"):
    reference_cache.Store(tmp_path / "mine", KEY)
  assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
  with pytest.raises(UserError, match=r"thesis\.txt is a file"):
    reference_cache.Store(tmp_path / "mine" / "thesis.txt", KEY)
  filled(tmp_path / "store", tiny.pairs(2))
  for text, said in (('{"version": 2}', "version 2"), ("{", "version unknown")):
    (tmp_path / "store" / reference_cache.MARK).write_text(text)
    with pytest.raises(UserError, match=f"is a reference store of {said} and this program writes"):
      reference_cache.Store(tmp_path / "store", KEY)


def test_a_broken_part_is_named(tmp_path):
  store = filled(tmp_path, tiny.pairs(2))
  (part,) = store.folder.glob("*.safetensors")
  part.write_bytes(part.read_bytes()[:-5])
  with pytest.raises(UserError, match=f"{part.name} is a broken part .*; remove it"):
    reference_cache.Store(tmp_path, KEY)
  part.unlink()
  assert len(reference_cache.lacking(tiny.pairs(2), reference_cache.Store(tmp_path, KEY))) == 2


def test_numbers_that_are_not_finite_are_not_kept(tmp_path):
  params = tiny.init()
  params["head"][3] = np.nan
  with pytest.raises(UserError, match="gives data row 0 log-probs that are not finite"):
    filled(tmp_path, tiny.pairs(2), token_fn(params))
  assert not list(tmp_path.rglob("*.safetensors"))


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(tmp_path_factory):
  return small_task.write(tmp_path_factory.mktemp("reference"))


def run_of(task, workdir, **changes):
  config = small_task.configured(task, **changes)
  train.execute(config, workdir)
  return read_metrics(workdir / "metrics.jsonl")


def alike(lines, expected):
  assert len(lines) == len(expected)
  clock = {"pairs_per_second", "tokens_per_second"}
  for line, other in zip(lines, expected, strict=True):
    # Before the first step log-ratios are zero to rounding, and what is on either side is chance.
    chance = {"drift/both_fell"} if line["step"] < 2 else set()
    for key in line.keys() - clock - chance:
      np.testing.assert_allclose(line[key], other[key], rtol=2e-4, atol=2e-5, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [{"parallel.mode": "mesh"}, {"parallel.mode": "pmap"}, {"lora.rank": 2}, {"loss.name": "kto"}],
)
def test_a_run_with_a_store_is_the_run_without(task, tmp_path, changes, capsys):
  expected = run_of(task, tmp_path / "live", **changes)
  with_store = {**changes, "reference.store": str(tmp_path / "store")}
  capsys.readouterr()
  alike(run_of(task, tmp_path / "first", **with_store), expected)
  assert re.search(r": 0 of (32|64) examples found", capsys.readouterr().err)
  alike(run_of(task, tmp_path / "second", **with_store), expected)
  said = capsys.readouterr().err
  assert re.search(r": (\d+) of \1 examples found", said) and "computed" not in said


@pytest.mark.slow
def test_a_full_store_spares_the_reference_and_serves_other_runs(task, tmp_path):
  store = {"reference.store": str(tmp_path / "store")}
  run, trained, reference_params, _ = build(small_task.configured(task, **store), tmp_path / "a")
  assert reference_params is not None and sum(map(len, run.lacking)) == 32
  loop.train(run, loop.prepare(run, trained, reference_params))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(reference_params))
  others = {"loss.name": "ipo", "loss.beta": 0.3, "optimizer.learning_rate": 1e-4, "seed": 1}
  for changes in (others, {"loss.ld_alpha": 0.5}, {"data.max_length": 300}):
    run, _, reference_params, _ = build(
      small_task.configured(task, **store, **changes), tmp_path / "b"
    )
    assert reference_params is None and not run.lacking
  for changes in (
    {"model.compute_dtype": "bfloat16"},
    {"model.param_dtype": "bfloat16"},
    {"reference.param_dtype": "bfloat16"},
    {"data.layout": "packed"},
  ):
    run, *_ = build(small_task.configured(task, **store, **changes), tmp_path / "c")
    assert sum(map(len, run.lacking)) == 32


def test_a_changed_model_misses(task, tmp_path):
  shutil.copytree(task / "base", tmp_path / "base")
  store = {"reference.store": str(tmp_path / "store")}
  folders = []
  for turn in range(2):
    config = small_task.configured(task, **store, **{"model.path": str(tmp_path / "base")})
    folders.append(build(config, tmp_path / "run")[0].store.folder)
    if turn == 0:
      before = safetensors_files.digest(tmp_path / "base")
      model_config, params = hf_checkpoint.load(tmp_path / "base")
      params["params"]["embed"]["embedding"][0, 0] += 1e-3
      hf_checkpoint.save(tmp_path / "base", model_config, params, source=task / "tokenizer")
      assert safetensors_files.digest(tmp_path / "base") != before
  assert folders[0] != folders[1]


def test_a_reference_that_the_loss_does_not_read_is_a_warning(task, capsys):
  config = small_task.configured(task, **{"reference.path": str(task / "base")})
  for name, expected in (("simpo", True), ("sigmoid", False)):
    config.loss.update(name=name, beta=None)
    setup.describe(config, setup.check(config))
    warned = (
      f"warning: loss {name} reads no reference, so reference.path=" in capsys.readouterr().err
    )
    assert warned == expected


def test_a_reference_with_another_tokenizer_is_refused(task, tmp_path):
  shutil.copytree(task / "base", tmp_path / "other")
  words = [" a", *reviews.vocabulary()[:-1]]
  word_tokenizer.write(tmp_path / "words", words)
  shutil.copy(tmp_path / "words" / "tokenizer.json", tmp_path / "other")
  config = small_task.configured(task, **{"reference.path": str(tmp_path / "other")})
  with pytest.raises(UserError, match="other has another tokenizer than the policy"):
    build(config, tmp_path / "run")


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"loss.name": "simpo"}, "loss 'simpo' reads no reference; leave it empty"),
    ({"reference.sync_every": 2}, "the reference follows the policy"),
    ({"on_policy.reward": "controlled"}, "sampled anew"),
  ],
)
def test_a_store_that_could_not_serve_is_refused(task, tmp_path, changes, words):
  changes = {**changes, "reference.store": str(tmp_path / "store")}
  with pytest.raises(UserError, match=words):
    build(small_task.configured(task, **changes), tmp_path / "run")
  assert not (tmp_path / "store").exists()
