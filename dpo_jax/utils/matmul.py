"""Matrix products of narrow inputs with sums in float32, forward and backward.

JAX's own gradient of a product of bfloat16 inputs with a float32 result multiplies in float32, at a
fraction of the speed, because the cotangent is float32. Here the cotangent is first rounded to the
type of the inputs. Sums, and the gradient of a float32 kernel, stay float32.

Products of float32 inputs are computed in float32 on every device. By default TPUs and GPUs would
round their inputs, to bfloat16 and to TF32.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp

from dpo_jax.structs import Array

# Callers give this name to an output that remat should keep: a policy does not see the products
# inside a function with a gradient of its own. Outputs that are several times as wide as the model
# have a name of their own: they take most of the memory, and can be computed again alone.
NAME, WIDE_NAME = "product", "wide product"


@jax.custom_vjp
def product(x_xD: Array, kernel_DFf: Array) -> Array:
  """Computes x @ kernel with inputs in the type of x, and the result in float32 or wider.

  Args:
    x_xD: [..., D], any leading axes.
    kernel_DFf: [D, F], cast to the type of x.

  Returns:
    [..., Ff].
  """
  return _dot(x_xD, kernel_DFf.astype(x_xD.dtype), 0)


@jax.custom_vjp
def product_of_rows(x_xD: Array, table_VD: Array) -> Array:
  """Computes x @ table.T in the same way as `product`: [..., V]."""
  return _dot(x_xD, table_VD.astype(x_xD.dtype), 1)


def exact(dtype: Any) -> dict[str, Any]:
  """Returns options of JAX's products with inputs of one type: sums are float32 or wider.

  They also keep float32 inputs as they are, which costs several passes of the hardware's products.
  """
  narrow = jnp.dtype(dtype).itemsize < 4
  return {
    "preferred_element_type": jnp.promote_types(dtype, jnp.float32),
    "precision": None if narrow else jax.lax.Precision.HIGHEST,
  }


def contract(equation: str, a: Array, b: Array) -> Array:
  """Computes an einsum of two arrays of one type, with sums in float32 or wider.

  Args:
    equation: every index of an input is one of the other input or of the result.
    a, b: the inputs, of one type.
  """
  # JAX types the result of a custom_vjp with nondiff_argnums as an unknown object.
  return cast(Array, _contract(equation, a, b))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract(equation: str, a: Array, b: Array) -> Array:
  return jnp.einsum(equation, a, b, **exact(a.dtype))


def _contract_backward(equation: str, saved: tuple[Array, Array], slope: Array):
  """Returns the gradients of both inputs, by products whose inputs are as narrow as these."""
  a, b = saved
  inputs, _, out = equation.partition("->")
  of_a, _, of_b = inputs.partition(",")
  slope = slope.astype(a.dtype)
  da = contract(f"{out},{of_b}->{of_a}", slope, b)
  return da.astype(a.dtype), contract(f"{out},{of_a}->{of_b}", slope, a).astype(b.dtype)


_contract.defvjp(lambda equation, a, b: (contract(equation, a, b), (a, b)), _contract_backward)


def _dot(x_xD: Array, kernel: Array, axis: int) -> Array:
  """Contracts the last axis of x with an axis of the kernel, and adds up in float32 or wider."""
  dims = (((x_xD.ndim - 1,), (axis,)), ((), ()))
  return jax.lax.dot_general(x_xD, kernel, dims, **exact(x_xD.dtype))


def _pulled(x_xD: Array, kernel: Array, axis: int, slope_xFf: Array) -> tuple[Array, Array]:
  """Returns the gradients with respect to x and the kernel, given that of the result."""
  slope_xFf = slope_xFf.astype(x_xD.dtype)  # both products below then have narrow inputs
  dx_xD = _dot(slope_xFf, kernel.astype(x_xD.dtype), 1 - axis).astype(x_xD.dtype)
  leading = tuple(range(x_xD.ndim - 1))
  # The order decides which axis comes first: [D, F] for a kernel, [V, D] for a table.
  pair = (x_xD, slope_xFf) if axis == 0 else (slope_xFf, x_xD)
  dkernel = jax.lax.dot_general(*pair, ((leading, leading), ((), ())), **exact(x_xD.dtype))
  return dx_xD, dkernel.astype(kernel.dtype)


product.defvjp(
  lambda x_xD, kernel_DFf: (product(x_xD, kernel_DFf), (x_xD, kernel_DFf)),
  lambda saved, slope_xFf: _pulled(saved[0], saved[1], 0, slope_xFf),
)
product_of_rows.defvjp(
  lambda x_xD, table_VD: (product_of_rows(x_xD, table_VD), (x_xD, table_VD)),
  lambda saved, slope_xV: _pulled(saved[0], saved[1], 1, slope_xV),
)
