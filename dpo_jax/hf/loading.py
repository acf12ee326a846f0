"""Leaves of a parameter tree: filled on host a layer at a time, then placed on devices."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from dpo_jax.distributed.gather import Lead
from dpo_jax.structs import UserError

# Numbers looked at together where whole tensors are looked through.
BLOCK = 1 << 20

Bounds = tuple[tuple[int, int], ...]  # start and end along every axis of a leaf


class Leaf:
  """A leaf being filled: a host buffer for each distinct part of it that this process holds."""

  def __init__(self, shape: tuple[int, ...], sharding: Sharding | None, dtype: np.dtype):
    self.shape, self.sharding, self.dtype = shape, sharding, dtype
    indices = [(slice(None),) * len(shape)]
    if sharding is not None:
      indices = sharding.addressable_devices_indices_map(shape).values()
    self.parts = {}
    for bounds in {self._bounds(index) for index in indices}:
      self.parts[bounds] = np.empty([end - start for start, end in bounds], dtype)

  def _bounds(self, index: Any) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True))

  def holds(self, lead: Lead) -> bool:
    """Whether any part of this layer is held here."""
    return any(self._inside(lead, bounds) for bounds in self.parts)

  @staticmethod
  def _inside(lead: Lead, bounds: Bounds) -> bool:
    return all(start <= i < end for i, (start, end) in zip(lead, bounds, strict=False))

  def fill(self, lead: Lead, array: np.ndarray) -> bool:
    """Takes the parts held here from one layer; returns whether all numbers are finite."""
    finite = True
    for bounds, part in self.parts.items():
      if self._inside(lead, bounds):
        mine = part[tuple(i - start for i, (start, _) in zip(lead, bounds, strict=False))]
        with np.errstate(over="ignore", invalid="ignore"):  # seen below
          mine[...] = array[tuple(slice(*ends) for ends in bounds[len(lead) :])]
        finite &= _is_finite(mine)
    return finite

  def place(self) -> np.ndarray | jax.Array:
    """The leaf where it belongs."""
    if self.sharding is None:
      (whole,) = self.parts.values()
      return whole
    fetch = lambda index: self.parts[self._bounds(index)]
    # Waited for, or the host copies of several leaves would pile up.
    return jax.make_array_from_callback(self.shape, self.sharding, fetch).block_until_ready()


def distribute(
  array: np.ndarray, lead: Lead, leaves: list[Leaf], transposed: bool, what: str
) -> None:
  """Divides one tensor along its last axis among the leaves that it joins.

  Args:
    array: as it lies on disk.
    lead: the layer it is of.
    leaves: what it joins, in order.
    transposed: whether it lies transposed.
    what: its name, for an error.

  Raises:
    UserError: it holds numbers that are not finite.
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
  """Whether all numbers are, block by block: the answers for a whole tensor would be another."""
  flat = array.reshape(-1)
  return all(np.isfinite(flat[i : i + BLOCK]).all() for i in range(0, flat.size, BLOCK))
