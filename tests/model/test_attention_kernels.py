"""Attention over sequences gathered out of rows equals attention over the rows, with gradients."""

import contextlib
import dataclasses
import functools
import itertools
import re
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from dpo_jax import logprobs, losses, step
from dpo_jax.benchmarking import planner, timing
from dpo_jax.data import batches as data_batches
from dpo_jax.data import collate, packing
from dpo_jax.data.examples import Example
from dpo_jax.distributed.executor import Executor
from dpo_jax.model import attention_kernels, families, transformer
from dpo_jax.model.attention import Keys, Tokens, attend_blocks
from dpo_jax.structs import UserError
from dpo_jax.training import datasets, setup
from tests.support import tiny
from tests.support.paths import CONFIGS
from tests.support.small_attention import (
  CONFIG,
  HEAD,
  HEADS,
  LLAMA,
  MANY,
  batch_of,
  close,
  examples,
  expected_steps,
  params,
  rows_of,
  steps,
  value_and_gradient,
  without_lines,
)

MODELS_OF_WINDOWS = {
  "gemma2": families.from_hf(
    LLAMA
    | {
      "model_type": "gemma2",
      "head_dim": HEAD,
      "sliding_window": 4,
      "query_pre_attn_scalar": 16,
      "attn_logit_softcapping": 2.0,
      "final_logit_softcapping": 30.0,
      "hidden_activation": "gelu_pytorch_tanh",
    }
  ),
  # As in OLMo 3, which OLMo 2 is without windows.
  "olmo3": dataclasses.replace(families.from_hf(LLAMA | {"model_type": "olmo2"}), windows=(4, 0)),
}

# --- the arrays -----------------------------------------------------------------------------------


def pair_of(prompt, *completions):
  ids = [np.array(x, np.int32) for x in (prompt, *completions)]
  return Example(ids[0], tuple(ids[1:]), 1.0, 0)


def test_lines_of_a_shared_row_by_hand():
  # Inputs: prompt 5 6 once, then 7 opening each answer: 7 1 | 7 at places 2 to 4 of a row. The
  # sequences are 5 6 7 1 and 5 6 7, and share a line.
  pair = pair_of((5, 6, 7), (1, 2), (3,))
  batch = collate.collate([pair], layout="shared", row_length=6, per_line=MANY)
  assert batch.ids_NL.tolist() == [[5, 6, 7, 1, 7, 0]]
  assert batch.sequence_GTW.shape == (1, 1, 128) and (batch.sequence_GTW[:, :, 7:] == 6).all()
  assert batch.sequence_GTW[0, 0, :7].tolist() == [0, 1, 2, 3, 0, 1, 4]
  assert batch.start_GTSq.tolist() == [[[0, 4, 128, 128]]]  # room for twice as many sequences
  none = 128
  assert batch.place_NLK.tolist() == [
    [[0, 4], [1, 5], [2, none], [3, none], [6, none], [none, none]]
  ]


def test_a_line_of_one_sequence_by_hand():
  pair = pair_of((5, 6, 7), (1, 2), (3,))
  batch = collate.collate([pair], layout="shared", row_length=6, per_line=1)
  assert batch.sequence_GTW.shape == (1, 2, 128) and (batch.sequence_GTW[:, :, 4:] == 6).all()
  assert batch.sequence_GTW[0, :, :4].tolist() == [[0, 1, 2, 3], [0, 1, 4, 6]]
  assert batch.start_GTSq.tolist() == [[[0], [0]]]
  none = 2 * 128
  assert batch.place_NLK.tolist() == [
    [[0, 128], [1, 129], [2, none], [3, none], [130, none], [none, none]]
  ]


def test_lines_are_filled_by_best_fit():
  # 70 opens a line, 60 another, for they do not fit into 128 together; the other 60 goes behind the
  # first, 50 behind 70; 10 fits nowhere.
  lengths = np.array([60, 10, 50, 70, 60])
  filled = packing.fill_lines(lengths, 128, 2)
  assert filled.bin_x.tolist() == [1, 2, 0, 0, 1]
  assert filled.start_x.tolist() == [0, 0, 70, 0, 60]
  assert filled.order_x.tolist() == [0, 0, 1, 0, 1]
  assert filled.count == 3 and packing.most_lines([lengths, lengths[:1]], 128, MANY) == 3
  # 10 would fit behind the others if they were shorter by 2, and lines could have three.
  shorter = np.array([60, 10, 48, 68, 60])
  assert packing.fill_lines(shorter, 128, MANY).count == 2
  assert packing.fill_lines(shorter, 128, 2).count == 3
  assert packing.fill_lines(lengths, 256, MANY).count == 1
  assert packing.most_lines([lengths[:0]], 128, MANY) == 1


def sequences_in(batch):
  """Reads every sequence of a batch: [(group, ids)]."""
  groups, _, width = batch.sequence_GTW.shape
  ids_GNl = np.pad(batch.ids_NL.reshape(groups, -1), ((0, 0), (0, 1)), constant_values=-1)
  for group, lines in enumerate(batch.sequence_GTW):
    for line, starts in zip(lines, batch.start_GTSq[group], strict=True):
      ids_W = ids_GNl[group][line]
      end = (ids_W >= 0).sum()
      assert (ids_W[end:] == -1).all()  # padding stands at the end
      starts = starts[starts < width].tolist()
      for start, stop in itertools.pairwise([*starts, end]):
        assert stop > start
        yield group, ids_W[start:stop].tolist()


@pytest.mark.parametrize("name", packing.LAYOUTS)
@pytest.mark.parametrize("completions", [1, 2, 3])
@pytest.mark.parametrize("per_line", [1, 2, MANY])
def test_sequences_are_those_of_the_examples(name, completions, per_line):
  batch = batch_of(name, completions, per_line=per_line)
  groups, lines, width = batch.sequence_GTW.shape
  written = [
    [*e.prompt.tolist(), *answer[:-1].tolist()]
    for e in examples(5, completions)
    for answer in e.completions
    if len(answer)
  ]
  assert sorted(ids for _, ids in sequences_in(batch)) == sorted(written)
  assert (batch.start_GTSq == width).all(axis=-1).any()  # a line of nothing but padding
  assert batch.start_GTSq.shape[-1] <= per_line
  # Every place leads back to its token, and every token of a sequence is led to.
  tokens = batch.ids_NL.size // groups
  place_GTw = batch.place_NLK.reshape(groups, -1)
  for group in range(groups):
    token = np.repeat(np.arange(tokens), batch.place_NLK.shape[-1])
    real = place_GTw[group] < lines * width
    assert (batch.sequence_GTW[group].reshape(-1)[place_GTw[group][real]] == token[real]).all()
    assert real.sum() == (batch.sequence_GTW[group] < tokens).sum()
  assert ((batch.place_NLK[..., 0] < lines * width) == (batch.pair_NL >= 0)).all()


def test_a_group_without_sequences_has_a_line_of_padding():
  batch = collate.collate(examples(1, 2), row_length=48, groups=2, per_line=MANY)
  assert batch.sequence_GTW.shape[:2] == (2, 1)
  assert (batch.sequence_GTW[1] == 48).all() and (batch.start_GTSq[1] == 128).all()


def test_shared_lines_are_hardly_padded():
  rng = np.random.default_rng(0)
  some = [
    pair_of(rng.integers(1, 9, 30), *(rng.integers(1, 9, n) for n in rng.integers(2, 600, 2)))
    for _ in range(32)
  ]
  filled = {}
  for per_line in (1, MANY):
    batch = collate.collate(some, row_length=1280, groups=2, per_line=per_line)
    filled[per_line] = (batch.sequence_GTW < batch.ids_NL.size // 2).mean()
  assert filled[MANY] > 0.85 > 0.6 > filled[1]


def test_shapes_are_few():
  assert [packing.round_up_width(x) for x in (1, 128, 129, 600, 1025, 2000)] == [
    128, 128, 256, 640, 1280, 2048,
  ]  # fmt: skip
  some = tiny.pairs(64, longest=300)
  stream = data_batches.batches(
    some, batch_size=8, accumulate=2, batching=data_batches.Batching(per_line=MANY, groups=2)
  )
  taken = [next(stream) for _ in range(16)]
  assert len({(batch.sequence_GTW.shape, batch.start_GTSq.shape) for batch in taken}) <= 2
  batches = data_batches.eval_batches(
    some, batch_size=7, batching=data_batches.Batching(per_line=MANY)
  )
  assert len({(batch.sequence_GTW.shape, batch.start_GTSq.shape) for batch in batches}) == 1


def test_hosts_fill_the_lines_of_their_own_rows():
  some = examples(9, 3)
  whole = collate.collate_many([some], row_length=48, groups=4, per_line=MANY)
  parts = [
    collate.collate_many([some], row_length=48, groups=4, per_line=MANY, share=(host, 2))
    for host in range(2)
  ]
  joined = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *parts)
  jax.tree.map(np.testing.assert_array_equal, joined, whole)
  # A host may have nothing but padding.
  only = collate.collate([some[0]], row_length=48, groups=2, per_line=MANY, share=(1, 2))
  assert (only.sequence_GTW == 48).all()


# --- attention ------------------------------------------------------------------------------------


def by_rows(batch, window=0, scale=0.0, cap=0.0):
  """Returns attention over the rows, a function of q, k and v."""
  tokens = Tokens(batch.position_NL, batch.pair_NL, batch.branch_NL)

  def attend(q, k, v):
    keys = Keys(k.swapaxes(1, 2), v.swapaxes(1, 2))
    return attend_blocks(q, keys, tokens, window or None, scale=scale, cap=cap)

  return attend


def by_sequences(batch, options, windows=None):
  """Returns attention over the sequences of the rows, a function of q, k and v."""
  index = attention_kernels.index_sequences(batch)
  return lambda q, k, v: attention_kernels.attend_sequences(q, k, v, index, options, windows)


@pytest.mark.parametrize(
  ("name", "completions", "window", "kv_heads"),
  [
    ("shared", 1, 0, 2),
    ("shared", 2, 0, 1),
    ("shared", 2, 3, 4),
    ("shared", 3, 0, 4),
    ("packed", 3, 3, 2),
    ("padded", 2, 0, 2),
  ],
)
def test_attention_over_lines_is_that_over_rows(name, completions, window, kv_heads):
  batch = batch_of(name, completions)
  qkv, slope = rows_of(batch, kv_heads=kv_heads)
  expected = value_and_gradient(by_rows(batch, window, scale=0.3), qkv, slope)
  found = value_and_gradient(
    by_sequences(batch, attention_kernels.KernelOptions("xla", window, 0.3)), qkv, slope
  )
  close(found, expected)
  whole = jax.jit(by_sequences(batch, attention_kernels.KernelOptions("xla", window)))(*qkv)
  assert (np.asarray(whole)[batch.pair_NL < 0] == 0).all()


@pytest.mark.parametrize(("per_line", "window"), [(1, 3), (2, 0)])
def test_lines_may_have_few_sequences(per_line, window):
  batch = batch_of(completions=3, per_line=per_line)
  qkv, slope = rows_of(batch)
  expected = value_and_gradient(by_rows(batch, window), qkv, slope)
  kind = attention_kernels.KernelOptions("xla", window)
  close(value_and_gradient(by_sequences(batch, kind), qkv, slope), expected)


def test_a_group_may_have_no_sequences():
  batch = collate.collate(examples(1, 2), row_length=48, groups=2, per_line=MANY)
  qkv, slope = rows_of(batch)
  expected = value_and_gradient(by_rows(batch), qkv, slope)
  kind = attention_kernels.KernelOptions("xla")
  close(value_and_gradient(by_sequences(batch, kind), qkv, slope), expected)


@pytest.mark.parametrize("window", [0, 3])
def test_splash_is_the_attention_over_rows(window):
  batch = batch_of(completions=3, count=2, groups=1)
  qkv, slope = rows_of(batch)
  expected = value_and_gradient(by_rows(batch, window, scale=0.3), qkv, slope)
  kind = attention_kernels.KernelOptions("splash", window, 0.3, interpret=True)
  close(value_and_gradient(by_sequences(batch, kind), qkv, slope), expected)


def test_blocks_of_splash_divide_lines_and_are_not_small():
  widths = (128, 384, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 3584, 32768)
  assert [attention_kernels._splash_block(width, 64) for width in widths] == [
    128, 384, 640, 768, 896, 512, 640, 512, 896, 512, 512, 512,
  ]  # fmt: skip
  # Of all widths that lines have, none has blocks beyond 896, which fit in a TPU's memory.
  every = {packing.round_up_width(tokens) for tokens in range(1, 5000)}
  assert max(attention_kernels._splash_block(width, 64) for width in every) == 896
  assert attention_kernels._splash_block(896, 512) == 128


@pytest.mark.parametrize(
  ("kernel", "completions", "layer", "cap"),
  [("xla", 3, 0, 0.0), ("xla", 2, 1, 1.5), ("xla", 3, 2, 1.5), ("splash", 2, 1, 1.5)],
)
def test_a_layer_has_its_window_and_cap(kernel, completions, layer, cap):
  """Layers of windows 0, 3 and 200, of which the last is longer than any sequence."""
  batch = batch_of(completions=completions, count=2, groups=1)
  qkv, slope = rows_of(batch)
  sizes = (0, 3, 200)
  expected = value_and_gradient(by_rows(batch, sizes[layer], 0.3, cap), qkv, slope)
  options = attention_kernels.KernelOptions(kernel, 0, 0.3, interpret=True, cap=cap)
  windows = attention_kernels.WindowChoice(sizes, jnp.int32(layer))
  found = value_and_gradient(by_sequences(batch, options, windows), qkv, slope)
  close(found, expected)


def test_windows_beyond_the_longest_sequence_need_one_program():
  batch = batch_of()
  qkv, _ = rows_of(batch)

  def programs(*sizes):
    windows = attention_kernels.WindowChoice(sizes, jnp.int32(0))
    options = attention_kernels.KernelOptions("xla")
    return str(jax.make_jaxpr(by_sequences(batch, options, windows))(*qkv)).count("branches=")

  assert (programs(0, 128, 4096), programs(0, 127)) == (0, 1)  # sequences are 128 wide


@pytest.fixture
def cudnn_there(monkeypatch):
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)


def lowered(platform, attend, *args):
  """Returns the program that XLA gets on another platform for attention and its gradient."""

  def value(*qkv):
    return attend(*qkv).astype(jnp.float32).sum()

  traced = jax.jit(jax.value_and_grad(value, (0, 1, 2))).trace(*args)
  return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("divided", [False, True])
def test_splash_is_given_what_it_takes(divided, window):
  """Checks, without a TPU, that kernels are made for whole sequences and whole heads."""
  batch = batch_of()
  qkv, _ = rows_of(batch, dtype=jnp.bfloat16)
  mesh = Executor("mesh", 4, fsdp=2, tensor=2).mesh
  with jax.set_mesh(mesh) if divided else contextlib.nullcontext():
    text = lowered(
      "tpu", by_sequences(batch, attention_kernels.KernelOptions("splash", window)), *qkv
    )
  assert text.count("@tpu_custom_call") == 3  # forward; queries; keys and values
  lines = batch.sequence_GTW.shape[1] if divided else 2 * batch.sequence_GTW.shape[1]
  assert f"tensor<{lines}x{HEADS // 2 if divided else HEADS}x128x{HEAD}xbf16>" in text
  assert (f"x{HEADS}x128x{HEAD}x" in text) != divided


@pytest.mark.parametrize("window", [0, 3])
def test_cudnn_is_given_what_it_takes(cudnn_there, window):
  """Checks, without a GPU, the types, the shapes and the kind of mask that cuDNN gets."""
  batch = batch_of(per_line=1)
  qkv, _ = rows_of(batch, dtype=jnp.bfloat16)
  text = lowered(
    "cuda", by_sequences(batch, attention_kernels.KernelOptions("cudnn", window)), *qkv
  )
  calls = set(re.findall(r"__cudnn\$\w+", text))
  assert calls == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}

  assert settings(text, "mask_type") == {"CAUSAL" if window else "PADDING_CAUSAL"}
  assert settings(text, "sliding_window_length") == {str(window)}
  assert settings(text, "max_seg_per_batch") == {"1"}
  lines = batch.sequence_GTW.shape[0] * batch.sequence_GTW.shape[1]
  assert f"tensor<{lines}x128x{HEADS}x{HEAD}xbf16>" in text
  assert "128x128" not in text  # no length x length


def settings(text, name):
  """Returns the values of a setting of cuDNN's calls in a program."""
  return set(re.findall(rf'"{name}": "?(\w+)', text.replace(r"\22", '"')))


def test_cudnn_is_given_lines_of_several_sequences(cudnn_there):
  batch = batch_of()
  qkv, _ = rows_of(batch, dtype=jnp.bfloat16)
  text = lowered("cuda", by_sequences(batch, attention_kernels.KernelOptions("cudnn")), *qkv)
  groups, lines, width = batch.sequence_GTW.shape
  entries = batch.start_GTSq.shape[-1]
  assert entries > 1 and groups * lines < 9  # sequences
  assert settings(text, "mask_type") == {"PADDING_CAUSAL"}
  assert settings(text, "max_seg_per_batch") == {str(entries)}
  assert f"tensor<{groups * lines}x{width}x{HEADS}x{HEAD}xbf16>" in text
  assert f"{width}x{width}" not in text


def test_cudnn_is_told_where_sequences_start(monkeypatch):
  # Two lines of 8: sequences of 3 and 2 tokens and padding; nothing but padding.
  found = {}

  def attend(q, k, v, **how):
    found.update(how)
    return q

  monkeypatch.setattr(attention_kernels, "_ragged_attention", lambda: (attend, "causal"))
  parts = attention_kernels.Parts(np.array([[0, 3, 8], [8, 8, 8]]), np.array([5, 0]))
  qkv = (np.zeros((2, 8, 1, 16)),) * 3
  attention_kernels._cudnn(*qkv, parts, attention_kernels.KernelOptions("cudnn"))
  lengths, offsets = [[3, 2, -1], [-1, -1, -1]], [[0, 3, -1, -1], [-1, -1, -1, -1]]
  assert found["q_seqlen"].tolist() == found["kv_seqlen"].tolist() == lengths
  assert found["q_offsets"].tolist() == found["kv_offsets"].tolist() == offsets
  assert found["scale"] == 0.25 and found["mask_type"] == "causal"


@pytest.mark.parametrize("per_line", [1, MANY])
def test_cudnn_is_given_what_it_takes_on_a_mesh(cudnn_there, per_line):
  executor = Executor("mesh", 4, fsdp=2, tensor=2)
  batch = batch_of(per_line=per_line)
  qkv, _ = rows_of(batch, dtype=jnp.bfloat16)
  with jax.set_mesh(executor.mesh):
    text = lowered("cuda", by_sequences(batch, attention_kernels.KernelOptions("cudnn")), *qkv)
  lines = batch.sequence_GTW.shape[1]  # of one of two groups, half the heads
  assert "__cudnn$fmhaSoftmaxBackward" in text
  assert f"tensor<{lines}x128x{HEADS // 2}x{HEAD}xbf16>" in text
  assert f"x128x{HEADS}x{HEAD}x" not in text


# --- the model and the step -----------------------------------------------------------------------


def test_a_model_takes_rows_that_list_no_sequences_as_they_are():
  batch = without_lines(batch_of())
  built = (transformer.build(CONFIG, attention=name) for name in ("blocked", "xla"))
  plain, other = (jax.jit(model.hidden).lower(params(), batch).as_text() for model in built)
  assert plain == other


@pytest.mark.parametrize(
  ("mode", "mesh", "accumulate"),
  [
    pytest.param("mesh", (8, 2, 2), 2, marks=pytest.mark.slow),
    pytest.param("mesh", (1,), 2, marks=pytest.mark.slow),
    pytest.param("mesh", (8, 2, 4), 2, marks=pytest.mark.slow),  # heads of keys do not divide by 4
    pytest.param("mesh", (2, 1, 1, 2), 1, marks=pytest.mark.slow),
    pytest.param("mesh", (4, 1, 1, 4), 2, marks=pytest.mark.slow),
    pytest.param("mesh", (8, 2, 2, 2), 1, marks=pytest.mark.slow),
    pytest.param("pmap", (4,), 1, marks=pytest.mark.slow),
  ],
)
def test_a_step_over_lines_is_that_over_rows(mode, mesh, accumulate):
  close(steps("xla", mode, *mesh, accumulate=accumulate), expected_steps())


@pytest.mark.slow
def test_layers_of_one_window_step_alike():
  config = families.from_hf(LLAMA | {"model_type": "mistral", "sliding_window": 4})
  assert config.windows == (4, 4)
  close(
    steps("xla", "mesh", 1, config=config, remat="none"), steps("blocked", "mesh", 1, config=config)
  )


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gemma2", "olmo3"])
@pytest.mark.parametrize(
  ("mesh", "remat"), [((1,), "dots"), ((1,), "full"), ((4, 1, 1, 2), "dots")]
)
def test_layers_of_different_windows_step_alike(model, mesh, remat):
  config = MODELS_OF_WINDOWS[model]
  found = steps("xla", "mesh", *mesh, config=config, remat=remat)
  close(found, steps("blocked", "mesh", 1, config=config))


@pytest.mark.parametrize(
  ("attention", "platform", "call", "per_line"),
  [
    ("cudnn", "cuda", "__cudnn$fmhaSoftmax", 1),
    ("cudnn", "cuda", "__cudnn$fmhaSoftmax", MANY),
    ("splash", "tpu", "tpu_custom_call", MANY),
  ],
)
def test_a_whole_step_is_lowered_for_accelerators(cudnn_there, attention, platform, call, per_line):
  """The step in bfloat16 has no array of scores between the 160 columns of a row."""
  model = transformer.build(CONFIG, attention=attention, dtype="bfloat16")
  objective = step.Objective(logprobs.make_logps_fn(model), losses.resolve("sigmoid"))
  tx = optax.adamw(1e-3)
  parts = [examples(8, 2), examples(8, 2, seed=1)]
  batch = collate.collate_many(parts, row_length=160, groups=2, per_line=per_line)
  take = jax.jit(functools.partial(step.train_step, objective=objective, tx=tx))
  traced = take.trace(step.init_state(params(), tx), params(), batch)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  # The reference forward, the policy forward, and its backward pass. That reads what was kept,
  # unless it is mostly padding: then there is another forward.
  backward = {"cudnn": 1, "splash": 2}[attention] + (per_line == 1)
  assert len(re.findall(rf"@{re.escape(call)}", text)) == 2 + backward
  assert "160x160" not in text


# --- the setting ----------------------------------------------------------------------------------


def device(platform, capability=None):
  return types.SimpleNamespace(platform=platform, compute_capability=capability)


def chosen(name, at, config=CONFIG, dtype="bfloat16", **how):
  return attention_kernels.choose(name, config, dtype=dtype, device=at, **how)


def test_what_is_taken_where():
  hopper, ampere = device("gpu", "9.0"), device("gpu", "8.6")
  tpu, cpu = device("tpu"), device("cpu")
  assert [chosen("auto", at)[0] for at in (hopper, ampere, tpu, cpu)] == [
    "cudnn", "cudnn", "splash", "tiles",
  ]  # fmt: skip
  assert all(chosen("auto", at)[1] == "" for at in (hopper, ampere, tpu, cpu))
  assert all(chosen("blocked", at) == ("blocked", "") for at in (hopper, tpu, cpu))
  assert chosen("xla", cpu) == ("xla", "") and chosen("splash", tpu) == ("splash", "")
  assert chosen("auto", cpu, dtype="float32") == ("tiles", "")


def test_how_many_sequences_share_a_line(monkeypatch):
  hopper, ampere, newest = device("gpu", "9.0"), device("gpu", "8.6"), (0, 11, 2)
  both = families.from_hf(LLAMA | {"num_key_value_heads": 4})
  windows = families.from_hf(LLAMA | {"model_type": "mistral", "sliding_window": 4})

  def most(name, at, config=CONFIG, version=newest):
    monkeypatch.setattr(jax, "__version_info__", version)
    return attention_kernels.sequences_per_line(name, config, at)

  assert most("blocked", hopper) == most("tiles", device("cpu")) == 0
  assert most("splash", device("tpu")) == most("xla", hopper) > 10**6
  assert most("cudnn", hopper) > 10**6 and most("cudnn", ampere) == 1
  assert most("cudnn", hopper, windows) == 1
  # JAX 0.10 reads keys at the offsets of queries, which is right where they have as many heads.
  assert most("cudnn", hopper, version=(0, 10, 2)) == 1
  assert most("cudnn", hopper, both, version=(0, 10, 2)) > 10**6
  # The function is not a public one.
  monkeypatch.delattr(cudnn, "MaskType")
  assert most("cudnn", hopper) == 1


@pytest.mark.parametrize(
  ("name", "at", "how", "why"),
  [
    ("cudnn", device("cpu"), {}, "cudnn runs on NVIDIA GPUs, and this is cpu"),
    ("cudnn", device("gpu", "gfx90a"), {}, "cudnn runs on NVIDIA GPUs"),
    ("auto", device("gpu", "7.5"), {}, "capability 8.0 or above, and this has 7.5"),
    (
      "auto",
      device("gpu", "9.0"),
      {"dtype": "float32"},
      "bfloat16, and it is float32",
    ),
    ("auto", device("gpu", "8.0"), {"head_dim": 256}, "multiple of 8 up to 128 here, .* have 256"),
    ("auto", device("gpu", "12.0"), {"head_dim": 20}, "multiple of 8 up to 256 here, .* have 20"),
    ("splash", device("gpu", "9.0"), {}, "splash runs on TPUs, and this is gpu"),
    ("auto", device("gpu", "9.0"), {"attention_cap": 50.0}, "no cap on .* the model's is 50.0"),
  ],
)
def test_what_is_not_taken_is_said(name, at, how, why):
  fields = {k: how.pop(k) for k in ("head_dim",) if k in how}
  own = {k: how.pop(k) for k in ("attention_cap",) if k in how}
  config = types.SimpleNamespace(**vars(families.from_hf(LLAMA | fields)) | own)
  taken, said = chosen(name, at, config, **how)
  assert taken == "blocked" and re.search(why, said)


@pytest.mark.parametrize("model", ["gemma2", "olmo3"])
def test_windows_by_layer_and_caps_are_for_kernels(model):
  config = MODELS_OF_WINDOWS[model]
  assert len(set(config.windows)) == 2 and bool(config.attention_cap) == (model == "gemma2")
  assert chosen("auto", device("tpu"), config) == ("splash", "")
  assert chosen("xla", device("cpu"), config) == ("xla", "")
  taken = "blocked" if config.attention_cap else "cudnn"
  assert chosen("auto", device("gpu", "9.0"), config)[0] == taken


def test_heads_of_256_are_for_hopper():
  config = families.from_hf(LLAMA | {"head_dim": 256})
  assert chosen("auto", device("gpu", "9.0"), config) == ("cudnn", "")


def configured(folder, attention):
  config = runpy.run_path(str(CONFIGS / "benchmark.py"))["get_config"]("controlled")
  config.synthetic.pairs = 16
  config.train.batch_size = 8
  config.model.attention = attention
  config.parallel.devices = 1
  config.data.path, config.model.tokenizer = timing.write_task(
    folder, config.model.scratch.vocab_size, max_length=64, **config.synthetic
  )
  return config


def test_an_unknown_name_is_refused_before_anything_is_read(tmp_path):
  config = configured(tmp_path, "flash")
  config.data.path = "nowhere"
  with pytest.raises(
    UserError, match=r"model.attention is 'flash'; known: auto, blocked, tiles, cudnn, "
  ):
    setup.build(config, tmp_path)


def test_a_run_says_what_it_takes_instead(tmp_path, capsys):
  run, *_ = setup.build(configured(tmp_path, "cudnn"), tmp_path)
  why = "cudnn runs on NVIDIA GPUs, and this is cpu"
  said = capsys.readouterr().err.splitlines()
  assert f"warning: model.attention is cudnn, but {why}: blocked is taken" in said
  assert not run.data.batching.per_line
  setup.build(configured(tmp_path, "auto"), tmp_path)
  assert "model.attention" not in capsys.readouterr().err


def test_a_run_lists_sequences_where_they_are_taken(tmp_path):
  config = configured(tmp_path, "xla")
  run, trained, *_ = setup.build(config, tmp_path)
  batch, _ = datasets.make_feed(run.data, None, 0)(1, None)
  assert batch.sequence_GTW is not None
  lengths = planner.Lengths(60)
  assert planner.outline(config, lengths).batch.sequence_GTW is not None
  keys = [
    setup.reference_key(config, run.model_config, jax.devices()[0], name)
    for name in ("blocked", "xla", "cudnn")
  ]
  assert [key.get("attention") for key in keys] == [None, "xla", "cudnn"]

  def score(model, batch):
    return jax.jit(logprobs.make_logps_fn(model))(trained, batch)

  first = jax.tree.map(lambda x: x[0], batch)
  plain = transformer.build(run.model_config)
  close(score(run.model, first), np.asarray(score(plain, without_lines(first))))
