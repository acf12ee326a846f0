"""A name that is no field: what is suggested instead. And what every field means."""

import pytest

from dpo_jax import defaults, losses
from dpo_jax.utils import config_flags, field_docs, field_names

FIELDS = config_flags.fields_of(defaults.get_config())


@pytest.mark.parametrize(
  ("typed", "meant"),
  [
    ("beta", "loss.beta"),
    ("learning_rate", "optimizer.learning_rate"),
    ("train.learning-rate", "optimizer.learning_rate"),
    ("lr", "optimizer.learning_rate"),
    ("batch_size", "train.batch_size"),
    ("epoch", "train.epochs"),
    ("prompt", "data.fields.prompt"),
    # The table of docs/trl.md.
    ("loss_type", "loss.name"),
    ("rpo_alpha", "loss.sft_weight"),
    ("f_divergence_type", "loss.link"),
    ("use_weighting", "loss.wpo"),
    ("precompute_ref_log_probs", "reference.store"),
    ("sync_ref_model", "reference.sync_every"),
    ("ref_model_mixup_alpha", "reference.sync_alpha"),
    ("per_device_train_batch_size", "train.batch_size"),
    ("gradient_accumulation_steps", "train.accumulate"),
    ("num_train_epochs", "train.epochs"),
    ("max_steps", "train.steps"),
    ("lr_scheduler_type", "optimizer.schedule"),
    ("warmup_ratio", "optimizer.warmup_steps"),
    ("adam_beta1", "optimizer.b1"),
    ("max_grad_norm", "optimizer.clip_norm"),
    ("gradient_checkpointing", "model.remat"),
    ("bf16", "model.compute_dtype=bfloat16"),
    ("attn_implementation", "model.attention"),
    ("padding_free", "data.layout"),
    ("eval_steps", "eval.every"),
    ("save_steps", "checkpoint.every"),
    ("save_total_limit", "checkpoint.keep"),
    ("lora_r", "lora.rank"),
    ("lora_target_modules", "lora.target"),
    ("use_rslora", "lora.rs"),
    ("output_dir", "--workdir"),
    ("loss_weights", "loss.name"),
    ("dataset_mixture", "data.mix"),
    ("min_lr_rate", "optimizer.final_fraction"),
    ("evaluation_strategy", "eval.every"),
    ("generate_during_eval", "eval.samples"),
    ("tpo_alpha", "loss.gold_weight"),
    # Typing mistakes.
    ("optimzer.learning_rat", "optimizer.learning_rate"),
    ("learnin_rate", "optimizer.learning_rate"),
    ("workdri", "--workdir"),
  ],
)
def test_the_likeliest_field_comes_first(typed, meant):
  assert field_names.suggest(typed, FIELDS, ["workdir", "config"])[0] == meant


def test_a_field_of_several_sections_has_all_of_them_suggested():
  assert field_names.suggest("every", FIELDS) == ["checkpoint.every", "eval.every"]
  # Those with short flags first.
  assert field_names.suggest("train.path", FIELDS)[:3] == [
    "data.path",
    "model.path",
    "reference.path",
  ]


def test_names_of_other_trainers_are_described_in_one_go():
  names = ["bf16", "learning_rate", "output_dir", "report_to", "no_remove_unused_columns", "zzz"]
  assert field_names.in_short(names, FIELDS, ["workdir"]) == (
    " Others are unknown too; with another name here: bf16 (model.compute_dtype=bfloat16),"
    " learning_rate (optimizer.learning_rate), output_dir (--workdir); to be left out: report_to,"
    " no_remove_unused_columns; without a counterpart: zzz"
  )
  assert "learning_rate (--lr)" in field_names.in_short(["learning_rate"], FIELDS, (), "config")
  assert field_names.in_short([], FIELDS) == ""


def test_nothing_near_is_suggested_for_nonsense():
  assert field_names.suggest("zzz", FIELDS) == []


def test_every_name_elsewhere_leads_to_a_field_that_there_is():
  """Nor is one the name of a field here, which would be hidden by it."""
  leaves = {field.rpartition(".")[2] for field in FIELDS}
  for name, field in field_names._FIELD_OF.items():
    assert field.startswith("--") or field.partition("=")[0] in FIELDS
    assert name not in leaves and name not in field_names.SHORT
  assert {*field_names.SHORT.values()} <= {*FIELDS}


def test_an_option_without_a_counterpart_has_a_reason():
  assert "every step" in (field_names.reason("train.logging_steps") or "")
  assert field_names.reason("learning_rate") is None


def test_a_command_without_a_configuration_has_its_own_flags_suggested():
  assert field_names.suggest("dataset", (), ["data", "model"]) == ["--data"]
  assert field_names.suggest("dataset", (), ["out"]) == []


def test_documented_defaults_are_those_of_the_code():
  described = field_docs.read()
  for field in FIELDS:
    if field.startswith(("loss.", "data.fields.")):
      continue
    section, _, name = field.rpartition(".")
    value = defaults.get_config()[section][name] if section else defaults.get_config()[name]
    empty = hasattr(value, "keys") and not len(value)
    assert described[field].default == field_docs.shown(None if empty else value)
    assert described[field].meaning
  assert described["loss.name"].default == "sigmoid"


def test_arguments_of_losses_that_are_explained_exist():
  known = {key for name in losses.LOSSES for key in losses.arguments(name)} | {"name"}
  assert {*defaults.LOSS_FIELDS} <= known | losses.modifiers().keys()


def test_a_field_without_a_comment_is_an_error(tmp_path):
  path = tmp_path / "defaults.py"
  path.write_text('LOSS_FIELDS = {}\ndef get_config():\n  return {"seed": 0}\n')
  with pytest.raises(ValueError, match="seed has no comment"):
    field_docs.read(path)


@pytest.mark.parametrize(
  ("field", "kind"),
  [
    ("model.path", "DIR"),
    ("data.path", "FILE"),
    ("train.steps", "N"),
    ("optimizer.learning_rate", "X"),
    ("data.balance", "BOOL"),
  ],
)
def test_help_shows_what_kind_of_value_is_wanted(field, kind):
  assert field_docs.read()[field].kind == kind
