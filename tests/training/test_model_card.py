"""The model card: what the hub reads, what was measured, and no path of the machine."""

import json

import numpy as np
import pytest
import yaml

from dpo_jax.training import model_card, verdict
from dpo_jax.training.verdict import HeldOut

CONFIG = {
  "seed": 7,
  "model": {"path": "/home/someone/models/small-1b", "compute_dtype": "bfloat16"},
  "reference": {"path": ""},
  "lora": {"rank": 8, "alpha": 16.0, "target": "all-linear", "rs": False},
  "data": {"path": "/home/someone/data/pairs.jsonl,/mnt/more.jsonl", "max_length": 512},
  "loss": {"name": "sigmoid", "beta": 0.25, "sft_weight": 0.1, "clip": None},
  "optimizer": {"learning_rate": 1e-6, "schedule": "linear", "warmup_steps": None},
  "train": {"steps": 0, "epochs": 2.0, "batch_size": 32},
}
LEDGER = {
  "rows": 882,
  "pairs": 877,
  "dropped": {"equal completions": 5},
  "truncated": {"prompt": 3},
}


@pytest.fixture
def workdir(tmp_path):
  """A finished run of 20 held-out pairs: all even before, 18 right after."""
  folder = tmp_path / "polite"
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(CONFIG))
  (folder / "data.json").write_text(json.dumps(LEDGER))
  ones = np.ones(20)
  verdict.write(folder, verdict.BEFORE, HeldOut(0.7 * ones, ones, 0.5 * ones))
  right = np.array([1.0] * 18 + [0.0] * 2)
  verdict.write(folder, verdict.AFTER, HeldOut(np.linspace(0.1, 0.5, 20), ones, right))
  records = [
    {"step": 10, "eval/rewards/accuracies": 0.8, "eval/loss": 0.4},
    {"step": 20, "eval/rewards/accuracies": 0.9, "eval/loss": 0.3},
  ]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  return folder


def front_matter(card: str) -> dict:
  return yaml.safe_load(card.split("---\n")[1])


def test_what_the_hub_reads(workdir):
  found = front_matter(model_card.text(workdir, 20))
  assert found == {
    "base_model": "small-1b",
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["dpo_jax", "dpo"],
  }
  adapter = front_matter(model_card.text(workdir, 20, adapter=True))
  assert adapter["library_name"] == "peft" and adapter["tags"][-1] == "lora"


def test_what_was_trained_and_measured(workdir):
  card = model_card.text(workdir, 20)
  for line in (
    "# polite",
    "Trained from `small-1b` with the loss `sigmoid`, β = 0.25, by dpo_jax.",
    "| data | `pairs.jsonl`, `more.jsonl`: 882 rows read, 877 kept, 3 with a cut prompt, 5 dropped"
    " (equal completions) |",
    # Wilson's interval of 18 of 20.
    "| held out (20 pairs) | before | after | 95% interval |",
    "| accuracy | 50.0% | 90.0% | 69.9% to 97.2% |",
    "| learning rate | 1e-06 |",
    "| epochs | 2 |",
    "| loss.sft_weight | 0.1 |",
  ):
    assert line in card.splitlines(), line
  # The data say nothing of a form.
  assert "In training, prompts" not in card and '--prompt="TEXT"\n' in card
  assert "LoRA" not in card and "AutoModelForCausalLM" in card and "dpo-jax sample" in card
  adapter = model_card.text(workdir, 20, adapter=True)
  assert "| LoRA rank | 8 |" in adapter and "PeftModel.from_pretrained(base, folder)" in adapter


def test_no_path_of_the_machine(workdir):
  for adapter in (False, True):
    card = model_card.text(workdir, 20, adapter=adapter)
    assert not any(x in card for x in ("/home", "someone", "/mnt", "/data/", str(workdir.parent)))


def test_another_step_has_the_means_of_its_evaluation(workdir):
  card = model_card.text(workdir, 10)
  # Of 16 of 20; single losses of that step are not kept, so their interval is not known.
  assert "| accuracy | 50.0% | 80.0% | 58.4% to 91.9% |" in card
  assert "| loss | 0.7 | 0.4 |  |" in card and "| exported step | 10 |" in card
  # Of the best steps of a run that exports the best, single losses are kept.
  losses = np.array([0.3, 0.5] * 10)
  verdict.write(workdir, "10", HeldOut(losses, np.ones(20), np.array([1.0] * 16 + [0.0] * 4)))
  # 1.96 standard errors of 0.1 * sqrt(20 / 19) / sqrt(20).
  assert "| loss | 0.7 | 0.4 | 0.355 to 0.445 |" in model_card.text(workdir, 10)


def test_a_run_that_measured_nothing_has_a_card_too(workdir):
  for path in [*(workdir / "held_out").iterdir(), workdir / "metrics.jsonl"]:
    path.unlink()
  card = model_card.text(workdir, 20)
  assert "Evaluation" not in card and "## Use" in card
  (workdir / "config.json").write_text(json.dumps({"loss": {"name": "sft"}}))
  card = model_card.text(workdir, 20)
  assert "base_model" not in card and "Trained from random weights with the loss `sft`" in card


@pytest.mark.parametrize(
  ("path", "name"),
  [
    ("/home/me/small-1b/", "small-1b"),
    ("runs/first/export", "first"),
    (
      "/home/me/.cache/huggingface/hub/models--Qwen--Qwen2.5-0.5B/snapshots/060db6",
      "Qwen/Qwen2.5-0.5B",
    ),
    ("", ""),
  ],
)
def test_a_model_is_named_without_the_folders_above_it(path, name):
  assert model_card.name_of(path) == name


def test_beta_is_that_of_the_loss_where_none_is_given(workdir):
  for loss, shown in (("ipo", "β = 0.1"), ("mine:loss", "`mine:loss`, by")):
    (workdir / "config.json").write_text(json.dumps(CONFIG | {"loss": {"name": loss}}))
    assert shown in model_card.text(workdir, 20)


def test_names_in_the_front_matter_are_quoted(workdir):
  model = {"model": {"path": "/x/a: [b] # 'c'"}}
  (workdir / "config.json").write_text(json.dumps(CONFIG | model))
  assert front_matter(model_card.text(workdir, 20))["base_model"] == "a: [b] # 'c'"


@pytest.mark.parametrize(
  ("form", "template", "flag"),
  [
    ("instruction", True, " --instruction"),
    ("messages", True, " --chat"),
    ("messages", False, ""),
    ("strings", True, ""),
  ],
)
def test_the_command_that_samples_writes_prompts_as_the_data_did(workdir, form, template, flag):
  (workdir / "data.json").write_text(json.dumps(LEDGER | {"format": form}))
  (workdir / "export").mkdir()
  settings = {"chat_template": "{{ messages }}"} if template else {}
  (workdir / "export" / "tokenizer_config.json").write_text(json.dumps(settings))
  assert model_card.sample_flag(workdir) == flag
  card = model_card.text(workdir, 20)
  assert f'--prompt="TEXT"{flag}\n' in card
  assert ("### Instruction:\nTEXT\n\n### Response:\n" in card) == (form == "instruction")


def test_held_out_prompts_that_are_trained_on_too_are_counted(workdir):
  config = json.loads((workdir / "config.json").read_text())
  config["data"]["eval_path"] = "other/held_out.jsonl"
  (workdir / "config.json").write_text(json.dumps(config))
  ledger = json.loads((workdir / "data.json").read_text())
  line = "| held out | 20: `held_out.jsonl`"
  assert f"{line} |" in model_card.text(workdir, 20)
  ledger["leakage"] = {"eval_path": {"prompts": 12, "of": 20}}
  (workdir / "data.json").write_text(json.dumps(ledger))
  assert f"{line}, where 12 prompts are trained on too |" in model_card.text(workdir, 20)
