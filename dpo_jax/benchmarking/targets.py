"""Accelerators that a step can be compiled for without one of them at hand.

A target is written KIND:SHAPE. For TPUs the shape is that of the slice, `v5e:4x4` or `v5p:2x2x2`,
and Google's compiler (libtpu) describes its chips. For GPUs it is their number, `h100:8`, and XLA's
compiler for CUDA takes a card from a description of it. Neither needs a device or a driver.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from dpo_jax.structs import Device, UserError
from dpo_jax.utils import libtpu

GIB = 2**30


class Chip(NamedTuple):
  """The limits of an accelerator, as its maker states them.

  Attributes:
    memory: bytes that programs may use.
    flops: products per second in bfloat16, two FLOPs a multiplication and addition.
    bandwidth: bytes per second between memory and processor.
    links: bytes per second that a chip sends to others of its slice or host, all links together.
    clock: Hz of the cycles that the compiler estimates; None where it estimates none.
    shapes: examples of shapes, as they are written behind the kind.
    card: for GPUs, the figures that XLA's description of the card has besides.
  """

  memory: int
  flops: float
  bandwidth: float
  links: float
  clock: float | None = None
  shapes: str = "1, 2, 8, 16"
  card: dict[str, Any] | None = None


# Memory is what the compiler itself allows (its message when a program needs more). Peak rates,
# memory bandwidth and links are from cloud.google.com/tpu/docs/v5e, /v5p and /v6e; the pages count
# both directions of the links, and here is one. The clock is that of the cycles which the compiler
# estimates: the peak rate over the FLOPs of a cycle of the matrix units, 2^17, 2^18 and 2^19.
_TPUS = {
  "v5e": Chip(int(15.75 * GIB), 197e12, 819e9, 200e9, 1.5e9, "1x1, 2x2, 2x4, 4x4, 8x8, 16x16"),
  "v5p": Chip(int(95.74 * GIB), 459e12, 2765e9, 600e9, 1.75e9, "1x1x1, 2x2x1, 2x2x2, 2x4x4, 4x4x8"),
  "v6e": Chip(int(31.25 * GIB), 918e12, 1640e9, 400e9, 1.75e9, "1x1, 2x2, 2x4, 4x4, 8x8, 16x16"),
}
# From the data sheets of the H100 SXM, H200 SXM and A100 SXM of 80 GB: rates without sparsity,
# NVLink in one direction. A run may use 92% of the memory, where XLA_PYTHON_CLIENT_MEM_FRACTION
# says so.
GPU_FRACTION = 0.92
_HOPPER = {"major": 9, "cores": 132, "fpus": 128, "shared": 233472, "cache": 52428800}
_AMPERE = {"major": 8, "cores": 108, "fpus": 64, "shared": 167936, "cache": 41943040}
_GPUS = {
  "h100": Chip(
    84942979072,
    989e12,
    3352e9,
    450e9,
    card=_HOPPER | {"name": "NVIDIA H100 80GB HBM3", "ghz": 1.98},
  ),
  "h200": Chip(
    150754820096, 989e12, 4800e9, 450e9, card=_HOPPER | {"name": "NVIDIA H200", "ghz": 1.98}
  ),
  "a100": Chip(
    85094825984,
    312e12,
    2039e9,
    300e9,
    card=_AMPERE | {"name": "NVIDIA A100-SXM4-80GB", "ghz": 1.41},
  ),
}
_PER_HOST = 8  # GPUs of a host
_BETWEEN_HOSTS = 50e9  # bytes per second of one GPU: a network of 400 Gbit/s
CHIPS = _TPUS | _GPUS
_CARD = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  core_count: {cores}  fpus_per_core: {fpus}  clock_rate_ghz: {ghz}
  shared_memory_per_block: 49152  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {optin}  l2_cache_size: {cache}
  memory_bandwidth: {bandwidth}  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} {extension} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 14 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""


class Target(NamedTuple):
  """Devices that a step is compiled for.

  Attributes:
    name: as it was written, such as "v5e:4x4".
    kind: of the chip, a name in `CHIPS`.
    chip: its limits and rates.
    devices: in JAX's own type; programs can be compiled for them and not run.
  """

  name: str
  kind: str
  chip: Chip
  devices: list[Device]

  @property
  def is_gpu(self) -> bool:
    """Whether its devices are GPUs."""
    return self.chip.card is not None

  @property
  def limit(self) -> int:
    """Bytes of a device that a run may use."""
    return int(self.chip.memory * GPU_FRACTION) if self.is_gpu else self.chip.memory

  @property
  def links(self) -> float:
    """Bytes per second that a device sends to the others."""
    return _BETWEEN_HOSTS if self.is_gpu and len(self.devices) > _PER_HOST else self.chip.links


def find(name: str) -> Target:
  """Returns the devices that a target names.

  Raises:
    UserError: no such target is known, or its compiler is not installed.
  """
  named, _, shape = name.lower().partition(":")
  # In Google's names, such as v5e-16, the number of chips leaves the shape of the slice open.
  kind = named.partition("-")[0]
  if kind not in CHIPS:
    raise UserError(f"--topology={name} is not known; known: {known()}")
  chip = CHIPS[kind]
  pattern = r"[1-9]\d*" if chip.card else r"[1-9]\d*(x[1-9]\d*){1,2}"
  if not re.fullmatch(pattern, shape):
    missing = "the number of GPUs" if chip.card else "the shape of the slice"
    raise UserError(f"--topology={name} does not give {missing}; write it as {_examples(kind)}")
  devices = _gpus(name, kind, int(shape)) if chip.card else _tpus(name, kind, shape)
  return Target(name, kind, chip, devices)


def known() -> str:
  """Returns examples of targets of every kind, as a message lists them."""
  return "; ".join(map(_examples, CHIPS))


def _examples(kind: str) -> str:
  return ", ".join(f"{kind}:{shape}" for shape in CHIPS[kind].shapes.split(", "))


def _missing(name: str, what: str, extra: str) -> UserError:
  return UserError(
    f'--topology={name} needs {what}, which is not installed; pip install ".[{extra}]"'
  )


def _tpus(name: str, kind: str, shape: str) -> list[Device]:
  """Returns the chips of a slice of TPUs."""
  from jax.experimental import topologies

  # A folder of that name, without a module, is no compiler.
  module = importlib.util.find_spec("libtpu")
  if module is None or module.origin is None:
    raise _missing(name, "the compiler for TPUs (libtpu)", "aot-tpu")
  libtpu.prepare()
  sizes = [int(size) for size in shape.split("x")]
  # A host has four chips, 2 x 2; a smaller slice is part of a host, and libtpu must be told.
  part = {}
  if math.prod(sizes) < 4:
    part = {"chips_per_host_bounds": (*sizes, *[1] * (3 - len(sizes)))}
  try:
    found = topologies.get_topology_desc(f"{kind}:{shape}", "tpu", **part)
  except jax.errors.JaxRuntimeError as error:
    reason = " ".join(str(error).split())
    raise UserError(
      f"--topology={name} is no slice that the compiler knows ({reason}); known: {_examples(kind)}"
    ) from error
  return found.devices


def _gpus(name: str, kind: str, count: int) -> list[Device]:
  """Returns so many cards, eight to a host."""
  from jax.experimental import topologies

  if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
    raise _missing(name, "JAX's compiler for CUDA", "aot-cuda")
  if count > _PER_HOST and count % _PER_HOST:
    raise UserError(f"--topology={name} fills no hosts of {_PER_HOST}; take a multiple of it")
  hosts = -(-count // _PER_HOST)
  chip = CHIPS[kind]
  assert chip.card is not None
  card = _CARD.format(
    **chip.card,
    optin=chip.card["shared"] - 1024,
    bandwidth=int(chip.bandwidth),
    memory=chip.memory,
    # Instructions of the very chip, which products on Hopper need.
    extension="feature_extension: ACCELERATED_FEATURES" if chip.card["major"] == 9 else "",
  )
  shape = f"1x{hosts}x{count // hosts}"  # partitions x hosts x cards of each
  try:
    return topologies.get_topology_desc(kind, "cuda", target_config=card, topology=shape).devices
  except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
    raise UserError(
      f"--topology={name}: JAX {jax.__version__} cannot compile for it without a card"
      f" ({' '.join(str(error).split())}); upgrade jax"
    ) from error


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
  """Lets JAX compile for devices that are not here.

  1. Programs are not kept in the compilation cache: one for absent devices cannot be read back.
  2. Instructions remember more of the lines that they come from than JAX's usual ten.
  3. JAX asks the first GPU and the cuDNN of this machine whether cuDNN's attention can be used.
     Inside this block it is told what the target has. The functions are private, so that another
     version of JAX may have others.

  Raises:
    UserError: this version of JAX asks in another way.
  """
  settings = {"jax_enable_compilation_cache": False, "jax_traceback_in_locations_limit": 50}
  before = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  try:
    with _cudnn_of(target) if target.is_gpu else contextlib.nullcontext():
      yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


@contextlib.contextmanager
def _cudnn_of(target: Target) -> Iterator[None]:
  """Answers JAX's questions about the card for a target, while the block runs."""
  assert target.chip.card is not None
  version = (target.chip.card["major"], 0)

  def parsed(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))

  answers = {
    "check_cudnn_version": lambda: 91400,
    "check_compute_capability": lambda least: parsed(least) <= version,
    "is_cuda_compute_capability_equal": lambda wanted: parsed(wanted) == version,
  }
  try:
    asked: Any = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    before = {name: getattr(asked, name) for name in answers}
  except (ImportError, AttributeError) as error:
    raise UserError(
      f"--topology={target.name}: JAX {jax.__version__} cannot compile cuDNN's attention without a"
      " card; set --config.model.attention=xla, or take another version of JAX"
    ) from error
  try:
    for name, answer in answers.items():
      setattr(asked, name, answer)
    yield
  finally:
    for name, function in before.items():
      setattr(asked, name, function)
