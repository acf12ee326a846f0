"""Writes a checkpoint of a run as a Hugging Face model folder.

  dpo-jax convert --workdir runs/dpo --out runs/dpo-last
  dpo-jax convert --workdir runs/dpo --out runs/dpo-best --best
  dpo-jax convert --workdir runs/dpo --out runs/dpo-100 --step 100
  dpo-jax convert --workdir runs/lora --out runs/merged --merge_lora

The folder contains `config.json`, the weights (in several files above --max_shard_gb), an unchanged
copy of the run's tokenizer and a model card, `README.md`. For a run that trained adapters it
contains those, in PEFT's format, or with --merge_lora the whole model with the adapters added to
its weights. --best takes the checkpoint with the best held-out accuracy, or the lowest held-out
loss where the rows have no accuracy.
"""

from absl import flags

from dpo_jax.utils import cli

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.define_path("workdir", None, "folder of the run", required=True)
  cli.define_path("out", None, "model folder to write; it must not exist yet", required=True)
  flags.DEFINE_integer("step", None, "step of the checkpoint (default: the latest)")
  flags.DEFINE_boolean("best", False, "the checkpoint that is best on the held-out rows")
  flags.DEFINE_boolean("merge_lora", False, "write the model with its adapters added to it")
  flags.DEFINE_float("max_shard_gb", 5.0, "size of a weights file, in 1e9 bytes", 1e-9)


def main(argv: list[str]) -> None:
  del argv
  import json
  import pathlib

  from ml_collections import ConfigDict

  from dpo_jax.hf import checkpoint as hf_checkpoint
  from dpo_jax.hf import peft
  from dpo_jax.model import lora
  from dpo_jax.structs import UserError
  from dpo_jax.training import model_card, setup, verdict
  from dpo_jax.training.checkpoint import Checkpoints
  from dpo_jax.utils import files, model_folder

  workdir, out = pathlib.Path(FLAGS.workdir), pathlib.Path(FLAGS.out)
  # Everything that can be refused comes before the weights, which may take minutes to read.
  if FLAGS.best and FLAGS.step is not None:
    raise UserError(f"--best and --step={FLAGS.step} both name a checkpoint; keep one")
  if out.exists():
    raise UserError(f"--out={out} exists; name a new folder")
  files.check_writable(out, f"--out={out}")
  if not (workdir / "config.json").is_file() or not (workdir / "checkpoints").is_dir():
    what = "is a model folder" if model_folder.is_model(workdir) else "holds no run"
    raise UserError(f"--workdir={workdir} {what}; name the folder that was trained into")
  fields = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
  model = ConfigDict(fields["model"])
  given = {"path": "", "rank": 0} | fields.get("lora", {})
  start = given.pop("path")
  # A finished run's export says what its adapters are, wherever the one it started from has gone.
  known = workdir / "export" if peft.is_adapter(workdir / "export") else start
  settings = peft.read_settings(known)[0] if start else lora.LoRA(**given)
  if FLAGS.merge_lora and not settings.rank:
    raise UserError(f"--merge_lora: {workdir} trained the model itself; leave the flag out")
  model_config, tokenizer = setup.describe_model(model)
  # Not tidied: the run may still be training, and a checkpoint that is half written is its own.
  checkpoints = Checkpoints(workdir / "checkpoints")
  try:
    step = checkpoints.latest() if FLAGS.step is None else FLAGS.step
    best = checkpoints.best() if FLAGS.best else None
    if FLAGS.best and best is None:
      raise UserError(
        f"--best: no checkpoint in {workdir} has an evaluation of held-out rows; name one by --step"
      )
    step = best.step if best else step
    if step is None:
      raise checkpoints.none()
    trained = checkpoints.restore_params(step)
  finally:
    checkpoints.close()
  of_step = f"of step {step}" + (f", the best by {verdict.describe(best)}" if best else "")

  source, shard = model.path or model.tokenizer, int(FLAGS.max_shard_gb * 1e9)
  adapter = bool(settings.rank) and not FLAGS.merge_lora
  card = model_card.text(workdir, step, adapter=adapter)
  beside = {"source": source, "end_ids": tokenizer.end_ids, "card": card}
  if not settings.rank:
    hf_checkpoint.save(out, model_config, trained, **beside, max_shard_size=shard)
    print(f"{out}: the model {of_step}")
    return
  _, base = hf_checkpoint.load(source, dtype=model.param_dtype)
  if FLAGS.merge_lora:
    merged = lora.merge(lora.attach(base, trained, settings.scale))
    hf_checkpoint.save(out, model_config, merged, **beside, max_shard_size=shard)
    print(f"{out}: the model {of_step}, its adapters merged")
  else:
    folder = pathlib.Path(source)
    # Absolute, since the exported adapter names its base from another folder.
    name = str(folder.resolve() if folder.is_dir() else folder)
    about = peft.Adapter(settings, name, peft.fingerprint_of(base))
    peft.save(out, model_config, trained, about, **beside)
    print(f"{out}: the adapters {of_step}")
