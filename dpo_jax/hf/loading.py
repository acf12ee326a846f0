"""Loading the leaves of a parameter tree: filled on host a layer at a time, then put on devices."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from dpo_jax.distributed.gather import Lead
from dpo_jax.structs import UserError

# Numbers that are checked at a time when a whole tensor is checked.
BLOCK = 1 << 20

Bounds = tuple[tuple[int, int], ...]  # start and end along every axis of a leaf


class Leaf:
  """A leaf that is being filled: one host buffer for each part of it that this process stores.

  Attributes:
    shape: shape of the whole leaf.
    sharding: its placement; None leaves it on host.
    dtype: its type.
    parts: the buffers, by the bounds of their part.
  """

  def __init__(self, shape: tuple[int, ...], sharding: Sharding | None, dtype: np.dtype):
    self.shape, self.sharding, self.dtype = shape, sharding, dtype
    indices = [(slice(None),) * len(shape)]
    if sharding is not None:
      indices = sharding.addressable_devices_indices_map(shape).values()
    self.parts = {}
    # A set, since devices with copies of one part share its buffer.
    for bounds in {self._bounds(index) for index in indices}:
      self.parts[bounds] = np.empty([end - start for start, end in bounds], dtype)

  def _bounds(self, index: Any) -> Bounds:
    """Returns the bounds of an index, which is a tuple of slices."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True))

  def needs(self, lead: Lead) -> bool:
    """Returns whether this process stores any part of a layer."""
    return any(self._inside(lead, bounds) for bounds in self.parts)

  @staticmethod
  def _inside(lead: Lead, bounds: Bounds) -> bool:
    """Returns whether a layer lies within a part."""
    # Not strict: `lead` has fewer axes than the leaf.
    return all(start <= i < end for i, (start, end) in zip(lead, bounds, strict=False))

  def fill(self, lead: Lead, array: np.ndarray) -> bool:
    """Copies one layer into the buffers; returns whether all its numbers are finite.

    Args:
      lead: number of the layer, and of the expert if there is one.
      array: the layer's numbers, whole.
    """
    finite = True
    for bounds, part in self.parts.items():
      if self._inside(lead, bounds):
        mine = part[tuple(i - start for i, (start, _) in zip(lead, bounds, strict=False))]
        # A number too large for a narrow type becomes infinite here; the check below finds it, so
        # NumPy's warning would only repeat it.
        with np.errstate(over="ignore", invalid="ignore"):
          mine[...] = array[tuple(slice(*ends) for ends in bounds[len(lead) :])]
        # After the cast, because a number may be finite on disk and infinite in the leaf's type.
        finite &= _is_finite(mine)
    return finite

  def place(self) -> np.ndarray | jax.Array:
    """Returns the leaf, on its devices or on host."""
    if self.sharding is None:
      (whole,) = self.parts.values()
      return whole

    def part(index: Any) -> np.ndarray:
      return self.parts[self._bounds(index)]

    # Waits for the copy to end. Otherwise the host buffers of several leaves would exist at once.
    return jax.make_array_from_callback(self.shape, self.sharding, part).block_until_ready()


def distribute(
  array: np.ndarray, lead: Lead, leaves: list[Leaf], transposed: bool, what: str
) -> None:
  """Divides one tensor along its last axis among the leaves that it contains.

  Args:
    array: the tensor, as on disk.
    lead: number of its layer, and of its expert if there is one.
    leaves: the leaves that it contains, in order.
    transposed: whether it is stored transposed.
    what: its name, for the error message.

  Raises:
    UserError: it contains numbers that are not finite.
  """
  array = array.T if transposed else array
  start = 0
  for leaf in leaves:
    end = start + leaf.shape[-1]
    if not leaf.fill(lead, array[..., start:end]):
      raise UserError(
        f"{what} holds numbers that are not finite in {leaf.dtype}; a model that diverged cannot"
        " be used, take an earlier one"
      )
    start = end


def _is_finite(array: np.ndarray) -> bool:
  """Returns whether all numbers are finite."""
  # In blocks: the booleans of a whole tensor would be another large array.
  flat = array.reshape(-1)
  return all(np.isfinite(flat[i : i + BLOCK]).all() for i in range(0, flat.size, BLOCK))
