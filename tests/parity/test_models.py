"""Every family beside transformers itself: logits, log-probs of pairs, a step, and the way back.

bash scripts/test.sh -m parity     after the one command of CONTRIBUTING that adds torch
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch", reason="torch is not installed; see CONTRIBUTING")

from dpo_jax import losses, step  # noqa: E402
from dpo_jax.data import collate  # noqa: E402
from dpo_jax.hf import checkpoint as hf_checkpoint  # noqa: E402
from dpo_jax.logprobs import logits, make_logps_fn  # noqa: E402
from dpo_jax.model import transformer  # noqa: E402
from tests.golden import cases, theirs  # noqa: E402
from tests.support import tiny  # noqa: E402
from tests.support.whole_rows import whole_rows  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
CASES = pytest.mark.parametrize("case", cases.CASES)
BETA, RATE = 0.1, 1e-3


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
  """Folders that transformers saved, made once each."""
  made = {}

  def folder(case):
    if case not in made:
      made[case] = theirs.write(case, tmp_path_factory.mktemp("theirs") / "model")
    return made[case]

  return folder


def pairs():
  """Pairs of texts longer than the windows, no id of a special token among them."""
  return [
    example._replace(
      prompt=example.prompt % 37 + 3,
      completions=tuple(answer % 37 + 3 for answer in example.completions),
    )
    for example in tiny.pairs(4, longest=12)
  ]


def their_logps(model, example):
  """Summed log-prob of both answers, one text at a time."""
  found = []
  for answer in example.completions:
    ids_L = np.concatenate([example.prompt, answer])
    logps_LV = torch.log_softmax(theirs.logits(model, ids_L[None])[0].float(), -1)
    at = np.arange(len(example.prompt) - 1, len(ids_L) - 1)
    found.append(logps_LV[at, ids_L[at + 1]].sum())
  return torch.stack(found)


def our_logps_fn(config, **how):
  """params -> log-probs of `pairs`, through the production layout: [4, 2]."""
  batch = collate.collate(pairs(), layout="shared", row_length=64)
  order = np.argsort(batch.row_NS.reshape(-1, 2)[:, 0])[-4:]
  logps_fn = make_logps_fn(transformer.build(config, **how))
  return lambda params: logps_fn(params, batch).reshape(-1, 2)[order]


@CASES
def test_logits_and_logps(case, folder_of, record_property):
  model, _ = theirs.load(folder_of(case))
  config, params = hf_checkpoint.load(folder_of(case))
  built = transformer.build(config)
  ours = logits(jax.jit(built.hidden)(params, whole_rows(cases.IDS_NL)), built.head(params))
  with torch.no_grad():
    expected = theirs.logits(model, cases.IDS_NL).numpy()
    logps = np.array([their_logps(model, example).numpy() for example in pairs()])
  errors = abs(ours - expected).max(), abs(our_logps_fn(config)(params) - logps).max()
  for name, error in zip(("logits", "logps"), errors, strict=True):
    record_property(name, float(error))
  print(f"\n{case}: logits {errors[0]:.1e}, log-probs {errors[1]:.1e}")
  assert max(errors) < 1e-4


@CASES
def test_the_loss_after_one_step(case, folder_of):
  """The gradient, seen through what it does: one step of plain descent on the DPO loss."""
  model, _ = theirs.load(folder_of(case))
  config, params = hf_checkpoint.load(folder_of(case))
  logps_fn = our_logps_fn(config)
  reference_B2 = np.asarray(logps_fn(params)) + np.array([0.5, -0.5])
  as_pairs = lambda x_B2: losses.PairLogps(x_B2[:, 0], x_B2[:, 1])
  loss = lambda tree: losses.LOSSES["sigmoid"](
    as_pairs(logps_fn(tree)), as_pairs(reference_B2), beta=BETA
  ).mean()
  before, grads = jax.jit(jax.value_and_grad(loss))(params)
  after = loss(jax.tree.map(lambda x, g: x - RATE * g, params, grads))

  def their_loss():
    log_ratios = torch.stack([their_logps(model, e) for e in pairs()]) - torch.tensor(reference_B2)
    margins = log_ratios[:, 0] - log_ratios[:, 1]
    return -torch.nn.functional.logsigmoid(BETA * margins).mean()

  optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
  their_before = their_loss()
  their_before.backward()
  optimizer.step()
  their_after = their_loss().item()
  print(f"\n{case}: loss {before:.4f} to {after:.4f}, error {abs(after - their_after):.1e}")
  assert abs(before - after) > 1e-3  # the step did something
  np.testing.assert_allclose(before, their_before.item(), atol=1e-5)
  np.testing.assert_allclose(after, their_after, atol=1e-4)


@pytest.mark.parametrize("case", [case for case in cases.CASES if "moe" in case or "mix" in case])
def test_the_balance_over_experts(case, folder_of):
  """The term that spreads tokens is transformers' `aux_loss`, over all layers together."""
  model, _ = theirs.load(folder_of(case))
  config, params = hf_checkpoint.load(folder_of(case))
  _, routing = transformer.build(config).routed(params, whole_rows(cases.IDS_NL))
  _, sums = step._balance(routing, weight=1.0)
  with torch.no_grad():
    expected = model(torch.tensor(cases.IDS_NL), output_router_logits=True).aux_loss
  np.testing.assert_allclose(sums["router/balance"][0], expected.item(), rtol=1e-5)


@CASES
def test_bfloat16(case, folder_of):
  """Both round, in other places: log-probs of up to 11 tokens stay within what either loses."""
  config, params = hf_checkpoint.load(folder_of(case))
  exact = np.asarray(our_logps_fn(config)(params))
  narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
  ours = np.asarray(our_logps_fn(config, dtype="bfloat16")(narrow))
  model, _ = theirs.load(folder_of(case), torch.bfloat16)
  with torch.no_grad():
    expected = np.array([their_logps(model, example).numpy() for example in pairs()])
  lost = abs(expected - exact)
  print(f"\n{case}: ours loses {abs(ours - exact).max():.2f}, theirs {lost.max():.2f} nats")
  assert np.sqrt(np.mean((ours - exact) ** 2)) < 1.5 * np.sqrt(np.mean(lost**2)) + 0.05


@CASES
def test_the_way_back(case, folder_of, tmp_path, caplog):
  """An export is what it was read from: no tensor missing, none unexpected, the same numbers."""
  config, params = hf_checkpoint.load(folder_of(case))
  hf_checkpoint.save(tmp_path / "ours", config, params, source=folder_of(case))
  before, after = (load_file(f / "model.safetensors") for f in (folder_of(case), tmp_path / "ours"))
  assert set(before) == set(after)
  for name, tensor in before.items():
    assert tensor.dtype == after[name].dtype
    np.testing.assert_array_equal(tensor, after[name])
  model, said = theirs.load(tmp_path / "ours")
  assert not any(said.values()), said
  assert not [r for r in caplog.records if r.levelname == "WARNING"]
  theirs_before, _ = theirs.load(folder_of(case))
  with torch.no_grad():
    both = [theirs.logits(m, cases.IDS_NL).numpy() for m in (theirs_before, model)]
  np.testing.assert_array_equal(*both)
  architecture = lambda folder: theirs.fields(folder)["architectures"]
  assert architecture(folder_of(case)) == architecture(tmp_path / "ours")
