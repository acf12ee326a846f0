"""Tests what types products have, forward and backward, and the gradients of a contraction."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import logprobs, losses, step
from dpo_jax.data.collate import collate_many
from dpo_jax.model import families, transformer
from dpo_jax.utils import matmul
from tests.support import tiny

LLAMA = {
  "model_type": "llama",
  "vocab_size": tiny.VOCAB,
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 24,
  "max_position_embeddings": 64,
}


@pytest.mark.parametrize("equation", ["gmd,vd->gmv", "njxk,njck->njxc", "gmv,gm->v", "ab,bc->ac"])
def test_the_gradients_of_a_contraction_are_those_of_an_einsum(equation):
  rng = np.random.default_rng(0)
  inputs, out = equation.split("->")
  sizes = {name: 2 + i for i, name in enumerate(sorted(set(equation) - set(",->")))}
  a, b, slope = (
    jnp.asarray(rng.normal(size=[sizes[name] for name in names]), jnp.float32)
    for names in (*inputs.split(","), out)
  )

  def gradients(fn):
    value, pull = jax.vjp(fn, a, b)
    return value, *pull(slope)

  found = gradients(functools.partial(matmul.contract, equation))
  expected = gradients(functools.partial(jnp.einsum, equation))
  for x, y in zip(found, expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@functools.cache
def products(dtype, attention):
  """Returns (types of both inputs, precision) of every product of a step, before compilation."""
  config = families.from_hf(LLAMA)
  model = transformer.build(config, dtype=dtype, attention=attention)
  objective = step.Objective(logprobs.make_logps_fn(model), losses.resolve("sigmoid"))
  tx = optax.sgd(1e-3)
  params = jax.eval_shape(lambda: transformer.init_params(config, 0))
  state = jax.eval_shape(functools.partial(step.init_state, tx=tx), params)
  batch = collate_many([tiny.pairs(4)], row_length=64)
  take = jax.jit(functools.partial(step.train_step, objective=objective, tx=tx))
  text = take.trace(state, params, batch).lower().as_text()
  found = []
  for line in text.splitlines():
    if "dot_general" in line:
      precision = re.search(r"precision = \[(\w+), (\w+)\]", line)
      kinds = re.findall(r"tensor<(?:\d+x)*(\w+)>", line.rsplit(" : ", 1)[1])[:2]
      found.append((tuple(kinds), precision and precision.groups()))
  return found


@pytest.mark.parametrize("attention", ["blocked", "tiles"])
def test_no_product_of_a_bfloat16_model_has_float32_inputs(attention):
  """A float32 input would make a product several times slower, backward as forward."""
  found = products("bfloat16", attention)
  assert len(found) > 20
  assert {kinds for kinds, _ in found} == {("bf16", "bf16")}


@pytest.mark.parametrize("attention", ["blocked", "tiles"])
def test_products_of_a_float32_model_are_computed_in_float32_everywhere(attention):
  """The default precision of TPUs rounds float32 inputs to bfloat16, that of GPUs to TF32."""
  found = products("float32", attention)
  assert len(found) > 20
  assert set(found) == {(("f32", "f32"), ("HIGHEST", "HIGHEST"))}
