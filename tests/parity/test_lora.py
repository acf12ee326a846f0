"""Adapters beside PEFT itself: it loads what is written here, and computes the same."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; see CONTRIBUTING")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="peft is not installed; see CONTRIBUTING")

from dpo_jax.hf import checkpoint as hf_checkpoint  # noqa: E402
from dpo_jax.hf import peft as hf_peft  # noqa: E402
from dpo_jax.logprobs import logits  # noqa: E402
from dpo_jax.model import lora, transformer  # noqa: E402
from dpo_jax.model.lora import LoRA  # noqa: E402
from tests.golden import cases, theirs  # noqa: E402
from tests.support.whole_rows import whole_rows  # noqa: E402

# Their libraries warn of each other.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


# Phi-3 has query, key and value in one tensor, gate and up in another.
@pytest.fixture(scope="module", params=["gpt2", "llama", "phi3"])
def folder(request, tmp_path_factory):
  """A small random model as transformers saves it."""
  return theirs.write(request.param, tmp_path_factory.mktemp("models") / request.param)


def plain_logits(config, params) -> np.ndarray:
  """Ours, of whole rows."""
  model = transformer.build(config)
  return np.asarray(logits(model.hidden(params, whole_rows(cases.IDS_NL)), model.head(params)))


def their_logits(model) -> np.ndarray:
  with torch.no_grad():
    return theirs.logits(model.eval(), cases.IDS_NL).numpy()


def loaded(folder, path):
  """The adapter in PEFT, and which keys of its file it missed or did not expect."""
  base = transformers.AutoModelForCausalLM.from_pretrained(folder)
  model = peft.PeftModel.from_pretrained(base, path)
  found = model.load_adapter(path, adapter_name="again")
  adapter_keys = [key for key in found.missing_keys if "lora_" in key]
  return model, adapter_keys + list(found.unexpected_keys)


def near(found, expected):
  error = np.abs(found - expected).max()
  print(f"\nlogits differ by {error:.1e}")
  assert error < 1e-4


@pytest.mark.parametrize("rs", [False, True], ids=["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize("target", ["all-linear", "query,value"])
def test_peft_loads_what_is_written_here(folder, tmp_path, target, rs):
  settings = LoRA(rank=4, alpha=6.0, rs=rs, target=target)
  config, params = hf_checkpoint.load(folder)
  rng = np.random.default_rng(1)
  own = jax.tree.map(
    lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), lora.init(config, settings, 0)
  )
  about = hf_peft.Adapter(settings, str(folder), hf_peft.fingerprint_of(params))
  hf_peft.save(tmp_path / "adapter", config, own, about)

  model, strays = loaded(folder, tmp_path / "adapter")
  assert strays == []
  policy = lora.attach(params, own, settings.scale)
  found = plain_logits(config, policy)
  assert np.abs(found - plain_logits(config, params)).max() > 0.1
  near(found, their_logits(model))
  # Merged here and loaded as a plain model there.
  hf_checkpoint.save(tmp_path / "merged", config, lora.merge(policy), source=folder)
  merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
  near(their_logits(merged), their_logits(model))


@pytest.mark.parametrize("rs", [False, True], ids=["alpha/r", "alpha/sqrt(r)"])
def test_what_peft_writes_is_read_here(folder, tmp_path, rs):
  torch.manual_seed(2)
  base = transformers.AutoModelForCausalLM.from_pretrained(folder)
  last = "c_fc" if "gpt2" in folder.name else "down_proj"
  given = peft.LoraConfig(
    r=4,
    lora_alpha=6,
    use_rslora=rs,
    target_modules="all-linear",
    rank_pattern={last: 2},
    alpha_pattern={last: 5},
    init_lora_weights=False,
    fan_in_fan_out="gpt2" in folder.name,
  )
  model = peft.get_peft_model(base, given)
  model.save_pretrained(tmp_path)
  assert json.loads((tmp_path / hf_peft.CONFIG).read_text())["r"] == 4
  config, params = hf_checkpoint.load(folder)
  settings, own = hf_peft.load(tmp_path, config)
  near(plain_logits(config, lora.attach(params, own, settings.scale)), their_logits(model))
