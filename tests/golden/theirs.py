"""Models of `cases` as transformers builds them. Needs torch; see CONTRIBUTING."""

import json
import pathlib

import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.golden import cases


def write(case: str, folder: pathlib.Path) -> pathlib.Path:
  """A folder that transformers saved, its numbers those of `cases.weight`."""
  fields = cases.CASES[case]
  kind = transformers.AutoConfig.for_model(fields["model_type"])
  config = type(kind).from_dict(fields)
  transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
  file = folder / "model.safetensors"
  with safe_open(file, "np") as tensors:
    shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
  save_file(
    {name: cases.weight(name, shape) for name, shape in shapes.items()},
    file,
    metadata={"format": "pt"},
  )
  return folder


def load(folder: pathlib.Path, dtype=torch.float32):
  """(model, what loading it said of missing and unexpected tensors)."""
  # Grouped products of torch 2.13 on a CPU ask for wider models in bfloat16.
  plain = {"attn_implementation": "eager"}
  if any("experts" in name for name in fields(folder)):
    plain["experts_implementation"] = "eager"
  model, said = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=dtype, output_loading_info=True, **plain
  )
  return model.eval(), said


def logits(model, ids_NL) -> "torch.Tensor":
  return model(torch.tensor(ids_NL, dtype=torch.long), use_cache=False).logits


def fields(folder: pathlib.Path) -> dict:
  """The `config.json` that transformers wrote."""
  return json.loads((folder / "config.json").read_text())
