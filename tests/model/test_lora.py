"""Adapters by hand, their equality with merged weights, and a base that stays one and unchanged."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import logprobs, losses, step, train
from dpo_jax.data import collate
from dpo_jax.distributed.executor import Executor, assert_separate
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.hf import peft
from dpo_jax.model import families, layers, lora, transformer
from dpo_jax.model.lora import LoRA
from dpo_jax.monitoring.loggers import read_metrics
from dpo_jax.structs import UserError
from dpo_jax.training import loop, optimizer
from dpo_jax.training.checkpoint import Checkpoints
from dpo_jax.training.setup import build
from tests.support import small_task, tiny

pytestmark = pytest.mark.usefixtures("one_picture")

LLAMA = families.from_hf(
  {
    "model_type": "llama",
    "vocab_size": tiny.VOCAB,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 12,
    "initializer_range": 0.3,
  }
)
GPT2 = families.from_hf(
  {"model_type": "gpt2", "vocab_size": tiny.VOCAB, "n_embd": 8, "n_layer": 2, "n_head": 2}
)
SETTINGS = LoRA(rank=2, alpha=3.0)


def base(config=LLAMA, seed=0):
  """Returns initial parameters as NumPy arrays."""
  return jax.tree.map(np.asarray, transformer.init_params(config, seed))


def moved(config=LLAMA, settings=SETTINGS, seed=0):
  """Returns adapters as after some training, with b no longer zero."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), lora.init(config, settings, seed)
  )


def batch_of(count=4, name="shared", groups=1):
  return collate.collate(tiny.pairs(count), layout=name, row_length=24, groups=groups)


def same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def near(found, expected, rtol=1e-4):
  scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
  check = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=rtol * scale)
  jax.tree.map(check, found, expected)


# -- what an adapter computes ----------------------------------------------------------------------


def test_a_map_by_hand():
  # x W = 1*2 + 3*1 = 5; x a = 1*1 + 3*2 = 7; s (x a) b = 0.5 * 7 * 4 = 14; bias 1: 20.
  a, b = np.array([[1.0], [2.0]]), np.array([[4.0]])
  own = {"params": {"kernel": jnp.array([[2.0], [1.0]]), "bias": jnp.array([1.0])}}
  policy = lora.attach(own, {"lora_a": a, "lora_b": b}, 0.5)
  linear = layers.Linear(1, True, 0.02, jnp.float32, jnp.float32, 0.0)
  np.testing.assert_allclose(linear.apply(policy, jnp.array([[1.0, 3.0]])), [[20.0]])
  np.testing.assert_allclose(linear.apply(own, jnp.array([[1.0, 3.0]])), [[6.0]])


def test_the_scale_of_both_papers():
  assert LoRA(rank=16, alpha=8.0).scale == 0.5
  assert LoRA(rank=16, alpha=8.0, rs=True).scale == 2.0


def test_a_policy_starts_as_its_base_to_the_bit_and_knows_no_other_maps():
  config, params = LLAMA, base()
  start = lora.init(config, SETTINGS, seed=3)
  hidden = jax.jit(transformer.build(config).hidden)
  batch = batch_of()
  np.testing.assert_array_equal(
    hidden(lora.attach(params, start, 1.5), batch), hidden(params, batch)
  )
  same(start, lora.init(config, SETTINGS, seed=3))
  a = start["layers"]["down"]["lora_a"]
  assert a.shape == (2, 12, 2) and 0.5 / np.sqrt(12) < np.abs(a).max() <= 1 / np.sqrt(12)
  # 2 layers, rank 2: in + out of query, key, value, out, up, gate, down.
  assert lora.count_parameters(start) == 2 * 2 * (16 + 12 + 12 + 16 + 20 + 20 + 20)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=lambda c: c.family)
def test_merged_weights_compute_the_same(config):
  policy = lora.attach(base(config), moved(config), SETTINGS.scale)
  hidden, batch = jax.jit(transformer.build(config).hidden), batch_of()
  found, plain = hidden(lora.merge(policy), batch), hidden(base(config), batch)
  near(found, hidden(policy, batch), rtol=1e-5)
  assert np.abs(found - plain).max() > 0.1
  same(policy["params"], base(config)["params"])  # merging leaves its argument alone


def test_gradients_are_those_of_the_merged_weights_by_the_chain_rule():
  """Since W' = W + s a b, da = s dW' b^T and db = s a^T dW', in every layer of the scan."""
  s, params, own = SETTINGS.scale, base(), moved()
  logps_fn = logprobs.make_logps_fn(transformer.build(LLAMA, remat="full"))

  def total(tree):
    return (logps_fn(tree, batch_of()) * jnp.arange(1.0, 3.0)).sum()

  found = jax.jit(jax.grad(lambda own: total(lora.attach(params, own, s))))(own)
  slope = jax.jit(jax.grad(total))(lora.merge(lora.attach(params, own, s)))["params"]["layers"]
  by_hand = {}
  for name, x in own["layers"].items():
    dw = slope[name]["kernel"]
    by_hand[name] = {
      "lora_a": s * np.einsum("ldf,lrf->ldr", dw, x["lora_b"]),
      "lora_b": s * np.einsum("ldr,ldf->lrf", x["lora_a"], dw),
    }
  near(found, {"layers": by_hand})


# -- dropout ---------------------------------------------------------------------------------------


def test_dropout_keeps_the_mean_and_its_share():
  x = jnp.ones((40, 25, 30))
  codes = jnp.arange(1000, dtype=jnp.uint32).reshape(40, 25)
  y = layers.drop_by_code(x, jax.random.key(0), codes, 0.2)
  assert set(np.unique(y)) == {0.0, 1.25}
  np.testing.assert_allclose(y.mean(), 1.0, atol=0.01)  # 30,000 draws: a deviation of 0.003
  assert len(np.unique(y.reshape(1000, 30), axis=0)) > 950  # every token has a mask of its own


@pytest.mark.slow
def test_dropout_goes_by_the_data_row_and_needs_a_key():
  """The log-probs of a pair are the same in every layout; without a key nothing is dropped."""
  model = transformer.build(LLAMA, dropout=0.4)
  logps_fn = jax.jit(logprobs.make_logps_fn(model))
  policy = lora.attach(base(), moved(), SETTINGS.scale)

  def by_row(batch, *key):
    logps_NS = np.asarray(logps_fn(policy, batch, *key))
    return {
      (int(row), i % 2): x
      for i, (row, x) in enumerate(zip(batch.row_NS.ravel(), logps_NS.ravel(), strict=True))
      if row >= 0
    }

  key = jax.random.key(5)
  shared = by_row(batch_of(), key)
  padded = by_row(batch_of(name="padded"), key)
  # Padded rows have one slot each, and the two rows of a pair are neighbours.
  near(padded, shared)
  plain, other = by_row(batch_of()), by_row(batch_of(), jax.random.key(6))
  near(plain, by_row(batch_of(name="padded")))
  assert all(abs(shared[k] - plain[k]) > 1e-4 and shared[k] != other[k] for k in shared)


def test_codes_tell_tokens_apart_and_steps_have_masks_of_their_own():
  batch = batch_of(8)
  row_NL = np.take_along_axis(batch.row_NS, batch.slot_NL, axis=1)
  places = set(zip(row_NL.flat, batch.branch_NL.flat, batch.position_NL.flat, strict=True))
  codes_NL = np.asarray(transformer.token_codes(jax.random.key(0), batch))
  assert len(np.unique(codes_NL)) == len(places) > 60

  def logps_fn(params, batch, key=None):
    noise = 0.0 if key is None else jax.random.normal(key)
    return params["x"] * noise * jnp.arange(2.0) * batch.weight_NS

  made = step.Objective(logps_fn, losses.resolve("sigmoid"), dropout_seed=0)
  state = step.init_state({"x": jnp.ones(())}, TX)
  stacked = collate.collate_many([tiny.pairs(1)], row_length=24)

  def loss(state):
    reference_params = {"x": jnp.ones(())}
    return step.train_step(state, reference_params, stacked, objective=made, tx=TX)[1]["loss"]

  losses_ = [float(jax.jit(loss)(state._replace(step=jnp.int32(i)))) for i in (0, 0, 1)]
  assert losses_[0] == losses_[1] != losses_[2]


def test_without_dropout_the_program_is_the_same():
  """A rate of zero, or no key, compiles the program of a model without dropout."""
  args = (lora.attach(base(), moved(), 1.0), batch_of())

  def program(**options):
    return jax.jit(transformer.build(LLAMA, **options).hidden).lower(*args).as_text()

  assert program() == program(dropout=0.0) == program(dropout=0.5)


# -- steps -----------------------------------------------------------------------------------------


def objective(name="sigmoid", dropout=0.0):
  loss = losses.resolve(name)
  logps_fn = logprobs.make_logps_fn(transformer.build(LLAMA, remat="none", dropout=dropout))
  return step.Objective(
    logps_fn,
    loss,
    policy=lambda trained, reference_params: lora.attach(reference_params, trained, SETTINGS.scale),
    dropout_seed=0 if dropout else None,
  )


TWO = SETTINGS._replace(target="q_proj,down")
TX = optimizer.make_optimizer(optax.constant_schedule(1e-2), weight_decay=0.1)


def trajectory(mode, devices, accumulate=1, dropout=0.3):
  """Returns adapters and losses after three steps, which start from adapters with an effect."""
  executor = Executor(mode, devices)
  init, own = functools.partial(step.init_state, tx=TX), moved(settings=TWO)
  state = executor.compile_init(init)(executor.place(own))
  reference_params = executor.place(lora.attach(base(), own, TWO.scale))
  assert_separate(state, reference_params)
  fn = functools.partial(step.train_step, objective=objective(dropout=dropout), tx=TX)
  take, losses_ = executor.compile_step(fn), []
  pairs, size = tiny.pairs(8), 8 // accumulate
  batch = collate.collate_many(
    [pairs[i : i + size] for i in range(0, 8, size)], row_length=24, groups=executor.groups
  )
  for _ in range(3):
    state, means = take(state, reference_params, executor.place_batch(batch))
    losses_.append(executor.metrics_to_host(means)["loss"])
  same(executor.to_host(reference_params)["params"], base()["params"])
  return executor.to_host(state), losses_


@pytest.mark.slow
def test_topology_changes_nothing_dropout_included():
  state, losses_ = trajectory("mesh", 1)
  for mode, devices, accumulate in (("pmap", 2, 1), ("mesh", 2, 2)):
    other, found = trajectory(mode, devices, accumulate)
    near(other.params, state.params)
    np.testing.assert_allclose(found, losses_, rtol=1e-4)
  assert abs(losses_[0] - np.log(2)) > 1e-4  # dropout: the policy is not quite the reference
  sizes = {x.shape for x in jax.tree.leaves(state.opt_state)}
  assert sizes == {()} | {x.shape for x in jax.tree.leaves(moved(settings=TWO))}


def test_a_loss_without_reference_trains_adapters_too():
  fn = functools.partial(step.train_step, objective=objective("simpo"), tx=TX)
  state = step.init_state(lora.init(LLAMA, TWO, 0), TX)
  batch = collate.collate_many([tiny.pairs(4)], row_length=24)
  take, found = jax.jit(fn), []
  for _ in range(3):
    state, means = take(state, base(), batch)
    found.append(float(means["loss"]))
  assert found == sorted(found, reverse=True) and found[-1] < found[0]


def test_weight_decay_shrinks_both_parts():
  start = moved()
  still = jax.tree.map(np.zeros_like, start)
  updates, _ = jax.jit(lambda grads, params: TX.update(grads, TX.init(params), params))(
    still, start
  )
  near(updates, jax.tree.map(lambda x: -1e-3 * x, start))


# -- files -----------------------------------------------------------------------------------------


def about(settings=SETTINGS, config=LLAMA):
  return peft.Adapter(settings, "models/base", peft.fingerprint_of(base(config)))


@pytest.mark.parametrize("rs", [False, True])
@pytest.mark.parametrize(
  ("config", "target"),
  [(LLAMA, "all-linear"), (LLAMA, "q_proj,down"), (GPT2, "all-linear"), (GPT2, "query|value")],
  ids=["llama-all", "llama-some", "gpt2-all", "gpt2-joined"],
)
def test_an_adapter_comes_back_to_the_bit(tmp_path, config, target, rs):
  settings = SETTINGS._replace(target=target, rs=rs, dropout=0.1)
  own = moved(config, settings)
  peft.save(tmp_path / "a", config, own, about(settings, config))
  found, tree = peft.load(tmp_path / "a", config)
  same(tree, own)
  assert found._replace(target=target) == settings and found.scale == settings.scale
  assert {p.name for p in tmp_path.iterdir()} == {"a"}
  peft.check_base(tmp_path / "a", about(settings, config).fingerprint)


def test_an_adapter_of_other_hands_is_read_as_peft_would(tmp_path):
  """The folder has one A for query, key and value, other ranks and scales, and a bare layer."""
  from safetensors.numpy import save_file

  rng = np.random.default_rng(0)
  name = "base_model.model.transformer.h.{}.{}.lora_{}.weight"
  given = {("attn.c_attn", 0): 2, ("attn.c_attn", 1): 2, ("mlp.c_fc", 1): 3}
  widths = {"attn.c_attn": 24, "mlp.c_fc": 32}
  tensors = {}
  for (module, layer), rank in given.items():
    for part, shape in (("A", (rank, 8)), ("B", (widths[module], rank))):
      tensors[name.format(layer, module, part)] = rng.normal(size=shape).astype(np.float32)
  save_file(tensors, tmp_path / peft.WEIGHTS)
  fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "b"}
  fields |= {"rank_pattern": {"c_fc": 3}, "alpha_pattern": {"c_fc": 12}}
  (tmp_path / peft.CONFIG).write_text(json.dumps(fields))

  settings, tree = peft.load(tmp_path, GPT2)
  merged = lora.merge(lora.attach(base(GPT2), tree, settings.scale))["params"]["layers"]

  def change(leaf, layer):
    before = base(GPT2)["params"]["layers"][leaf]["kernel"][layer]
    return merged[leaf]["kernel"][layer] - before

  def product(module, layer):
    a_RD, b_FR = (tensors[name.format(layer, module, part)] for part in ("A", "B"))
    return (b_FR @ a_RD).T

  joined = np.concatenate([change(leaf, 1) for leaf in ("query", "key", "value")], axis=-1)
  np.testing.assert_allclose(joined, 4 / 2 * product("attn.c_attn", 1), atol=1e-5)
  np.testing.assert_allclose(change("up", 1), 12 / 3 * product("mlp.c_fc", 1), atol=1e-5)
  np.testing.assert_array_equal(change("up", 0), 0)
  # Written by us it computes the same, and from then on it comes back to the bit.
  peft.save(tmp_path / "again", GPT2, tree, about(settings, GPT2))
  same(peft.load(tmp_path / "again", GPT2)[1], tree)


def spoil(folder: pathlib.Path, **fields) -> pathlib.Path:
  """Writes an adapter folder in which some fields of the configuration are changed."""
  peft.save(folder, LLAMA, moved(), about())
  file = folder / peft.CONFIG
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))
  return folder


@pytest.mark.parametrize(
  ("fields", "config", "words"),
  [
    ({"use_dora": True}, LLAMA, "use_dora is True; only False"),
    ({"peft_type": "IA3"}, LLAMA, "peft_type is 'IA3'; only 'LORA'"),
    ({"modules_to_save": ["lm_head"]}, LLAMA, "modules_to_save is .*; merge it with peft"),
    ({"init_lora_weights": "pissa"}, LLAMA, "init_lora_weights is 'pissa', which changes the base"),
    (
      {"target_modules": ["q_proj"]},
      LLAMA,
      "contains an adapter of .*k_proj, which its adapter_con",
    ),
    ({"r": 0}, LLAMA, "rank is 0"),
    ({"r": "8"}, LLAMA, "r is '8'"),
    ({}, dataclasses.replace(LLAMA, width=16), r"adapter of models/base: .* has A \[2, 8\]"),
    (
      {},
      dataclasses.replace(LLAMA, layers=1),
      "adapter of models/base: it contains model.layers.1",
    ),
    ({}, GPT2, "adapter of models/base: it contains model.layers.0"),
  ],
)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(tmp_path, fields, config, words):
  with pytest.raises(UserError, match=words) as error:
    peft.load(spoil(tmp_path / "a", **fields), config)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("model.embed_tokens.weight", "an embedding or a head, which takes the place of the base's"),
    ("lm_head.lora_A.weight", "an adapter of the embedding or the head"),
    ("model.embed_tokens.lora_embedding_B", "an adapter of the embedding or the head"),
    ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", "a magnitude of DoRA"),
    ("model.layers.0.input_layernorm.weight", "a whole tensor, which takes the place"),
    ("model.layers.0.self_attn.q_proj.lora_C.weight", "this llama model of 2 layers has no place"),
  ],
)
def test_what_an_adapter_saved_besides_is_refused_as_what_it_is(tmp_path, name, words):
  from safetensors.numpy import load_file, save_file

  folder = spoil(tmp_path / "a")
  more = {f"base_model.model.{name}": np.ones((2, 2), np.float32)}
  save_file(load_file(folder / peft.WEIGHTS) | more, folder / peft.WEIGHTS)
  with pytest.raises(UserError, match=words) as error:
    peft.load(folder, LLAMA)
  assert name in str(error.value) and "\n" not in str(error.value)


def test_an_adapter_of_another_base_of_the_same_shape_is_refused(tmp_path):
  folder = spoil(tmp_path / "a")
  with pytest.raises(UserError, match="adapter of models/base, whose weights are not those"):
    peft.check_base(folder, peft.fingerprint_of(base(seed=1)))
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base())
  peft.check_base(folder, peft.fingerprint_of(narrow))  # the same one, held in fewer bits
  with pytest.raises(UserError, match="has no adapter_config"):
    peft.load(tmp_path, LLAMA)


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"rank": -1}, "rank is -1"),
    ({"alpha": 0.0}, "alpha is 0.0"),
    ({"dropout": 1.0}, "dropout is 1.0"),
    ({"target": "q_proj,(v"}, "is not a valid pattern"),
    ({"target": "q_porj"}, r"'q_porj' matches no .* query \(q_proj\), .*all-linear"),
    ({"target": "q_proj|v_porj"}, "'v_porj' matches no"),
    ({"target": ""}, "matches no linear map"),
    ({"rank": 5}, "rank is 5, but key maps 8 to 4"),
  ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(settings, words):
  made = SETTINGS._replace(**settings)
  with pytest.raises(UserError, match=words) as error:
    lora.check(made)
    lora.init(LLAMA, made, 0)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("config", "target", "paths"),
  [
    (LLAMA, "q_proj,value", {"query", "value"}),
    (LLAMA, r"mlp\..*", {"gate", "up", "down"}),
    (LLAMA, "(q|v)_proj", {"query", "value"}),
    (GPT2, "c_attn", {"query", "key", "value"}),
    (GPT2, "attn.c_proj", {"out"}),
    (GPT2, "c_proj", {"out", "down"}),
  ],
)
def test_a_target_names_maps_as_here_or_as_on_disk(config, target, paths):
  assert set(lora.select_maps(config, target)) == {f"layers.{path}" for path in paths}


# -- whole runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> pathlib.Path:
  """A random model with a tokenizer, and preferences."""
  return small_task.write(tmp_path_factory.mktemp("lora"))


def configured(task, **changes):
  lora = {"lora.rank": 2, "lora.dropout": 0.2, "lora.target": "q_proj,v_proj"}
  return small_task.configured(task, **{**lora, **changes})


@pytest.fixture(scope="module")
def straight(task) -> pathlib.Path:
  """A run from its first step to its last."""
  train.execute(configured(task), task / "run")
  return task / "run"


def test_a_run_leaves_an_adapter_and_checkpoints_of_adapters_only(task, straight):
  lines = read_metrics(straight / "metrics.jsonl")
  np.testing.assert_allclose(lines[0]["eval/loss"], np.log(2), rtol=1e-5)
  assert lines[-1]["loss"] < np.log(2)
  names = {path.name for path in (straight / "export").iterdir()}
  assert {peft.CONFIG, peft.WEIGHTS, "tokenizer.json"} <= names
  assert "model.safetensors" not in names
  settings, tree = peft.load(straight / "export", hf_checkpoint.read_config(task / "base"))
  assert settings.rank == 2 and set(tree["layers"]) == {"query", "value"}
  checkpoints = Checkpoints(straight / "checkpoints")
  same(checkpoints.restore_params(), tree)
  checkpoints.close()
  assert peft.read_settings(straight / "export")[1] == str((task / "base").resolve())


def test_commands_take_an_adapter_where_they_take_a_model(task, straight):
  """An adapter folder stands for its base with the adapter merged, except in training."""
  config, params = peft.load_model(straight / "export")
  assert config == peft.read_config(straight / "export") == hf_checkpoint.read_config(task / "base")
  settings, own = peft.load(straight / "export", config)
  same(params, lora.merge(lora.attach({"params": base_of(task)}, own, settings.scale)))
  same(peft.load_model(task / "base")[1]["params"], base_of(task))
  with pytest.raises(
    UserError, match=r"is an adapter; name the model that it was trained on by --model"
  ):
    train.execute(configured(task, **{"model.path": str(straight / "export")}), task / "never")


def test_an_adapter_whose_base_has_gone_says_where_to_write_it(tmp_path):
  with pytest.raises(UserError, match="adapter of models/base, which is not a model folder here"):
    peft.load_model(spoil(tmp_path / "a"))


@pytest.mark.slow
def test_resumed_is_straight_to_the_bit(task, straight):
  import shutil

  resumed = straight.with_name("resumed")
  shutil.copytree(straight, resumed)
  shutil.rmtree(resumed / "checkpoints" / "4")
  shutil.rmtree(resumed / "export")
  train.execute(configured(task), resumed)
  weights = [folder / "export" / peft.WEIGHTS for folder in (straight, resumed)]
  assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pmap", "mesh"])
def test_going_on_from_an_adapter_keeps_it_in_the_reference(task, straight, mode, capsys):
  changes = {"parallel.mode": mode, "data.eval_fraction": 0.0}
  config = configured(task, **changes, **{"lora.rank": 0, "lora.target": "all-linear"})
  config.lora.update(path=str(straight / "export"), dropout=0.0)
  run, trained, reference_params, _ = build(config, task / f"on_{mode}")
  settings, given = peft.load(straight / "export", run.model_config)
  same(trained, given)
  batch = collate.collate(run.data.examples[:4], row_length=128)
  merged = lora.merge(lora.attach({"params": base_of(task)}, given, settings.scale))
  logps_fn = run.objective.logps
  near(logps_fn(reference_params, batch), logps_fn(merged, batch), rtol=1e-5)
  assert (
    np.abs(logps_fn(reference_params, batch) - logps_fn({"params": base_of(task)}, batch)).max()
    > 1e-3
  )
  run = run._replace(steps=1)
  prepared = loop.prepare(run, trained, reference_params)
  assert "check passed: loss at the start is log 2 = 0.693147" in capsys.readouterr().out
  assert not run.workdir.exists(), "nothing is written before training"
  loop.train(run, prepared)


def base_of(task):
  return hf_checkpoint.load(task / "base")[1]["params"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mesh", "pmap"])
def test_the_reference_is_the_base_and_no_second_copy(task, tmp_path, mode, monkeypatch):
  """Devices store one model with adapters, and two, policy and reference, without them."""
  stored = []
  compile_step = Executor.compile_step

  def counting(self, fn):
    take = compile_step(self, fn)

    def counted(*args):
      stored.append(on_device() - before)
      return take(*args)

    return counted

  monkeypatch.setattr(Executor, "compile_step", counting)
  changes = {"parallel.mode": mode, "data.eval_fraction": 0.0, "train.steps": 2}
  model = 2 * sum(x.nbytes for x in jax.tree.leaves(base_of(task)))  # on two devices

  def most(**more):
    stored.clear()
    run, trained, reference_params, _ = build(
      configured(task, **changes, **more), tmp_path / str(len(more))
    )
    loop.train(run, loop.prepare(run, trained, reference_params))
    return max(stored), 2 * sum(x.nbytes for x in jax.tree.leaves(trained))

  before = on_device()
  found, own = most()
  # The base, three of every adapter (Adam's two moments), and a batch; no second model.
  assert model + 3 * own <= found < 1.5 * model + 3 * own
  if mode == "mesh":
    plain, _ = most(**{"lora.rank": 0, "lora.dropout": 0.0, "lora.target": "all-linear"})
    assert plain >= 4 * model  # policy, reference and two moments


def on_device() -> int:
  """Counts the bytes of all live arrays; a buffer that several arrays share counts once."""
  shards = [shard for x in jax.live_arrays() for shard in x.addressable_shards if shard.data.size]
  # Keyed by address, since arrays may share a buffer.
  sizes = {(x.device, x.data.unsafe_buffer_pointer()): x.data.nbytes for x in shards}
  return sum(sizes.values())


@pytest.mark.slow
def test_policies_with_adapters_are_sampled_from(task):
  """Evaluation samples from base and adapters together; at the start their KL is zero."""
  config = configured(task, **{"eval.samples": 4, "train.steps": 1, "parallel.mode": "pmap"})
  train.execute(config, task / "sampled")
  found = [line["eval/sampled/kl"] for line in read_metrics(task / "sampled" / "metrics.jsonl")]
  assert found[0] == 0 and found[-1] != 0


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"lora.rank": -1}, "lora.rank is -1"),
    ({"lora.rank": 0}, "lora.dropout is 0.2, but lora.rank is 0"),
    ({"lora.target": "wq"}, "'wq' matches no linear map"),
    ({"reference.path": "x"}, "with adapters the reference is the model itself"),
    ({"reference.sync_every": 2}, "leave it 0"),
    ({"reference.param_dtype": "bfloat16"}, "set them alike"),
    ({"lora.path": "x"}, "lora.rank is 2, but the adapter of lora.path=x has its own"),
    (
      {"lora.path": "x", "lora.rank": 0, "lora.target": "all-linear"},
      "adapter folder .*x does not exist",
    ),
    ({"model.path": ""}, "lora adapts a model that exists"),
  ],
)
def test_bad_settings_of_a_run_are_one_line_and_leave_no_trace(task, tmp_path, changes, words):
  with pytest.raises(UserError, match=words) as error:
    train.execute(configured(task, **changes), tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()
