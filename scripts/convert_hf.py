"""Writes a checkpoint of a run as a Hugging Face model folder.

  python scripts/convert_hf.py --workdir runs/dpo --out runs/dpo-best
  python scripts/convert_hf.py --workdir runs/dpo --out runs/dpo-100 --step 100

The folder holds `config.json`, `model.safetensors` and, untouched, the tokenizer of the run.
"""

import _root  # noqa: F401 (puts the package on the path)
from absl import flags

from dpo_jax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
OUT = flags.DEFINE_string("out", None, "model folder to write; it must not exist", required=True)
STEP = flags.DEFINE_integer("step", None, "which checkpoint; the latest if left out")


def main(_):
  import json
  import pathlib

  from ml_collections import ConfigDict

  from dpo_jax import build
  from dpo_jax.checkpoint import Checkpoints
  from dpo_jax.model import hf
  from dpo_jax.structs import UserError

  workdir, out = pathlib.Path(WORKDIR.value), pathlib.Path(OUT.value)
  if out.exists():
    raise UserError(f"--out={out} exists; name a new folder")
  if not (workdir / "config.json").is_file() or not (workdir / "checkpoints").is_dir():
    raise UserError(f"--workdir={workdir} holds no run; name the folder that was trained into")
  section = ConfigDict(json.loads((workdir / "config.json").read_text(encoding="utf-8"))).model
  model_config, _ = build.describe_model(section)
  checkpoints = Checkpoints(workdir / "checkpoints")
  try:
    step = checkpoints.latest() if STEP.value is None else STEP.value
    params = checkpoints.restore_params(step)
  finally:
    checkpoints.close()
  hf.save(out, model_config, params, source=section.path or section.tokenizer)
  print(f"{out}: the model of step {step}")


if __name__ == "__main__":
  cli.run(main)
