"""Who compiles the step, and where its arguments live.

Devices are those of all processes; each process places its part of what it has on host.

The same pure functions run under `jax.jit` over a mesh of the axes of `sharding` ("mesh", divided
by its rules) and under `jax.pmap` ("pmap", replicated data parallelism). The
reference is placed in buffers of its own and never donated; the state is donated to its successor.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dpo_jax.distributed import memory
from dpo_jax.distributed import sharding as shardings
from dpo_jax.distributed.arrays import gathered
from dpo_jax.structs import PyTree, TokenBatch, UserError

MODES = ("mesh", "pmap")
AXIS = "data"


def pick_devices(count: int) -> list[jax.Device]:
  """The first `count` devices; all of them, of all processes, for 0."""
  devices, processes = jax.devices(), jax.process_count()
  if processes > 1 and count not in (0, len(devices)):
    raise UserError(
      f"parallel.devices is {count}; {processes} processes have {len(devices)} and use all of them:"
      " leave it 0"
    )
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


def _mesh_shape(mode: str, devices: int, **sizes: int) -> tuple[int, ...]:
  """Devices along data, fsdp, sequence and tensor."""
  for name, size in sizes.items():
    if size < 1:
      raise UserError(f"parallel.{name} is {size}; it must be 1 or more")
    if mode == "pmap" and size > 1:
      raise UserError(
        f"parallel.{name} is {size}, but under pmap every device holds everything; take"
        " parallel.mode=mesh"
      )
  if devices % math.prod(sizes.values()):
    product = " x ".join(f"parallel.{name} {size}" for name, size in sizes.items() if size > 1)
    raise UserError(f"{product} does not divide the {devices} devices; choose sizes that do")
  return devices // math.prod(sizes.values()), *sizes.values()


def _check_offload(mode: str, device: jax.Device) -> None:
  if mode == "pmap":
    raise UserError("parallel.offload_optimizer needs parallel.mode=mesh, and it is pmap")
  if memory.HOST not in (kind.kind for kind in device.addressable_memories()):
    raise UserError(
      f"parallel.offload_optimizer: JAX reaches no memory of the host from {device.platform}"
      " devices; leave it off"
    )


_copy = jax.jit(jnp.copy)


class Executor:
  """Places trees on devices and compiles functions of them.

  Attributes:
    groups: shards of a batch; rows, and groups of scored tokens, are divided among them.
    share: (i, H), which part of the rows of a batch is to be made by this process: the i-th of H.
    home: where an array goes that every device holds whole.
  """

  SETTINGS = ("mode", "devices", "fsdp", "tensor", "sequence", "offload_optimizer")

  def __init__(
    self,
    mode: str = "mesh",
    devices: int = 0,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    offload_optimizer: bool = False,
  ):
    """`devices` are all there are for 0; those that the other axes leave are for data.

    With `offload_optimizer` the optimiser's state of a `TrainState` is kept on the host.
    """
    if mode not in MODES:
      raise UserError(f"parallel.mode is {mode!r}; known: {', '.join(MODES)}")
    self.mode = mode
    self.devices = pick_devices(devices)
    self.offload = offload_optimizer
    if offload_optimizer:
      _check_offload(mode, self.devices[0])
    axes = shardings.AXES
    shape = _mesh_shape(mode, len(self.devices), fsdp=fsdp, sequence=sequence, tensor=tensor)
    self.groups = shape[0] * shape[1]
    if mode == "pmap":
      shape, axes = shape[:1], (AXIS,)
    self.mesh = jax.make_mesh(shape, axes, (AxisType.Auto,) * len(shape), devices=self.devices)
    self.home = self._shard()
    self.share = self._own_share()

  def _own_share(self) -> tuple[int, int]:
    """Every process makes its rows alone, if each has a run of them as long as the others'."""
    rows = self._shard(AXIS if self.mode == "pmap" else shardings.ROWS)
    held: dict[int, set[int]] = {}
    for device, (piece,) in rows.devices_indices_map((self.groups,)).items():
      held.setdefault(device.process_index, set()).add(piece.indices(self.groups)[0])
    mine = held[jax.process_index()]
    runs = [set(range(i, i + len(mine))) for i in range(0, self.groups, len(mine))]
    if any(groups not in runs for groups in held.values()):
      return 0, 1
    return runs.index(mine), len(runs)

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

    def one(path: tuple[Any, ...], x: Any) -> NamedSharding:
      place = self._shard(*shardings.spec(path, x.shape, sizes))
      kept = self.offload and x.ndim and getattr(path[0], "name", None) == "opt_state"
      return place.with_memory_kind(memory.HOST) if kept else place

    return jax.tree_util.tree_map_with_path(one, tree)

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
    x = np.asarray(x)
    return _copy(jax.make_array_from_callback(x.shape, sharding, x.__getitem__))

  def _stack(self, x: Any) -> jax.Array:
    shape = (self.groups, *np.shape(x))
    if not isinstance(x, jax.Array):
      return self._take_over(np.broadcast_to(x, shape), self._shard(AXIS))
    rows = [jnp.expand_dims(shard.data, 0) for shard in x.addressable_shards]
    stacked = jax.make_array_from_single_device_arrays(shape, self._shard(AXIS), rows)
    stacked.block_until_ready()
    x.delete()
    return stacked

  def place_batch(self, batch: TokenBatch, share: tuple[int, int] | None = None) -> TokenBatch:
    """A host batch, rows divided among the devices. Axes of every array: [A, rows or groups, …].

    `share` says which part of the rows it has, (0, 1) all of them; that of this process unless
    given.
    """
    share = self.share if share is None else share
    length, parts = batch.ids_NL.shape[-1], self.mesh.shape.get("sequence", 1)
    if length % parts:
      raise UserError(
        f"rows of {length} tokens do not divide among parallel.sequence {parts} devices; set"
        " data.row_length to a multiple of it (data.layout shared or packed)"
      )
    if self.mode == "pmap":
      return jax.tree.map(lambda x: self._place_rows(self._split(x, share), 0, share), batch)
    return jax.tree.map(lambda x: self._place_rows(x, 1, share), batch)

  def _place_rows(self, x: np.ndarray, axis: int, share: tuple[int, int]) -> jax.Array:
    """An array of which this process has the i-th of H parts along an axis."""
    (part, parts), size = share, x.shape[axis]
    shape = (*x.shape[:axis], size * parts, *x.shape[axis + 1 :])

    def piece(index: tuple[slice, ...]) -> np.ndarray:
      start, end, _ = index[axis].indices(shape[axis])
      own = slice(start - part * size, end - part * size)
      return x[(*index[:axis], own, *index[axis + 1 :])]

    place = self._shard(AXIS) if self.mode == "pmap" else self._shard(None, shardings.ROWS)
    return jax.make_array_from_callback(shape, place, piece)

  def _split(self, x: np.ndarray, share: tuple[int, int]) -> np.ndarray:
    """[A, N, …] to [devices, A, N / devices, …], of the devices of a share."""
    devices = self.groups // share[1]
    return np.moveaxis(x.reshape(len(x), devices, -1, *x.shape[2:]), 1, 0)

  def to_host(self, tree: PyTree) -> PyTree:
    """One copy of a placed tree, on host. All processes call it together."""
    return jax.tree.map(gathered, self.unreplicate(tree))

  def unreplicate(self, tree: PyTree) -> PyTree:
    """One copy of a placed tree, still on devices: what a checkpoint takes."""
    if self.mode == "mesh":
      return tree
    if jax.process_count() == 1:
      return jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree)

    def joined(x: jax.Array) -> jax.Array:
      rows = [shard.data[0] for shard in x.addressable_shards]
      return jax.make_array_from_single_device_arrays(x.shape[1:], self.home, rows)

    return jax.tree.map(joined, tree)

  def local_copy(self, tree: PyTree) -> PyTree:
    """One copy of a placed tree that this process can use by itself: see `gather_locally`."""
    return self.gather_locally(self.unreplicate(tree))

  def gather_locally(self, tree: PyTree) -> PyTree:
    """One copy of a tree, as `place` takes it, that this process can use without the others.

    All processes call it together. In a run of several it is on this one's first device, whole.
    """
    if jax.process_count() == 1:
      return tree
    whole = jax.jit(lambda x: x, out_shardings=self.home)
    own = lambda x: whole(x).addressable_shards[0].data if isinstance(x, jax.Array) else x
    return jax.tree.map(own, tree)

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
    """step(state, reference_params, batch, axis_name=…) -> (state, metrics), the state donated.

    Metrics come back as `metrics_to_host` understands them.
    """
    if self.mode == "pmap":
      mapped = functools.partial(step, axis_name=AXIS)
      return jax.pmap(mapped, AXIS, devices=self.devices, donate_argnums=0)
    known: dict[Any, Any] = {}

    def take(state: PyTree, *rest: Any) -> Any:
      structure = jax.tree.structure(state)
      if structure not in known:
        known[structure] = self._jit_step(step, state)
      with jax.set_mesh(self.mesh):
        return known[structure](state, *rest)

    return take

  def _jit_step(self, step: Callable[..., Any], state: PyTree) -> Any:
    alone = functools.partial(step, axis_name=None)
    return jax.jit(alone, donate_argnums=0, out_shardings=(self.shardings(state), self.home))

  def lower_step(self, step: Callable[..., Any], state: PyTree, *rest: Any) -> jax.stages.Lowered:
    """What `compile_step` compiles on a mesh, of shapes in place of arrays."""
    with jax.set_mesh(self.mesh):
      return self._jit_step(step, state).lower(state, *rest)

  def abstract_batch(self, batch: TokenBatch) -> TokenBatch:
    """The shapes of `place_batch` on a mesh."""
    place = self._shard(None, shardings.ROWS)
    shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    return jax.tree.map(shaped, batch)

  def metrics_to_host(self, metrics: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Step metrics on host; all devices have them alike."""
    return {name: self._first_copy(x) for name, x in metrics.items()}

  def _first_copy(self, x: jax.Array) -> np.ndarray:
    """What all devices have alike, on host."""
    mine = np.asarray(x.addressable_shards[0].data)
    return mine if self.mode == "mesh" else mine[0]

  def compile_forward(self, fn: Callable[[PyTree, TokenBatch], jax.Array]) -> Callable[..., Any]:
    """fn(params, batch) -> [N, S], for placed params and a host batch with axes [1, …].

    The batch is whole in every process, and so is the result, on host as [N, S].
    """
    first = lambda params, batch: fn(params, jax.tree.map(lambda x: x[0], batch))
    if self.mode == "pmap":
      everywhere = lambda *args: jax.lax.all_gather(first(*args), AXIS, tiled=True)
      mapped = jax.pmap(everywhere, AXIS, devices=self.devices)
    else:
      mapped = jax.jit(first, out_shardings=self.home)

    def forward(params: PyTree, batch: TokenBatch) -> np.ndarray:
      placed = self.place_batch(batch, share=(0, 1))
      with jax.set_mesh(self.mesh) if self.mode == "mesh" else contextlib.nullcontext():
        return self._first_copy(mapped(params, placed))

    return forward
