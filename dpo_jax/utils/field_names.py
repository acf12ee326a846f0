"""Names of a run's fields: short flags, names in other trainers, and hints for unknown names.

Plain strings, so that a command line can be read before anything heavy is loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

# Short flags of the fields that are set most often: --lr=1e-6 is --config.optimizer.learning_rate.
# Arguments of `dpo_jax.fit` have the same names.
SHORT = {
  "model": "model.path",
  "data": "data.path",
  "loss": "loss.name",
  "beta": "loss.beta",
  "lr": "optimizer.learning_rate",
  "epochs": "train.epochs",
  "steps": "train.steps",
  "batch_size": "train.batch_size",
  "accumulate": "train.accumulate",
  "max_length": "data.max_length",
  "eval_data": "data.eval_path",
  "reference": "reference.path",
  "lora_rank": "lora.rank",
  "dtype": "model.compute_dtype",
  "seed": "seed",
}

# Fields of which the word "none" is a value like others: there it does not mean `not given`.
NONE_IS_A_VALUE = ("model.remat",)

# Fields, and what other trainers call them: TRL and transformers, PEFT, Tunix, OpenRLHF,
# LLaMA-Factory, Axolotl. A value after `=` is part of the suggestion.
_ELSEWHERE = {
  "--workdir": "output_dir save_path save_dir out_dir output run_dir checkpoint_root_directory",
  "--overwrite": "overwrite_output_dir",
  "--config": "yaml config_file config_path recipe",
  "model.path": "model_name_or_path model_name model_id base_model pretrain model_path weights",
  "model.tokenizer": "tokenizer_name tokenizer_name_or_path tokenizer_path",
  "model.compute_dtype": "torch_dtype precision mixed_precision compute_type",
  "model.compute_dtype=bfloat16": "bf16 bfloat16 fp16",
  "model.compute_dtype=float32": "fp32 tf32",
  "model.remat": "gradient_checkpointing activation_checkpointing checkpoint_activations",
  "model.attention": "attn_implementation flash_attn flash_attention use_flash_attention_2",
  "reference.path": "ref_model ref_model_path ref_model_name_or_path ref_pretrain reference_model"
  " ref",
  "reference.store": "precompute_ref_log_probs precompute_reference",
  "reference.sync_every": "sync_ref_model ref_model_sync_steps",
  "reference.sync_alpha": "ref_model_mixup_alpha",
  "lora.rank": "lora_r r use_peft use_lora",
  "lora.alpha": "lora_alpha",
  "lora.rs": "use_rslora",
  "lora.dropout": "lora_dropout",
  "lora.target": "lora_target_modules target_modules lora_target lora_target_linear",
  "lora.path": "adapter_name_or_path adapter lora_path lora_model_dir",
  "data.path": "dataset dataset_name dataset_path data_path dataset_dir train_file train_data"
  " train_dataset train",
  "data.eval_path": "eval_file eval_dataset eval_dataset_path validation_file test_file val_data"
  " eval validation",
  "data.eval_fraction": "val_size test_size eval_split validation_split val_set_size",
  "data.eval_limit": "max_eval_samples",
  "data.max_length": "max_len max_seq_length max_seq_len cutoff_len sequence_len seq_len",
  "data.layout": "packing padding_free packing_samples sample_packing",
  "data.truncation": "truncation_mode",
  "data.template": "chat_template_kwargs",
  "data.mix": "dataset_mixture dataset_mixer datasets",
  "data.fields.prompt": "prompt_key prompt_column",
  "data.fields.chosen": "chosen_key chosen_column",
  "data.fields.rejected": "rejected_key rejected_column",
  "loss.name": "loss_type loss_fn dpo_loss_type pref_loss algorithm objective stage rl rlhf_type"
  " task loss_weights",
  "loss.beta": "pref_beta dpo_beta kl_coef kl_beta rl_beta",
  "loss.sft_weight": "rpo_alpha pref_ftx nll_loss_coef cpo_alpha",
  "loss.link": "f_divergence_type",
  "loss.link_alpha": "f_alpha_divergence_coef",
  "loss.wpo": "use_weighting dpo_use_weighting",
  "loss.gamma": "simpo_gamma",
  "loss.gold_weight": "tpo_alpha",
  "loss.tau": "discopop_tau",
  "on_policy.num": "num_generations n_samples_per_prompt num_return_sequences num_samples n",
  "on_policy.max_tokens": "max_new_tokens max_response_length",
  "on_policy.reward": "reward_model reward_funcs reward_model_path",
  "optimizer.learning_rate": "learningrate peak_lr",
  "optimizer.schedule": "lr_scheduler_type lr_scheduler scheduler lr_schedule",
  "optimizer.warmup_steps": "warmup warmup_ratio lr_warmup_ratio lr_warmup_steps",
  "optimizer.final_fraction": "min_lr min_lr_ratio min_lr_rate cosine_min_lr_ratio",
  "optimizer.b1": "adam_beta1 beta1",
  "optimizer.b2": "adam_beta2 beta2",
  "optimizer.eps": "adam_epsilon epsilon",
  "optimizer.weight_decay": "wd l2",
  "optimizer.clip_norm": "max_grad_norm max_norm grad_clip gradient_clipping clip_grad",
  "train.batch_size": "per_device_train_batch_size train_batch_size micro_train_batch_size"
  " micro_batch_size global_batch_size batch bs",
  "train.accumulate": "gradient_accumulation_steps accumulation_steps grad_accum",
  "train.epochs": "num_train_epochs num_epochs max_epochs epoch",
  "train.steps": "max_steps num_steps num_train_steps training_steps iters iterations"
  " num_iterations",
  "eval.every": "eval_steps eval_every eval_every_n_steps eval_strategy evaluation_strategy"
  " evals_per_epoch",
  "eval.samples": "generate_during_eval",
  "eval.batch_size": "per_device_eval_batch_size eval_batch_size",
  "checkpoint.every": "save_steps save_every save_strategy save_interval_steps saves_per_epoch",
  "checkpoint.keep": "save_total_limit max_to_keep max_ckpt_num",
  "export.best": "load_best_model_at_end save_best metric_for_best_model",
  "parallel.devices": "num_gpus gpus num_devices nproc_per_node world_size n_gpus_per_node",
  "parallel.fsdp": "zero_stage deepspeed",
  "parallel.tensor": "tensor_parallel_size tp",
  "parallel.sequence": "context_parallel_size ring_attn_size sequence_parallel_size",
}
# Names of other trainers that have no field here, and why none is needed.
_NOT_NEEDED = {
  "every step is written to metrics.jsonl": (
    "logging_steps logging_strategy logging_first_step log_every log_every_n_steps log_level"
  ),
  "held-out rows are evaluated before the first step too": "eval_on_start",
  "its rule is chosen by --config.model.remat": "gradient_checkpointing_kwargs use_reentrant",
  "JAX compiles the step, without kernels to choose": "torch_compile use_liger_kernel",
  "adapters are plain LoRA": "lora_task_type lora_bias init_lora_weights use_dora",
  "the folder of the model says it": "model_type tokenizer_type",
  "the folder of the model is read as it is: download the revision that you want": (
    "model_revision revision"
  ),
  "the same command resumes the run that its --workdir has": (
    "resume resume_from_checkpoint resume_from from_checkpoint"
  ),
  "metrics.jsonl and TensorBoard events are written to the workdir": (
    "report_to use_wandb wandb wandb_project run_name logging_dir"
  ),
  "rows are padded and packed as data.layout says": (
    "pad_token padding_side label_pad_token_id padding_value pad_to_multiple_of"
    " pad_to_sequence_len group_by_length"
  ),
  "fields that are not known are not read": "remove_unused_columns",
  "--config.loss.gamma is that ratio times beta": "gamma_beta_ratio",
  "a file is read whole; a tenth of it is held out, or --eval_data is": (
    "split dataset_split dataset_splits dataset_train_split dataset_test_split"
  ),
  "rows are shuffled in every epoch, by --seed": "shuffle shuffle_dataset",
  "`dpo-jax plan` estimates what a run takes, `dpo-jax inspect` shows its data": "dry_run",
  "the optimizer is AdamW": "optim optimizer optimizer_name",
  "prompts are shortened only where data.max_length requires it": "max_prompt_length",
  "--max_length is of prompt and completion together, on_policy.max_tokens of samples": (
    "max_completion_length"
  ),
  "adapters are trained where --lora_rank is above 0, else all weights": "finetuning_type",
  "quantised weights are not read: name the folder of the model's floating-point weights": (
    "load_in_4bit load_in_8bit use_4bit qlora quantize quantization quantization_bit bits"
  ),
  "`dpo-jax train` trains, and evaluates as it goes": "do_train do_eval do_predict",
  "no code of a model's folder is run": "trust_remote_code",
  "nothing is uploaded; `hf upload` uploads the export folder": (
    "push_to_hub hub_model_id hub_model_revision hub_strategy hub_private_repo hub_token hf_token"
  ),
  "every run ends with plots, in report.html": "plot_loss",
  "rows are tokenized on all cores": (
    "preprocessing_num_workers dataset_num_proc num_proc num_workers dataloader_num_workers"
  ),
  "tokenized rows are not kept between runs": "overwrite_cache dataset_prepared_path",
  "all rows are used; for fewer, make a smaller file, such as with head -n 100": (
    "max_samples max_train_samples"
  ),
  "the chat template is that of the model's folder; its arguments are --config.data.template": (
    "template chat_template"
  ),
  "JAX finds the devices; the environment variable JAX_PLATFORMS=cpu chooses others": (
    "device device_map cpu gpu use_cpu no_cuda local_rank"
  ),
  "samples are made by the program itself": "use_vllm vllm vllm_mode",
}
_OUTPUT = _ELSEWHERE["--workdir"].split()


def _by_name(table: dict[str, str]) -> dict[str, str]:
  return {name: value for value, names in table.items() for name in names.split()}


_FIELD_OF = _by_name(_ELSEWHERE)
_REASON = _by_name(_NOT_NEEDED)
_SHORT_OF = {field: flag for flag, field in SHORT.items()}


def flag_of(field: str, config: str = "config") -> str:
  """Returns the flag that sets a field, the short one where there is one: `--lr`."""
  if field.startswith("--"):
    return field
  name, equals, value = field.partition("=")
  return f"--{_SHORT_OF.get(name) or f'{config}.{name}'}{equals}{value}"


def suggest(typed: str, fields: Sequence[str], flags: Iterable[str] = ()) -> list[str]:
  """Finds the fields that are meant by a name that is none.

  Args:
    typed: what was written, with or without sections: `learning_rate`, `train.learning_rate`.
    fields: names of all fields, with their sections.
    flags: names of the command's other flags.

  Returns:
    Fields, the likeliest first, as `section.field` or `section.field=value`; or one flag, as
    `--name`; empty if nothing is near.
  """
  last = typed.rpartition(".")[2].replace("-", "_")
  lower = last.lower()
  if lower in SHORT and SHORT[lower] in fields:
    return [SHORT[lower]]
  # 1. The same field name in another section: `beta` is loss.beta.
  same = [field for field in fields if field.rpartition(".")[2] == lower]
  if same:
    # Fields with a short flag first, those that only rename columns of the data last.
    return sorted(same, key=_rank)
  # 2. What other trainers call it.
  found, flags = _FIELD_OF.get(lower), list(flags)
  if found:
    if found.partition("=")[0] in fields:
      return [found]
    # A command without a configuration may have a flag for the same thing.
    own = [found.removeprefix("--"), _SHORT_OF.get(found), found.rpartition(".")[2]]
    own = ["out", *own] if lower in _OUTPUT else own
    if meant := next((name for name in own if name in flags), None):
      return [f"--{meant}"]
  # 3. A typing mistake: first of the name with its section, then of the name alone.
  if "." in typed:
    near = difflib.get_close_matches(typed, fields, n=1, cutoff=0.8)
    if near:
      return near
  leaves = {field.rpartition(".")[2]: field for field in sorted(fields, key=_rank, reverse=True)}
  known = leaves | {k: v for k, v in SHORT.items() if v in fields} | {x: f"--{x}" for x in flags}
  near = difflib.get_close_matches(lower, known, n=1, cutoff=0.75)
  # 4. The beginning of one name alone.
  begun = [name for name in known if name.startswith(f"{lower}_")]
  near = near or (begun if len(begun) == 1 and len(lower) > 3 else [])
  return [known[name] for name in near]


def _rank(field: str) -> tuple[bool, bool]:
  return field not in _SHORT_OF, field.startswith("data.fields.")


def reason(typed: str) -> str | None:
  """Returns why a name of another trainer has no field here; None for other names."""
  name = typed.rpartition(".")[2].replace("-", "_").lower()
  return _REASON.get(name) or _REASON.get(name.removeprefix("no_"))


def in_short(
  typed: Sequence[str], fields: Sequence[str], flags: Sequence[str] = (), config: str = ""
) -> str:
  """Describes further names that are no fields, in a sentence behind that on the first.

  A command or file that was written for another trainer is then translated in one go.

  Args:
    typed: the names.
    fields: names of all fields.
    flags: names of the command's other flags.
    config: name of the configuration's flag, where flags are suggested; "" suggests fields.

  Returns:
    The sentence, with a space before it; "" if there are no names.
  """
  meant, needless, unlike = [], [], []
  for name in typed:
    if reason(name):
      needless.append(name)
    elif found := suggest(name, fields, flags):
      meant.append(f"{name} ({flag_of(found[0], config) if config else found[0]})")
    else:
      unlike.append(name)
  parts = [f"with another name here: {', '.join(meant)}"] if meant else []
  parts += [f"to be left out: {', '.join(needless)}"] if needless else []
  parts += [f"without a counterpart: {', '.join(unlike)}"] if unlike else []
  return f" Others are unknown too; {'; '.join(parts)}" if parts else ""


def is_elsewhere(typed: str) -> bool:
  """Returns True for a name that another trainer uses: its meaning may differ a little."""
  return typed.rpartition(".")[2].replace("-", "_").lower() in _FIELD_OF
