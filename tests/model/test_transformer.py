"""The decoder gives stored activations, equals an oracle in NumPy, and agrees with itself."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.data import collate
from dpo_jax.data.examples import Example, lengths
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.logprobs import logits, naive_slot_logps
from dpo_jax.model import attention, families, rope, transformer
from dpo_jax.model import config as configs
from dpo_jax.structs import TokenBatch, UserError
from tests.support import tiny

LLAMA = families.from_hf(
  {
    "model_type": "llama",
    "vocab_size": tiny.VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
  }
)
GPT2 = dataclasses.replace(
  LLAMA,
  family="gpt2",
  kv_heads=6,
  max_positions=64,
  norm="layer",
  positions="learned",
  activation="gelu_tanh",
  gated=False,
  qkv_bias=True,
  out_bias=True,
  mlp_bias=True,
  tied=False,
)
FAMILIES = pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])


@functools.cache
def random_params(config, seed=0):
  """Returns parameters as NumPy arrays, with noise so that no bias is 0 and no scale 1."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: np.asarray(x) + rng.normal(0, 0.1, x.shape).astype(np.float32),
    transformer.init_params(config, seed),
  )


def whole_rows(ids_NL):
  """Makes rows of one sequence each, from the first column to the last."""
  ids_NL = np.asarray(ids_NL, np.int32)
  zeros = np.zeros_like(ids_NL)
  position_NL = zeros + np.arange(ids_NL.shape[1], dtype=np.int32)
  scored_GM, slots = np.zeros((1, 1), np.int32), np.zeros((len(ids_NL), 1))
  return TokenBatch(ids_NL, position_NL, zeros, zeros, zeros, zeros, zeros, scored_GM, *[slots] * 3)


def random_rows(rows, length, seed=0):
  return whole_rows(np.random.default_rng(seed).integers(0, tiny.VOCAB, (rows, length)))


@functools.cache
def forward(config, block=attention.QUERY_BLOCK, **how):
  """Returns a compiled function of parameters and batch: the logits of every position."""
  model = transformer.build(config, **how)
  return jax.jit(lambda params, batch: logits(model.hidden(params, batch), model.head(params)))


def all_logits(config, params, batch, **how):
  how["block"] = attention.QUERY_BLOCK
  return np.asarray(forward(config, **how)(params, batch))


def oracle(config, params, ids_L):
  """Computes logits [L, V] of one sequence in float64, a token at a time.

  It shares no code with the decoder.
  """
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
  heads, size = config.heads, config.head_width

  def norm(x, w):
    x = x - x.mean(-1, keepdims=True) if config.norm == "layer" else x
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)
    return x * w["scale"] + w.get("bias", 0)

  def linear(x, w):
    return x @ w["kernel"] + w.get("bias", 0)

  def turn(x, position):
    if config.positions != "rotary":
      return x
    angle = position * config.rope_theta ** (-2 * np.arange(size // 2) / size)
    z = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)

  def act(x):
    if config.activation == "silu":
      return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

  keys, values = [[[] for _ in range(config.layers)] for _ in range(2)]
  out = []
  for position, token in enumerate(ids_L):
    x = p["embed"]["embedding"][token]
    if config.positions == "learned":
      x = x + p["positions"]["embedding"][position]
    for layer in range(config.layers):
      w = jax.tree.map(lambda leaf, at=layer: leaf[at], p["layers"])
      y = norm(x, w["attention_norm"])
      q = turn(linear(y, w["query"]).reshape(heads, size), position)
      keys[layer].append(turn(linear(y, w["key"]).reshape(-1, size), position))
      values[layer].append(linear(y, w["value"]).reshape(-1, size))
      mixed = []
      for head in range(heads):
        k, v = (np.array(x[layer])[:, head * config.kv_heads // heads] for x in (keys, values))
        weight = np.exp(k @ q[head] / np.sqrt(size))
        mixed.append(weight / weight.sum() @ v)
      x = x + linear(np.concatenate(mixed), w["out"])
      y = norm(x, w["mlp_norm"])
      up = linear(y, w["up"])
      x = x + linear(act(linear(y, w["gate"])) * up if config.gated else act(up), w["down"])
    table = p["embed" if config.tied else "head"]["embedding"]
    out.append(table @ norm(x, p["final_norm"]))
  return np.array(out)


@FAMILIES
def test_logits_equal_the_oracle(config):
  params, batch = random_params(config), random_rows(2, 11)
  expected = [oracle(config, params, ids_L) for ids_L in batch.ids_NL]
  np.testing.assert_allclose(all_logits(config, params, batch), expected, atol=2e-5)


def test_every_stored_activation_of_gpt_nano_sort(shared_data):
  folder = shared_data / "models" / "gpt-nano-sort"
  stored = np.load(folder / "reference_activations.npz")
  config, params = hf_checkpoint.load(folder)
  batch = whole_rows(stored["idx"])
  tokens = attention.Tokens(batch.position_NL, batch.pair_NL, batch.branch_NL)
  apply = functools.partial(
    transformer.Decoder(config).apply, capture_intermediates=True, mutable=["intermediates"]
  )
  (hidden, _), seen = jax.jit(apply)(params, batch.ids_NL, tokens)
  seen = seen["intermediates"]
  layers = {name: out["__call__"][0][0] for name, out in seen["layers"].items() if name[0] != "_"}
  streams = seen["layers"]["__call__"][0][0]
  q, k, v = (
    layers[name].reshape(3, 11, config.heads, -1).transpose(0, 2, 1, 3)
    for name in ("query", "key", "value")
  )
  seen_mask = attention.visible(tokens, tokens)
  attended = attention.attend(q.transpose(0, 2, 1, 3), [(attention.Keys(k, v), seen_mask)]).reshape(
    3, 11, -1
  )
  scores = np.where(seen_mask[:, None], q @ k.transpose(0, 1, 3, 2) / np.sqrt(16), -np.inf)
  x = seen["embed"]["__call__"][0] + seen["positions"]["__call__"][0]
  logits_NLV = logits(hidden, transformer.head(config, params))
  found = {
    "tok_emb": seen["embed"]["__call__"][0],
    "pos_emb": seen["positions"]["__call__"][0][:1],
    "x": x,
    "ln1": layers["attention_norm"],
    "qkv": np.concatenate([layers[name] for name in ("query", "key", "value")], -1),
    "q": q,
    "k": k,
    "v": v,
    "att": scores,
    "attSm": jax.nn.softmax(scores),
    "y": attended,
    "yProj": layers["out"],
    "attnResid": x + layers["out"],
    "ln2": layers["mlp_norm"],
    "fc": layers["up"],
    "gelu": transformer.ACTIVATIONS[config.activation](layers["up"]),
    "mlp": layers["down"],
    "mlpResid": x + layers["out"] + layers["down"],
    "block0": streams[0],
    "block1": streams[1],
    "block2": streams[2],
    "ln_f": hidden,
    "lm_head": logits_NLV,
    "probs": jax.nn.softmax(logits_NLV),
  }
  assert set(found) == set(stored) - {"idx"}
  for name, value in found.items():
    expected = np.where(stored[name] < -1e30, -np.inf, stored[name])
    np.testing.assert_allclose(value, expected, atol=2e-4, err_msg=name)


def test_stories260k_gives_its_stored_logits_and_logps(shared_data):
  folder = shared_data / "models" / "stories260k"
  config, params = hf_checkpoint.load(folder)
  for item in json.loads((folder / "reference_outputs.json").read_text())["items"]:
    ids_L = np.array(item["input_ids"])
    padded = whole_rows([np.pad(ids_L, (0, 64 - len(ids_L)))])  # one shape for all sequences
    logits_LV = all_logits(config, params, padded)[0, : len(ids_L)]
    np.testing.assert_allclose(logits_LV[-1, :8], item["last_logits_first8"], atol=2e-4)
    logps_LV = jax.nn.log_softmax(logits_LV)
    for token, logp in item["last_top5"]:
      np.testing.assert_allclose(logps_LV[-1, token], logp, atol=2e-4)
    found = logps_LV[np.arange(len(ids_L) - 1), ids_L[1:]]
    np.testing.assert_allclose(found, item["token_logprobs"], atol=2e-4)


@FAMILIES
def test_shared_prompts_equal_separate_rows(config):
  params, examples = random_params(config), tiny.pairs(7)
  model = transformer.build(config)

  @jax.jit
  def naive_logps(params, batch):
    return naive_slot_logps(model.hidden(params, batch), model.head(params), batch)

  by_row = {}
  for name in ("padded", "packed", "shared"):
    batch = collate.collate(examples, layout=name, row_length=48)
    logps_NS = naive_logps(params, batch)
    pairs, rows = np.reshape(logps_NS, (-1, 2)), np.reshape(batch.row_NS, (-1, 2))[:, 0]
    by_row[name] = pairs[np.argsort(rows)][(rows < 0).sum() :]
    assert by_row[name].shape == (7, 2)
  np.testing.assert_allclose(by_row["packed"], by_row["padded"], rtol=1e-5)
  np.testing.assert_allclose(by_row["shared"], by_row["padded"], rtol=1e-5)


@FAMILIES
def test_attention_in_blocks_equals_attention_at_once(config, monkeypatch):
  params, batch = random_params(config), random_rows(2, 11)
  whole = all_logits(config, params, batch)
  monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
  np.testing.assert_allclose(all_logits(config, params, batch), whole, atol=2e-5)


@FAMILIES
def test_what_is_kept_for_the_backward_pass_changes_no_gradient(config):
  params, batch = random_params(config), random_rows(2, 11)

  def gradient(remat):
    run = forward(config, remat=remat)
    gradient_fn = jax.jit(jax.grad(lambda params: jnp.sin(run(params, batch)).sum()))
    return jax.device_get(gradient_fn(params))

  plain = gradient("none")
  for remat in ("dots", "narrow", "full") if config is LLAMA else ("dots",):
    difference = jax.tree.map(lambda a, b: abs(a - b).max(), gradient(remat), plain)
    assert max(jax.tree.leaves(difference)) < 1e-4
  assert min(float(abs(x).max()) for x in jax.tree.leaves(plain)) > 0


def test_attention_scores_are_not_kept_for_the_backward_pass():
  batch = random_rows(4, 512)
  scores = 4 * 6 * 512 * 512 * 4  # bytes of one layer's [N, H, L, L]

  def temporaries(layers):
    config = dataclasses.replace(LLAMA, layers=layers)
    hidden, shapes = transformer.build(config).hidden, transformer.param_shapes(config)
    gradient = jax.jit(jax.grad(lambda params: hidden(params, batch).sum()))
    return gradient.lower(shapes).compile().memory_analysis().temp_size_in_bytes

  assert temporaries(6) - temporaries(2) < 4 * scores / 8


def test_what_each_policy_keeps_is_what_its_name_says():
  """Counts the numbers that a layer more keeps for each of 512 tokens, besides its parameters.

  What `down` adds to the residual stream is no input of any gradient.
  """
  config = dataclasses.replace(LLAMA, mlp_width=1000)
  batch, (width, heads, keys) = random_rows(1, 512), (config.width, config.heads, config.kv_heads)
  maps = (heads + 2 * keys) * config.head_width + width  # query, key, value; out
  kept = {"narrow": width + maps, "dots": width + maps + 2 * config.mlp_width, "full": width}

  def residuals(remat, layers):
    model = transformer.build(dataclasses.replace(config, layers=layers), remat=remat)
    shapes = transformer.param_shapes(dataclasses.replace(config, layers=layers))
    _, pull = jax.eval_shape(
      lambda params: jax.vjp(lambda p: model.hidden(p, batch), params), shapes
    )
    return sum(x.size for x in jax.tree.leaves(pull))

  for remat, floats in kept.items():
    params = sum(
      x.size // config.layers
      for x in jax.tree.leaves(transformer.param_shapes(config)["params"]["layers"])
    )
    more = residuals(remat, 4) - residuals(remat, 2)
    assert more == 2 * (params + 512 * floats), remat


@FAMILIES
def test_bfloat16_activations_stay_near_float32(config):
  params, batch = random_params(config), random_rows(2, 11)
  exact, near = (all_logits(config, params, batch, dtype=d) for d in ("float32", "bfloat16"))
  assert near.dtype == np.float32
  # bfloat16 has 8 bits of mantissa: 2^-8 of the largest logit, times a few for the depth.
  assert 0 < abs(near - exact).max() < abs(exact).max() * 2**-8 * 6


@FAMILIES
def test_later_tokens_and_other_rows_change_nothing(config):
  params, batch = random_params(config), random_rows(2, 11)
  before = all_logits(config, params, batch)
  ids_NL = batch.ids_NL.copy()
  ids_NL[0, 6:] = (ids_NL[0, 6:] + 1) % tiny.VOCAB
  after = all_logits(config, params, batch._replace(ids_NL=ids_NL))
  np.testing.assert_array_equal(after[0, :6], before[0, :6])
  np.testing.assert_array_equal(after[1], before[1])
  assert (abs(after[0, 6:] - before[0, 6:]).max(axis=-1) > 1e-3).all()


def test_only_distances_between_rotary_positions_matter():
  params, batch = random_params(LLAMA), random_rows(2, 11)
  moved = batch._replace(position_NL=batch.position_NL + 1000)
  first, second = (all_logits(LLAMA, params, rows) for rows in (batch, moved))
  np.testing.assert_allclose(first, second, atol=2e-3)
  spread = batch._replace(position_NL=batch.position_NL * 2)
  assert abs(all_logits(LLAMA, params, spread) - first).max() > 0.01


def test_rotary_frequencies_by_hand():
  plain = dataclasses.replace(LLAMA, head_width=4, rope_theta=100.0)

  def scaled(kind, **options):
    scaling = configs.RopeScaling(kind, 8.0, **options)
    return rope.rotary_frequencies(dataclasses.replace(plain, rope_scaling=scaling))

  np.testing.assert_allclose(rope.rotary_frequencies(plain), [1.0, 0.1])
  np.testing.assert_allclose(scaled("linear"), [0.125, 0.0125])
  # Within 100 positions they make 15.9 turns (above 4: kept) and 1.59 turns, which is
  # (1.59 - 1) / (4 - 1) of the way from divided to kept.
  kept = (10 / (2 * np.pi) - 1) / 3
  expected = [1.0, 0.1 * (kept + (1 - kept) / 8)]
  np.testing.assert_allclose(scaled("llama3", original_positions=100), expected)


def test_an_id_outside_the_vocabulary_is_not_silent():
  batch = whole_rows([[1, tiny.VOCAB, 2]])
  assert np.isnan(all_logits(LLAMA, random_params(LLAMA), batch)[0, 1]).all()


@FAMILIES
def test_devices_by_pmap_and_by_jit_equal_one(config):
  params, batch = random_params(config), random_rows(8, 11)

  def hidden(params, ids_NL, position_NL, zeros_NL):
    batch = TokenBatch(ids_NL, position_NL, zeros_NL, *[zeros_NL] * 8)
    return transformer.build(config).hidden(params, batch)

  arrays = batch.ids_NL, batch.position_NL, batch.pair_NL
  one = jax.jit(hidden)(params, *arrays)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  sharded = jax.jit(hidden)(params, *jax.device_put(arrays, rows))
  assert len(sharded.addressable_shards) == 8
  assert sharded.addressable_shards[0].data.shape[0] == 1
  np.testing.assert_allclose(sharded, one, atol=1e-5)
  mapped = jax.pmap(hidden, in_axes=(None, 0, 0, 0))(params, *(x[:, None] for x in arrays))
  np.testing.assert_allclose(mapped[:, 0], one, atol=1e-5)


def test_initial_parameters_are_a_function_of_the_seed():
  config = dataclasses.replace(LLAMA, width=48, init_std=0.02)
  first, again, other = (
    jax.tree.map(np.asarray, transformer.init_params(config, seed)) for seed in (3, 3, 4)
  )
  same = jax.tree.map(lambda a, b: bool((a == b).all()), first, again)
  assert all(jax.tree.leaves(same))
  assert not (first["params"]["embed"]["embedding"] == other["params"]["embed"]["embedding"]).any()
  layers = first["params"]["layers"]
  std = {name: float(layer["kernel"].std()) for name, layer in layers.items() if "kernel" in layer}
  np.testing.assert_allclose([std["query"], std["up"], std["gate"]], 0.02, rtol=0.1)
  # Two maps per layer write to the residual stream, so each is scaled by 1 / sqrt(2 * 2).
  np.testing.assert_allclose([std["out"], std["down"]], 0.02 / np.sqrt(4), rtol=0.1)
  assert (layers["attention_norm"]["scale"] == 1).all()
  # No layer starts as a copy of another.
  assert not (layers["query"]["kernel"][0] == layers["query"]["kernel"][1]).any()


def test_parameters_are_stacked_and_of_the_dtype_asked_for():
  shapes = transformer.param_shapes(GPT2)
  params = transformer.init_params(GPT2, 0, dtype="bfloat16")
  assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, params)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
  assert params["params"]["layers"]["up"]["kernel"].shape == (2, 24, 40)
  assert params["params"]["head"]["embedding"].shape == (tiny.VOCAB, 24)


def test_an_unknown_remat_is_refused():
  with pytest.raises(
    UserError, match="remat 'most' is not known; known are none, dots, narrow, full"
  ):
    transformer.build(LLAMA, remat="most")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"heads": 5}, "5 heads and 2 key/value heads"),
    ({"layers": 0}, "model layers is 0; it must be a positive whole number"),
    ({"head_width": 3}, "head width 3 rotates 3 dimensions"),
  ],
)
def test_sizes_that_cannot_be_are_refused(change, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(LLAMA, **change)


def test_an_example_longer_than_learned_positions_is_refused():
  config = dataclasses.replace(GPT2, max_positions=3)
  fits = Example(np.array([1]), (np.array([4, 2]), np.array([2])), row=0)
  too_long = Example(np.array([1, 4]), (np.array([2]), np.array([4, 2])), row=8)
  configs.check_positions([fits], lengths([fits]).longest(), config)
  both = [fits, too_long]
  with pytest.raises(UserError, match="data row 8 has 4 tokens and the model 3 positions"):
    configs.check_positions(both, lengths(both).longest(), config)
  configs.check_positions(
    both, lengths(both).longest(), dataclasses.replace(LLAMA, max_positions=3)
  )
