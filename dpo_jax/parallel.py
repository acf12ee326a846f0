"""Who compiles the step, and where its arguments live.

The same pure functions run under `jax.jit` over a mesh of the axes data, fsdp and tensor ("mesh",
divided by the rules of `partition`) and under `jax.pmap` ("pmap", replicated data parallelism). The
reference is placed in buffers of its own and never donated; the state is donated to its successor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dpo_jax import partition
from dpo_jax.structs import PyTree, TokenBatch, UserError

MODES = ("mesh", "pmap")
AXIS = "data"


def pick_devices(count: int) -> list[jax.Device]:
  """The first `count` devices of this process; all of them for 0."""
  if jax.process_count() > 1:
    raise UserError(
      f"{jax.process_count()} processes were started; this version trains in one process only"
    )
  devices = jax.local_devices()
  if not 0 <= count <= len(devices):
    raise UserError(
      f"parallel.devices is {count}; this machine has {len(devices)} ({devices[0].platform});"
      f" give 1 to {len(devices)}, or 0 for all"
    )
  return devices[: count or None]


def assert_separate(state: PyTree, reference: PyTree) -> None:
  """Refuses a policy and a reference that share memory: donating one would destroy the other.

  Raises:
    ValueError: naming the first shared leaf.
  """

  def buffers(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      for shard in leaf.addressable_shards:
        if shard.data.size:
          yield shard.data.unsafe_buffer_pointer(), jax.tree_util.keystr(path)

  held = dict(buffers(state))
  for pointer, name in buffers(reference):
    if pointer in held:
      raise ValueError(
        f"reference{name} shares its buffer with state{held[pointer]}; place both from host arrays"
      )


def _mesh_shape(mode: str, devices: int, fsdp: int, tensor: int) -> tuple[int, int, int]:
  """Devices along data, fsdp and tensor."""
  for name, size in (("fsdp", fsdp), ("tensor", tensor)):
    if size < 1:
      raise UserError(f"parallel.{name} is {size}; it must be 1 or more")
    if mode == "pmap" and size > 1:
      raise UserError(
        f"parallel.{name} is {size}, but under pmap every device holds everything; take"
        " parallel.mode=mesh"
      )
  if devices % (fsdp * tensor):
    raise UserError(
      f"parallel.fsdp {fsdp} x parallel.tensor {tensor} does not divide the {devices} devices"
    )
  return devices // (fsdp * tensor), fsdp, tensor


_copy = jax.jit(jnp.copy)


class Executor:
  """Places trees on devices and compiles functions of them.

  Attributes:
    groups: shards of a batch; rows, and groups of scored tokens, are divided among them.
    home: where an array goes that every device holds whole.
  """

  def __init__(self, mode: str = "mesh", devices: int = 0, fsdp: int = 1, tensor: int = 1):
    """`devices` are all of this process for 0; those that fsdp and tensor leave are for data."""
    if mode not in MODES:
      raise UserError(f"parallel.mode is {mode!r}; known: {', '.join(MODES)}")
    self.mode = mode
    self.devices = pick_devices(devices)
    shape = _mesh_shape(mode, len(self.devices), fsdp, tensor)
    self.groups = shape[0] * shape[1]
    axes = partition.AXES
    if mode == "pmap":
      shape, axes = shape[:1], (AXIS,)
    self.mesh = jax.make_mesh(shape, axes, (AxisType.Auto,) * len(shape), devices=self.devices)
    self.home = self._shard()

  def _shard(self, *spec: Any) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec(*spec))

  # -- placing ---------------------------------------------------------------------------------

  def shardings(self, tree: PyTree) -> PyTree:
    """Where every leaf of a tree of parameters, or of a state made of them, is read to.

    Under pmap each device takes it whole, for `place` to stack.
    """
    if self.mode == "pmap":
      return jax.tree.map(lambda _: self.home, tree)
    sizes = dict(self.mesh.shape)
    return jax.tree_util.tree_map_with_path(
      lambda path, x: self._shard(*partition.spec(path, x.shape, sizes)), tree
    )

  def abstract(self, tree: PyTree) -> PyTree:
    """Shapes and types of a tree, and where `shardings` has it."""
    shaped = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    return jax.tree.map(shaped, tree, self.shardings(tree))

  def place(self, tree: PyTree) -> PyTree:
    """A tree on the devices, divided as `shardings` has it; under pmap with a leading device axis.

    Arrays on host are copied into fresh buffers. Those on devices are taken over, and lie where
    `shardings` has them: under pmap, what was given is gone.
    """
    if self.mode == "pmap":
      return jax.tree.map(self._stack, tree)
    return jax.tree.map(self._take_over, tree, self.shardings(tree))

  @staticmethod
  def _take_over(x: Any, sharding: NamedSharding) -> jax.Array:
    # device_put may alias host memory, and two trees of one host tree would then share buffers: a
    # compiled copy never does. A leaf at a time, so that only one is held twice.
    if isinstance(x, jax.Array):
      return x
    return _copy(jax.device_put(np.asarray(x), sharding))

  def _stack(self, x: Any) -> jax.Array:
    shape = (self.groups, *np.shape(x))
    if not isinstance(x, jax.Array):
      return _copy(self._put(np.broadcast_to(x, shape), AXIS))
    rows = [jnp.expand_dims(shard.data, 0) for shard in x.addressable_shards]
    stacked = jax.make_array_from_single_device_arrays(shape, self._shard(AXIS), rows)
    stacked.block_until_ready()
    x.delete()
    return stacked

  def _put(self, x: Any, *spec: Any) -> jax.Array:
    return jax.device_put(x, self._shard(*spec))

  def place_batch(self, batch: TokenBatch) -> TokenBatch:
    """A host batch, rows divided among the devices. Axes of every array: [A, rows or groups, …]."""
    if self.mode == "pmap":
      return jax.tree.map(lambda x: self._put(self._split(x), AXIS), batch)
    return jax.tree.map(lambda x: self._put(x, None, partition.ROWS), batch)

  def _split(self, x: np.ndarray) -> np.ndarray:
    """[A, N, …] to [devices, A, N / devices, …]."""
    return np.moveaxis(x.reshape(len(x), self.groups, -1, *x.shape[2:]), 1, 0)

  def fetch(self, tree: PyTree) -> PyTree:
    """One copy of a placed tree, on host."""
    return jax.tree.map(np.asarray, self.single(tree))

  def single(self, tree: PyTree) -> PyTree:
    """One copy of a placed tree, still on device: what a checkpoint takes."""
    if self.mode == "pmap":
      return jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree)
    return tree

  # -- compiling -------------------------------------------------------------------------------

  def compile_init(self, fn: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]:
    """fn(params) -> state, both placed; the parameters are donated."""
    if self.mode == "pmap":
      return jax.pmap(fn, AXIS, devices=self.devices, donate_argnums=0)

    def init(params: PyTree) -> PyTree:
      places = self.shardings(jax.eval_shape(fn, params))
      return jax.jit(fn, donate_argnums=0, out_shardings=places)(params)

    return init

  def compile_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
    """step(state, ref_params, batch, axis_name=…) -> (state, metrics), the state donated.

    Metrics come back as `metrics_to_host` understands them.
    """
    if self.mode == "pmap":
      mapped = functools.partial(step, axis_name=AXIS)
      return jax.pmap(mapped, AXIS, devices=self.devices, donate_argnums=0)
    alone = functools.partial(step, axis_name=None)

    @functools.cache
    def compiled(places: Any, structure: Any) -> Callable[..., Any]:
      state = jax.tree.unflatten(structure, places)
      return jax.jit(alone, donate_argnums=0, out_shardings=(state, self.home))

    def take(state: PyTree, *rest: Any) -> Any:
      leaves, structure = jax.tree.flatten(self.shardings(state))
      with jax.set_mesh(self.mesh):
        return compiled(tuple(leaves), structure)(state, *rest)

    return take

  def metrics_to_host(self, metrics: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Step metrics on host: means are equal on every device, arrays by slot joined [A, N, S]."""
    if self.mode == "mesh":
      return {k: np.asarray(v) for k, v in metrics.items()}
    host = {k: np.asarray(v) for k, v in metrics.items()}
    return {k: v[0] if v.ndim == 1 else self._join(v) for k, v in host.items()}

  @staticmethod
  def _join(x: np.ndarray) -> np.ndarray:
    """[devices, A, n, …] to [A, devices * n, …]."""
    x = np.moveaxis(x, 0, 1)
    return x.reshape(len(x), -1, *x.shape[3:])

  def compile_forward(self, fn: Callable[[PyTree, TokenBatch], jax.Array]) -> Callable[..., Any]:
    """fn(params, batch) -> [N, S], for placed params and a host batch with axes [1, …].

    The result comes back on host as [N, S].
    """
    first = lambda params, batch: fn(params, jax.tree.map(lambda x: x[0], batch))[None]
    if self.mode == "pmap":
      mapped = jax.pmap(first, AXIS, devices=self.devices)
      return lambda params, batch: self._join(np.asarray(mapped(params, self.place_batch(batch))))[
        0
      ]
    compiled = jax.jit(first, out_shardings=self._shard(None, partition.ROWS))

    def forward(params: PyTree, batch: TokenBatch) -> np.ndarray:
      placed = self.place_batch(batch)
      with jax.set_mesh(self.mesh):
        return np.asarray(compiled(params, placed))[0]

    return forward
