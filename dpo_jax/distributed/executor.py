"""The executor: places arrays on devices and compiles the pure step for them.

The same pure functions run in two modes. "mesh" is `jax.jit` over a mesh with the axes and rules of
`sharding`. "pmap" is `jax.pmap`: every device has all parameters and a part of the batch.

The devices are those of all processes. Each process copies its own part of a host array to its own
devices. The state is donated to the next state, so that both never exist at once. The reference is
never donated, and has buffers of its own.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dpo_jax.distributed import memory
from dpo_jax.distributed import sharding as shardings
from dpo_jax.distributed.gather import gather_to_host
from dpo_jax.structs import Array, Device, PyTree, TokenBatch, UserError

MODES = ("mesh", "pmap")
AXIS = "data"


def pick_devices(count: int) -> list[Device]:
  """Returns the first `count` devices, or for 0 all devices of all processes.

  Raises:
    UserError: there are not so many, or `count` leaves some out in a run of several processes.
  """
  devices, processes = jax.devices(), jax.process_count()
  # With several processes a prefix of the list could leave a process without any device.
  if processes > 1 and count not in (0, len(devices)):
    raise UserError(
      f"parallel.devices is {count}; {processes} processes have {len(devices)} and use all of them:"
      " leave it 0"
    )
  if not 0 <= count <= len(devices):
    raise UserError(
      f"parallel.devices is {count}; devices of this machine: {len(devices)}"
      f" ({devices[0].platform}); give at most {len(devices)}, or 0 for all"
    )
  return devices[: count or None]


def assert_separate(state: PyTree, reference: PyTree) -> None:
  """Checks that policy and reference share no buffer: donating one would destroy the other.

  Raises:
    ValueError: two leaves share a buffer; it names the first such pair.
  """

  def buffers(tree: PyTree) -> Iterator[tuple[int, str]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      for shard in leaf.addressable_shards:
        if shard.data.size:  # empty arrays may all have the same address
          yield shard.data.unsafe_buffer_pointer(), jax.tree_util.keystr(path)

  of_state = dict(buffers(state))
  for pointer, name in buffers(reference):
    if pointer in of_state:
      raise ValueError(
        f"reference{name} shares its buffer with state{of_state[pointer]}; place both from host"
        " arrays"
      )


def _mesh_shape(mode: str, devices: int, **sizes: int) -> tuple[int, ...]:
  """Returns the number of devices along data, fsdp, sequence and tensor; data gets the rest."""
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


def _check_offload(mode: str, device: Device) -> None:
  """Checks that the optimizer's state can be stored in the host's memory."""
  if mode == "pmap":
    raise UserError("parallel.offload_optimizer needs parallel.mode=mesh, and it is pmap")
  kinds = [kind.kind for kind in device.addressable_memories()]
  # A GPU that is only compiled for names no memory at all.
  if kinds and memory.HOST not in kinds:
    raise UserError(
      f"parallel.offload_optimizer: JAX reaches no memory of the host from {device.platform}"
      " devices; leave it off"
    )


def _arrange(shape: Sequence[int], devices: Sequence[Device]) -> np.ndarray:
  """Returns devices in the shape of a mesh, whose neighbours are near each other in a TPU slice."""
  slices = {getattr(device, "slice_index", 0) for device in devices}
  # Hosts of GPUs may count as slices too; those need no arrangement.
  if devices[0].platform == "tpu" and len(slices) > 1:
    raise UserError(
      f"the {len(devices)} devices are in {len(slices)} TPU slices, and a run takes one slice;"
      " start it on the hosts of one"
    )
  # Where the sizes are no products of whole axes of the slice (2 x 8 of 4 x 4), its axes are split.
  return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


_copy = jax.jit(jnp.copy)


def _abstract(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


class Executor:
  """Places trees on devices and compiles functions of them.

  Attributes:
    groups: the number of shards of a batch. Rows, and groups of scored tokens, are divided by it.
    share: (i, H): this process prepares the i-th of H equal parts of the rows of a batch.
    home: the sharding of an array of which every device has a complete copy.
    memory: bytes of a device that programs may use; None where it does not say.
  """

  SETTINGS = ("mode", "devices", "fsdp", "tensor", "sequence", "offload_optimizer")

  def __init__(
    self,
    mode: str = "mesh",
    devices: int | Sequence[Device] = 0,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    offload_optimizer: bool = False,
  ):
    """Makes the mesh.

    Args:
      mode: "mesh" or "pmap".
      devices: how many to use, 0 for all; or the devices themselves, which programs may be compiled
        for without being there.
      fsdp, tensor, sequence: devices along these axes of the mesh; the data axis gets the rest.
      offload_optimizer: store the optimizer's state of a `TrainState` in the host's memory.

    Raises:
      UserError: the sizes do not divide the devices, or the mode cannot do what is set.
    """
    if mode not in MODES:
      raise UserError(f"parallel.mode is {mode!r}; known: {', '.join(MODES)}")
    self.mode = mode
    self.devices = pick_devices(devices) if isinstance(devices, int) else list(devices)
    # Devices that are only compiled for report no memory. In whole GiB: processes must agree.
    here = isinstance(devices, int) and memory.device_capacity()
    self.memory: int | None = here // memory.GIB * memory.GIB if here else None
    self.offload = offload_optimizer
    if offload_optimizer:
      _check_offload(mode, self.devices[0])
    axes = shardings.AXES
    shape = _mesh_shape(mode, len(self.devices), fsdp=fsdp, sequence=sequence, tensor=tensor)
    self.groups = shape[0] * shape[1]
    if mode == "pmap":
      # pmap has no named mesh; this one describes its stacked arrays [devices, ...] to the rest.
      shape, axes = shape[:1], (AXIS,)
    self.mesh = Mesh(_arrange(shape, self.devices), axes, axis_types=(AxisType.Auto,) * len(shape))
    self.home = self._shard()
    self.share = self._own_share()

  def _own_share(self) -> tuple[int, int]:
    """Returns (i, H) if each of H groups of processes needs one equal run of rows, else (0, 1).

    (0, 1) means that every process prepares all rows, and copies only what its devices need.
    """
    rows = self._shard(AXIS if self.mode == "pmap" else shardings.ROWS)
    # An array with one row per group shows which groups the devices of each process need.
    groups_of: dict[int, set[int]] = {}
    for device, (piece,) in rows.devices_indices_map((self.groups,)).items():
      groups_of.setdefault(device.process_index, set()).add(piece.indices(self.groups)[0])
    mine = groups_of[jax.process_index()]
    # The mesh may give a process scattered groups, or give two processes the same ones (when tensor
    # or sequence crosses processes). The second is fine: both prepare the same rows.
    runs = [set(range(i, i + len(mine))) for i in range(0, self.groups, len(mine))]
    if any(groups not in runs for groups in groups_of.values()):
      return 0, 1
    return runs.index(mine), len(runs)

  def _shard(self, *spec: Any) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec(*spec))

  # -- placing ---------------------------------------------------------------------------------

  def shardings(self, tree: PyTree) -> PyTree:
    """Returns the sharding of every leaf of a tree of parameters, or of a state with parameters.

    Under pmap every leaf is complete on each device; `place` then adds the device axis.
    """
    if self.mode == "pmap":
      return jax.tree.map(lambda _: self.home, tree)
    sizes = dict(self.mesh.shape)

    def one(path: tuple[Any, ...], x: Any) -> NamedSharding:
      place = self._shard(*shardings.spec(path, x.shape, sizes))
      # Scalars such as the count of updates stay on the device: moving them would save nothing.
      offloaded = self.offload and x.ndim and getattr(path[0], "name", None) == "opt_state"
      return place.with_memory_kind(memory.HOST) if offloaded else place

    return jax.tree_util.tree_map_with_path(one, tree)

  def vocabulary_parts(self, vocab: int) -> dict[str, int]:
    """Returns the number of devices along each axis that divides a vocabulary."""
    axes = shardings.vocabulary_axes(vocab, self.mesh.shape)
    return {name: self.mesh.shape[name] for name in axes}

  def abstract(self, tree: PyTree) -> PyTree:
    """Returns shapes, types and shardings of a tree, in place of its arrays."""
    return jax.tree.map(_abstract, tree, self.shardings(tree))

  def abstract_placed(self, tree: PyTree) -> PyTree:
    """Returns shapes, types and shardings of what `place` makes of a tree."""
    if self.mode == "mesh":
      return self.abstract(tree)

    def stacked(x: Any) -> jax.ShapeDtypeStruct:
      shape = (self.groups, *x.shape)
      return jax.ShapeDtypeStruct(shape, x.dtype, sharding=self._shard(AXIS))

    return jax.tree.map(stacked, tree)

  def place(self, tree: PyTree) -> PyTree:
    """Returns the tree on the devices, sharded as `shardings` says; pmap adds a device axis.

    Arrays on the host are copied into new buffers. Arrays on devices are used as they are, and must
    already have the right sharding. Under pmap they are deleted.
    """
    if self.mode == "pmap":
      return jax.tree.map(self._stack, tree)
    return jax.tree.map(self._take_over, tree, self.shardings(tree))

  @staticmethod
  def _take_over(x: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array):
      return x
    x = np.asarray(x)
    # On a CPU, JAX may alias host memory, and policy and reference placed from one host tree would
    # share buffers: a compiled copy never does. One leaf at a time, so that only one exists twice.
    return _copy(jax.make_array_from_callback(x.shape, sharding, x.__getitem__))

  def _stack(self, x: Any) -> jax.Array:
    """Returns x with a leading device axis: [devices, ...], one copy on each."""
    shape = (self.groups, *np.shape(x))
    if not isinstance(x, jax.Array):
      return self._take_over(np.broadcast_to(x, shape), self._shard(AXIS))
    rows = [jnp.expand_dims(shard.data, 0) for shard in x.addressable_shards]
    stacked = jax.make_array_from_single_device_arrays(shape, self._shard(AXIS), rows)
    # expand_dims copies. The order is important: 1. wait for the copies; 2. free the source, so
    # that two complete trees never lie on a device.
    stacked.block_until_ready()
    x.delete()
    return stacked

  def place_batch(self, batch: TokenBatch, share: tuple[int, int] | None = None) -> TokenBatch:
    """Returns a host batch on the devices, with its rows divided among them.

    Args:
      batch: arrays [A, rows or groups, ...], A micro-batches.
      share: the part of the rows that `batch` has, (i, H) as in `Executor.share`, which is the
        default; (0, 1) if it has all of them.

    Raises:
      UserError: the tokens of a row do not divide among the devices of the sequence axis.
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
    """Returns a global array of which `x` is the i-th of H parts along an axis."""
    (part, parts), size = share, x.shape[axis]
    shape = (*x.shape[:axis], size * parts, *x.shape[axis + 1 :])

    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None  # JAX's type allows it, and its code never passes it
      # JAX asks only for pieces of this process's devices, in global indices; `x` starts at its
      # own part.
      start, end, _ = index[axis].indices(shape[axis])
      own = slice(start - part * size, end - part * size)
      return x[(*index[:axis], own, *index[axis + 1 :])]

    place = self._shard(AXIS) if self.mode == "pmap" else self._shard(None, shardings.ROWS)
    return jax.make_array_from_callback(shape, place, piece)

  def _split(self, x: np.ndarray, share: tuple[int, int]) -> np.ndarray:
    """Returns [A, N, ...] as [devices, A, N / devices, ...], for the devices of a share."""
    devices = self.groups // share[1]
    return np.moveaxis(x.reshape(len(x), devices, -1, *x.shape[2:]), 1, 0)

  def to_host(self, tree: PyTree) -> PyTree:
    """Returns a placed tree as NumPy arrays. All processes call it together."""
    return jax.tree.map(gather_to_host, self.unreplicate(tree))

  def unreplicate(self, tree: PyTree) -> PyTree:
    """Returns a placed tree on devices without pmap's device axis, as a checkpoint stores it."""
    if self.mode == "mesh":
      return tree
    if jax.process_count() == 1:
      return jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree)

    # With several processes x[0] exists in one of them alone, and slicing would be a computation of
    # all. Every device has the same copy, so together they are one replicated array.
    def joined(x: jax.Array) -> jax.Array:
      rows = [shard.data[0] for shard in x.addressable_shards]
      return jax.make_array_from_single_device_arrays(x.shape[1:], self.home, rows)

    return jax.tree.map(joined, tree)

  def local_copy(self, tree: PyTree) -> PyTree:
    """Returns a placed tree that this process can use without the others: `gather_locally`."""
    return self.gather_locally(self.unreplicate(tree))

  def gather_locally(self, tree: PyTree) -> PyTree:
    """Returns a tree, before `place` adds an axis, that this process can use without the others.

    All processes call it together. In a run of several processes, every leaf is then complete on
    the first device of each process.
    """
    if jax.process_count() == 1:
      return tree
    # An identity whose output is replicated: compiling it makes XLA gather what is sharded.
    replicate = jax.jit(lambda x: x, out_shardings=self.home)

    def own(x: Any) -> Any:
      return replicate(x).addressable_shards[0].data if isinstance(x, jax.Array) else x

    return jax.tree.map(own, tree)

  # -- compiling -------------------------------------------------------------------------------

  def compile_init(self, fn: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]:
    """Compiles fn(params) -> state for placed parameters, which are donated to the state."""
    if self.mode == "pmap":
      return jax.pmap(fn, AXIS, devices=self.devices, donate_argnums=0)

    def init(params: PyTree) -> PyTree:
      places = self.shardings(jax.eval_shape(fn, params))
      return jax.jit(fn, donate_argnums=0, out_shardings=places)(params)

    return init

  def compile_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles step(state, reference_params, batch, axis_name=...) -> (state, metrics).

    The state is donated, the reference is not. `metrics_to_host` reads the metrics.
    """
    if self.mode == "pmap":
      mapped = functools.partial(step, axis_name=AXIS)
      return jax.pmap(mapped, AXIS, devices=self.devices, donate_argnums=0)
    # Output shardings follow the structure of the state, which is known only at the first call.
    compiled: dict[Any, Any] = {}

    def train_step_fn(state: PyTree, *rest: Any) -> Any:
      structure = jax.tree.structure(state)
      if structure not in compiled:
        compiled[structure] = self._jit_step(step, state)
      with jax.set_mesh(self.mesh):
        return compiled[structure](state, *rest)

    return train_step_fn

  def _jit_step(self, step: Callable[..., Any], state: PyTree) -> Any:
    step = functools.partial(step, axis_name=None)  # jit reduces over its mesh by itself
    # The new state must have the shardings of the old one: donation reuses a buffer only then, and
    # another sharding would compile again at the next step.
    return jax.jit(step, donate_argnums=0, out_shardings=(self.shardings(state), self.home))

  def lower_step(self, step: Callable[..., Any], state: PyTree, *rest: Any) -> jax.stages.Lowered:
    """Lowers the step of `compile_step`; the arguments may be shapes, not arrays."""
    if self.mode == "pmap":
      return self.compile_step(step).lower(state, *rest)
    with jax.set_mesh(self.mesh):
      return self._jit_step(step, state).lower(state, *rest)

  def abstract_batch(self, batch: TokenBatch) -> TokenBatch:
    """Returns shapes, types and shardings of what `place_batch` makes of a whole batch."""
    if self.mode == "pmap":
      stacked = jax.tree.map(functools.partial(self._split, share=(0, 1)), batch)
      return jax.tree.map(functools.partial(_abstract, sharding=self._shard(AXIS)), stacked)
    place = self._shard(None, shardings.ROWS)
    return jax.tree.map(functools.partial(_abstract, sharding=place), batch)

  def metrics_to_host(self, metrics: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Returns the metrics of a step as NumPy arrays; every device has the same values."""
    return {name: self._first_copy(x) for name, x in metrics.items()}

  def _first_copy(self, x: jax.Array) -> np.ndarray:
    """Returns the copy of this process's first device, of an array that is replicated."""
    mine = np.asarray(x.addressable_shards[0].data)
    return mine if self.mode == "mesh" else mine[0]

  def compile_forward(self, fn: Callable[[PyTree, TokenBatch], Array]) -> Callable[..., Any]:
    """Compiles fn(params, batch) -> [N, S] for placed parameters and host batches.

    The batch has one micro-batch, arrays [1, rows or groups, ...], and all its rows in every
    process. Each process gets the complete result as a NumPy array.
    """

    def first(params: PyTree, batch: TokenBatch) -> Array:
      return fn(params, jax.tree.map(lambda x: x[0], batch))

    def gathered(params: PyTree, batch: TokenBatch) -> jax.Array:
      # tiled: the rows of all devices in one axis, in their order, without a device axis.
      return jax.lax.all_gather(first(params, batch), AXIS, tiled=True)

    if self.mode == "pmap":
      mapped = jax.pmap(gathered, AXIS, devices=self.devices)
    else:
      mapped = jax.jit(first, out_shardings=self.home)

    def forward(params: PyTree, batch: TokenBatch) -> np.ndarray:
      placed = self.place_batch(batch, share=(0, 1))
      with jax.set_mesh(self.mesh) if self.mode == "mesh" else contextlib.nullcontext():
        return self._first_copy(mapped(params, placed))

    return forward
