"""Adapters beside PEFT itself: it loads what is written here, and computes the same."""

import json

import jax
import numpy as np
import pytest

from dpo_jax.logprobs import logits
from dpo_jax.model import adapters, hf, lora, transformer
from dpo_jax.model.lora import LoRA
from dpo_jax.structs import TokenBatch

# Their libraries warn of each other.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch", reason="torch is not installed; see CONTRIBUTING")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="peft is not installed; see CONTRIBUTING")

VOCAB = 61
IDS_NL = np.random.default_rng(0).integers(0, VOCAB, (3, 11))
MODELS = {
  "llama": lambda: transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=VOCAB,
      hidden_size=32,
      num_hidden_layers=3,
      num_attention_heads=4,
      num_key_value_heads=2,
      intermediate_size=48,
      initializer_range=0.2,
    )
  ),
  # Query, key and value in one tensor, gate and up in another.
  "phi3": lambda: transformers.Phi3ForCausalLM(
    transformers.Phi3Config(
      vocab_size=VOCAB,
      hidden_size=32,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      intermediate_size=48,
      initializer_range=0.2,
      bos_token_id=1,
      eos_token_id=2,
      pad_token_id=0,
    )
  ),
  "gpt2": lambda: transformers.GPT2LMHeadModel(
    transformers.GPT2Config(
      vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=32, initializer_range=0.2
    )
  ),
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def folder(request, tmp_path_factory):
  """A small random model as transformers saves it."""
  torch.manual_seed(0)
  path = tmp_path_factory.mktemp(request.param)
  MODELS[request.param]().save_pretrained(path)
  return path


def plain_logits(config, params) -> np.ndarray:
  """Ours, of whole rows."""
  rows, length = IDS_NL.shape
  zeros_NL = np.zeros((rows, length), np.int32)
  batch = TokenBatch(*[zeros_NL] * len(TokenBatch._fields))._replace(
    ids_NL=IDS_NL, position_NL=np.broadcast_to(np.arange(length), (rows, length))
  )
  model = transformer.build(config)
  return np.asarray(logits(model.hidden(params, batch), model.head(params)))


def their_logits(model) -> np.ndarray:
  with torch.no_grad():
    return model.eval()(torch.tensor(IDS_NL)).logits.numpy()


def loaded(folder, path):
  """The adapter in PEFT, and which keys of its file it missed or did not expect."""
  base = transformers.AutoModelForCausalLM.from_pretrained(folder)
  model = peft.PeftModel.from_pretrained(base, path)
  found = model.load_adapter(path, adapter_name="again")
  adapter_keys = [key for key in found.missing_keys if "lora_" in key]
  return model, adapter_keys + list(found.unexpected_keys)


def near(found, expected):
  assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("rs", [False, True], ids=["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize("target", ["all-linear", "query,value"])
def test_peft_loads_what_is_written_here(folder, tmp_path, target, rs):
  settings = LoRA(rank=4, alpha=6.0, rs=rs, target=target)
  config, params = hf.load(folder)
  rng = np.random.default_rng(1)
  own = jax.tree.map(
    lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), lora.init(config, settings, 0)
  )
  about = adapters.Adapter(settings, str(folder), adapters.mark_of(params))
  adapters.save(tmp_path / "adapter", config, own, about)

  model, strays = loaded(folder, tmp_path / "adapter")
  assert strays == []
  policy = lora.attach(params, own, settings.scale)
  found = plain_logits(config, policy)
  assert np.abs(found - plain_logits(config, params)).max() > 0.1
  near(found, their_logits(model))
  # Merged here and loaded as a plain model there.
  hf.save(tmp_path / "merged", config, lora.merge(policy), source=folder)
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
  assert json.loads((tmp_path / adapters.CONFIG).read_text())["r"] == 4
  config, params = hf.load(folder)
  settings, own = adapters.load(tmp_path, config)
  near(plain_logits(config, lora.attach(params, own, settings.scale)), their_logits(model))
