"""Sharding: divided parameters change where arrays are stored and what is sent, but no result."""

import functools
import math
import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from dpo_jax import logprobs, losses, step
from dpo_jax.data import collate
from dpo_jax.distributed import sharding
from dpo_jax.distributed.executor import Executor
from dpo_jax.model import attention, families, transformer
from tests.golden import cases
from tests.support import tiny

VOCAB, WIDTH = 48, 32
CONFIG = families.from_hf(
  {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "tie_word_embeddings": False,
  }
)
MODEL = transformer.build(CONFIG)
TX = optax.adamw(1e-3, eps=1e-3)  # so gentle that rounding does not grow in twenty steps
TOKENS = ("position", "pair", "branch")
LOGIT_BUDGET = logprobs.LogitBudget(2**9, 0)  # several chunks a group


@functools.cache
def params():
  return jax.tree.map(np.asarray, transformer.init_params(CONFIG, 0))


def objective(name):
  logps_fn = logprobs.make_logps_fn(MODEL, budget=LOGIT_BUDGET)
  return step.Objective(logps_fn, losses.resolve(name, beta=0.5))


def step_of(name):
  """Returns the step, which is not compiled."""
  return functools.partial(step.train_step, objective=objective(name), tx=TX)


def start(executor, name="sigmoid"):
  """Returns the state, the reference and the step, which is not compiled."""
  loss = losses.resolve(name, beta=0.5)
  init = executor.compile_init(functools.partial(step.init_state, tx=TX, loss=loss))
  return init(executor.place(params())), executor.place(params()), step_of(name)


def abstract(executor):
  """Returns the shapes and shardings of the state and the reference, without arrays."""
  state = jax.eval_shape(functools.partial(step.init_state, tx=TX), params())
  return executor.abstract(state), executor.abstract(params())


def batch_of(executor):
  return executor.place_batch(tiny.batches(1, executor.groups)[0])


def trajectory(*mesh, name="sigmoid", accumulate=1, steps=3):
  """Returns the state and losses after some steps; `mesh` is devices, fsdp, tensor and sequence."""
  executor = Executor("mesh", *mesh)
  state, reference, fn = start(executor, name)
  train_step_fn, found = executor.compile_step(fn), []
  host = tiny.batches(3, executor.groups, accumulate)
  for index in range(steps):
    state, means = train_step_fn(state, reference, executor.place_batch(host[index % 3]))
    found.append(float(means["loss"]))
  wanted = jax.tree.map(lambda x: x.sharding, executor.abstract(state))
  jax.tree.map(lambda x, place: x.sharding == place or pytest.fail(), state, wanted)
  return executor.to_host(state), found


@functools.cache
def alone(name, accumulate, steps):
  return trajectory(1, 1, 1, name=name, accumulate=accumulate, steps=steps)


@pytest.mark.parametrize(
  ("mesh", "name", "accumulate", "steps"),
  [
    ((4, 1, 2, 2), "sigmoid", 1, 3),
    *(
      pytest.param(mesh, name, accumulate, 20, marks=pytest.mark.slow)
      for mesh, name, accumulate in (
        ((2, 2, 1), "sigmoid", 1),
        ((2, 2, 1), "sigmoid", 2),
        ((2, 2, 1), "aot", 2),
        ((2, 2, 1), "kto", 1),
        ((4, 1, 4), "sigmoid", 1),
        ((4, 1, 4), "kto", 1),
        ((8, 8, 1), "sigmoid", 1),
        ((8, 8, 1), "sigmoid", 2),
        ((8, 2, 2), "sigmoid", 2),
        ((4, 1, 1, 4), "kto", 1),
        ((8, 2, 2, 2), "aot", 2),
      )
    ),
  ],
)
def test_every_mesh_takes_the_steps_of_one_device(mesh, name, accumulate, steps):
  state, found = trajectory(*mesh, name=name, accumulate=accumulate, steps=steps)
  expected, wanted = alone(name, accumulate, steps)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)

  def close(path, x, y):
    bound = 1e-5 * max(np.abs(y).max(), 1e-30)
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=bound, err_msg=jax.tree_util.keystr(path))

  jax.tree_util.tree_map_with_path(close, state.params, expected.params)


@pytest.mark.parametrize("case", cases.CASES)
def test_every_matrix_of_every_family_is_divided(case):
  """Layers stay undivided, and no two axes divide one dimension."""
  shapes = transformer.param_shapes(families.from_hf(cases.CASES[case]))
  sizes = {"data": 1, "fsdp": 2, "tensor": 2}
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    spec = sharding.spec(path, leaf.shape, sizes)
    listed = [name for axis in spec if axis for name in ([axis] if isinstance(axis, str) else axis)]
    named = set(listed)
    assert len(named) == len(listed)
    last = path[-1].key
    if last in ("kernel", "embedding"):
      assert "fsdp" in named, jax.tree_util.keystr(path)
    if last == "scale":
      assert not named
    if last == "kernel":
      assert spec[0] is None, "layers are scanned over"


def test_what_does_not_divide_stays_whole():
  path = (jax.tree_util.DictKey("embed"), jax.tree_util.DictKey("embedding"))
  sizes = {"data": 1, "fsdp": 2, "tensor": 4}
  assert sharding.spec(path, (64, 32), sizes) == PartitionSpec(("tensor", "fsdp"), None)
  assert sharding.spec(path, (50, 32), sizes) == PartitionSpec("fsdp", None)
  assert sharding.spec(path, (51, 32), sizes) == PartitionSpec(None, "fsdp")
  assert sharding.spec(path, (52, 32), sizes) == PartitionSpec("tensor", "fsdp")
  assert sharding.spec(path, (52, 33), sizes) == PartitionSpec("tensor", None)


def test_a_device_holds_its_share_of_parameters_and_moments():
  executor = Executor("mesh", 8, fsdp=8)
  state, _, _ = start(executor)
  for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state[0].mu)):
    (size,) = {shard.data.size for shard in leaf.addressable_shards}
    parts = 1 if path[-1].key == "scale" else 8
    assert size * parts == leaf.size, jax.tree_util.keystr(path)


# --- what is sent ---------------------------------------------------------------------------------


@functools.cache
def collectives(*mesh):
  """Returns (operation, shapes of its output, source operation) of the compiled step."""
  executor = Executor("mesh", *mesh)
  lowered = executor.lower_step(step_of("sigmoid"), *abstract(executor), batch_of(executor))
  # By default the names of source operations are no part of a program's key in the cache, so a
  # stored program may have the names of an earlier version of the code.
  jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
  try:
    text = lowered.compile().as_text()
  finally:
    jax.config.update("jax_compilation_cache_include_metadata_in_key", False)
  found = []
  for line in text.splitlines():
    call = re.search(
      r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(", line
    )
    if call:
      source = re.search(r'op_name="([^"]*)"', line)
      shapes = [
        tuple(map(int, filter(None, dims.split(","))))
        for dims in re.findall(r"f32\[([\d,]*)\]", call[1])
      ]
      found.append((call[2], shapes, source[1] if source else ""))
  return found


def of_kind(found, kind):
  return [(shapes, source) for operation, shapes, source in found if operation == kind]


def test_copies_of_everything_only_add_up():
  found = collectives(8, 1, 1)
  assert {operation for operation, shapes, _ in found if any(shapes)} == {"all-reduce"}


def test_fsdp_gathers_one_layer_at_a_time_and_no_activation_of_a_layer():
  found = collectives(8, 8, 1)
  kernels = {
    leaf.shape[-2:]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params())
    if path[-1].key == "kernel"
  }
  in_layers = [
    shape
    for shapes, source in of_kind(found, "all-gather")
    for shape in shapes
    if "/layers/" in source
  ]
  assert set(in_layers) == kernels
  assert not of_kind(found, "all-to-all")


def test_fsdp_never_sends_a_table_or_its_gradient_but_the_tokens_that_read_it():
  """Counts what is sent of width D outside the layers, of policy (twice) and reference."""
  mesh = 8, 4, 1
  found = collectives(*mesh)
  batch = batch_of(Executor("mesh", *mesh))
  sent = [
    (operation, shape)
    for operation, shapes, source in found
    for shape in shapes
    if shape[-1:] == (WIDTH,) and len(shape) > 1 and "/layers/" not in source
  ]
  rows, length = batch.ids_NL.shape[1:]
  embedded = (rows // 2, length, WIDTH)  # of the four devices that share the vocabulary
  scored = (4, batch.scored_GM.shape[-1], WIDTH)
  # The head's input of both models; what they look up, and the gradient of that.
  assert sent.count(("all-gather", scored)) == 2
  assert sent.count(("all-reduce", embedded)) == 2 and sent.count(("all-gather", embedded)) == 1
  # Of every chunk the gradient of the head's input; and of tables, between copies, a part's.
  rest = {shape for _, shape in sent if shape not in (scored, embedded)}
  chunk, part = (1, 32, WIDTH), (VOCAB // 4, WIDTH)
  # Log-probs of chunks happen to be as wide as the model, and are smaller.
  assert {shape for shape in rest if math.prod(shape) > 128} == {chunk, part}


@pytest.mark.parametrize(
  "mesh",
  [
    (8, 2, 2),
    pytest.param((8, 8, 1), marks=pytest.mark.slow),
    pytest.param((8, 1, 1, 8), marks=pytest.mark.slow),
  ],
)
def test_the_gradient_of_the_head_is_added_up_once_and_not_in_every_chunk(mesh):
  table = {(VOCAB, WIDTH), (VOCAB // mesh[2], WIDTH), (VOCAB, WIDTH // mesh[1])}
  table |= {(VOCAB // mesh[2], WIDTH // mesh[1])}
  for shapes, source in of_kind(collectives(*mesh), "all-reduce"):
    in_a_chunk = "vd->" in source or "->vd" in source or "->gvd" in source  # the head's products
    assert not (in_a_chunk and table & set(shapes)), source


def test_tensor_never_gathers_the_head_its_logits_or_a_layer():
  """Only key heads whose number does not divide are gathered, in any order of their axes."""
  found = collectives(8, 1, 4)
  gathered = [shape for shapes, _ in of_kind(found, "all-gather") for shape in shapes]
  rows, length = batch_of(Executor("mesh", 8, tensor=4)).ids_NL.shape[1:]
  keys = rows // 2 * length * CONFIG.kv_heads * CONFIG.head_width
  assert {len(shape) for shape in gathered} <= {3, 4}
  assert all(math.prod(shape) <= keys for shape in gathered)
  assert not of_kind(found, "all-to-all")
  assert not of_kind(found, "collective-permute")


def test_sequence_exchanges_heads_in_a_layer_and_gathers_once_what_the_head_reads():
  found = collectives(8, 1, 1, 8)
  states = 0
  for shapes, source in of_kind(found, "all-gather"):
    assert "/layers/" not in source
    states += sum(shape[2:] == (WIDTH,) for shape in shapes)
  assert states == 2  # of the policy and of the reference
  # Queries, keys, values and results, each once a pass: reference, policy, again for the backward
  # pass, and that. Eight devices exchange one query head and one key/value head each.
  exchanged = of_kind(found, "all-to-all")
  assert len(exchanged) == 4 * 4
  rows, length = batch_of(Executor("mesh", 8, sequence=8)).ids_NL.shape[1:]
  each = (rows, length // 8, 1, CONFIG.head_width)
  assert all(set(shapes) == {each} for shapes, _ in exchanged)
  # No gradient of a key is added up over devices.
  reduced = [shape for shapes, _ in of_kind(found, "all-reduce") for shape in shapes]
  assert not any(shape[-1:] == (CONFIG.head_width,) for shape in reduced)
  assert not of_kind(found, "collective-permute") and not of_kind(found, "reduce-scatter")


# --- tokens of a row on several devices -----------------------------------------------------------


def test_long_rows_in_parts_are_attended_to_as_whole_ones(monkeypatch):
  """Compares value and gradient, with several blocks of queries on each of four devices."""
  monkeypatch.setattr(attention, "QUERY_BLOCK", 16)
  executor = Executor("mesh", 4, sequence=4)
  rows = collate.collate(tiny.pairs(16, seed=3), row_length=192)
  tokens = attention.Tokens(*(np.asarray(rows._asdict()[f"{name}_NL"]) for name in TOKENS))
  rng = np.random.default_rng(0)
  shape = (*rows.ids_NL.shape, 2, 8)
  q, k, v, w = (rng.standard_normal(shape).astype(np.float32) for _ in range(4))

  def total(q, k, v):
    keys = attention.Keys(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
    return (attention.attend_blocks(q, keys, tokens, np.int32(40)) * w).sum()

  whole = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)
  with jax.set_mesh(executor.mesh):  # a new jit, since the first compiled without the mesh
    parts = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max()),
    *(parts, whole),
  )
