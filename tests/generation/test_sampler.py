"""Generation follows the distribution of the full forward pass, whatever else is sampled."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dpo_jax.generation import decoding, sampler
from dpo_jax.hf import checkpoint as hf_checkpoint
from dpo_jax.logprobs import logits
from dpo_jax.model import families, kv_cache, transformer
from dpo_jax.structs import TokenBatch, UserError

SHAPE = {
  "model_type": "llama",
  "vocab_size": 5,
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 24,
  "initializer_range": 0.25,
  "tie_word_embeddings": True,
}
LLAMA = families.from_hf(SHAPE)
# A text longer than what its layers see.
WINDOWED = families.from_hf(SHAPE | {"model_type": "mistral", "sliding_window": 3})
GPT2 = families.from_hf(
  {
    "model_type": "gpt2",
    "vocab_size": 5,
    "n_embd": 16,
    "n_head": 2,
    "n_layer": 2,
    "n_positions": 32,
    "initializer_range": 0.25,
  }
)
PROMPTS = [[1], [2, 3, 4], [0] * 7, [4, 4], [1, 2, 3, 4, 0, 1, 2, 3], [3, 1, 2]]


@functools.cache
def params_of(config):
  return transformer.init_params(config, 0)


@functools.cache
def forward(config):
  """Returns a function (params, ids_NL) -> logits_NLV of complete texts, by the training path."""
  model = transformer.build(config)

  def run(params, ids_NL):
    zeros = jnp.zeros_like(ids_NL)
    batch = TokenBatch(ids_NL, zeros + jnp.arange(ids_NL.shape[1]), zeros, *[zeros] * 8)
    return logits(model.hidden(params, batch), model.head(params))

  return jax.jit(run)


def whole_logits(config, ids_L):
  """Returns the logits [L, V] of one text of at most 8 tokens."""
  ids_NL = np.array([[*ids_L] + [0] * (8 - len(ids_L))], np.int32)
  return np.asarray(forward(config)(params_of(config), ids_NL))[0, : len(ids_L)]


def softmax(x):
  return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


@pytest.mark.parametrize("config", [LLAMA, GPT2, WINDOWED], ids=["llama", "gpt2", "windowed"])
def test_a_token_at_a_time_gives_the_logits_of_the_whole_text(config):
  params, texts, columns = params_of(config), [[1, 2, 3, 4, 0, 2], [4, 1, 0]], 9
  lengths_N, longest = np.array([4, 1]), 5  # of the prompts within these texts
  ids_NL = np.array([[0, 1, 2, 3, 4], [0, 0, 0, 0, 4]], np.int32)
  head = transformer.head(config, params)
  hidden_ND, cache = jax.jit(functools.partial(kv_cache.prefill, config, columns=columns))(
    params, ids_NL, lengths_N
  )
  decode = jax.jit(functools.partial(kv_cache.decode, config))
  assert cache.tokens.pair_NL.tolist() == [[-1] + [0] * 4 + [-1] * 4, [-1] * 4 + [0] + [-1] * 4]
  for step in range(3):
    found = logits(hidden_ND, head)
    for row, (text, length) in enumerate(zip(texts, lengths_N, strict=True)):
      expected = whole_logits(config, text)[length - 1 + step]
      np.testing.assert_allclose(found[row], expected, atol=1e-5)
    if step < 2:
      at_N = lengths_N + step
      token_N = np.array([text[at] for text, at in zip(texts, at_N, strict=True)])
      hidden_ND, cache = decode(params, cache, token_N, at_N)
  assert int(cache.filled) == longest + 2


@pytest.mark.slow
def test_greedy_text_of_stories260k(shared_data):
  folder = shared_data / "models" / "stories260k"
  config, params = hf_checkpoint.load(folder)
  items = json.loads((folder / "reference_outputs.json").read_text())["items"]
  prompts = [item["input_ids"] for item in items]
  found = sampler.generate(
    config, params, prompts, max_tokens=24, temperature=0, eos_ids=config.eos_ids
  )
  assert found == [[item["greedy24_ids"]] for item in items]


@pytest.mark.slow
def test_a_sample_is_a_function_of_seed_prompt_index_and_sample_index():
  params = params_of(LLAMA)

  def sample(prompts, **more):
    return sampler.generate(LLAMA, params, prompts, max_tokens=12, eos_ids=(0,), seed=3, **more)

  together = sample(PROMPTS, num=5)
  assert sample(PROMPTS, num=5) == together
  assert sample(PROMPTS, num=5, batch_size=3) == together
  assert sample(PROMPTS[:2], num=5, batch_size=16) == together[:2]
  # Other prompts at the other indices: the last is unmoved.
  assert sample([[2], [2], [2], [2], [2], PROMPTS[5]], num=5)[5] == together[5]
  assert sample(PROMPTS[::-1], num=5)[0] != together[5]
  # A prompt of another length, read in a batch of its own.
  assert sample([*PROMPTS[:5], PROMPTS[5], [1] * 9], num=5)[:6] == together
  other = sampler.generate(LLAMA, params, PROMPTS, max_tokens=12, eos_ids=(0,), seed=4, num=5)
  assert other != together
  # The samples of a prompt differ among themselves, and so do equal prompts.
  same = sampler.generate(LLAMA, params, [[1]] * 6, max_tokens=12, num=5)
  assert len({tuple(answer) for completions in same for answer in completions}) > 25


def test_every_bit_of_a_large_seed_counts():
  params = params_of(GPT2)
  small, large, other = (
    sampler.generate(GPT2, params, [[1]] * 8, max_tokens=4, temperature=9.0, seed=seed)
    for seed in (7, 7 + 2**40, 7 + 2**63)
  )
  assert small != large != other != small
  batch = decoding.Batch(None, None, np.arange(2), np.arange(3))
  keys = decoding._keys(np.array([0, 7], np.uint32), batch)
  by_hand = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 1), 2)
  assert (jax.random.key_data(keys[5]) == jax.random.key_data(by_hand)).all()


def test_an_answer_ends_with_its_end_token():
  params = params_of(LLAMA)
  endless = sampler.generate(LLAMA, params, PROMPTS, max_tokens=15, seed=1, num=8)
  assert {len(answer) for completions in endless for answer in completions} == {15}
  ended = sampler.generate(LLAMA, params, PROMPTS, max_tokens=15, seed=1, num=8, eos_ids=(0, 3))
  cut = [
    [
      answer[: next((i + 1 for i, token in enumerate(answer) if token in (0, 3)), 15)]
      for answer in completions
    ]
    for completions in endless
  ]
  assert ended == cut
  assert any(
    answer[-1] in (0, 3) and len(answer) < 15 for completions in ended for answer in completions
  )


@pytest.mark.parametrize(
  ("knobs", "kept"),
  [
    ({}, 5),
    ({"temperature": 0.6}, 5),
    ({"temperature": 1.5, "top_k": 3}, 3),
    ({"top_k": 4, "top_p": 0.9}, None),
    ({"temperature": 0.7, "min_p": 0.3, "top_p": 0.95}, None),
  ],
)
def test_samples_follow_the_distribution(knobs, kept):
  params, prompt, draws = params_of(LLAMA), [1, 2], 6000
  found = sampler.generate(LLAMA, params, [prompt], max_tokens=2, num=draws, seed=5, **knobs)[0]

  def distribution(ids):
    probs_V = softmax(whole_logits(LLAMA, ids)[-1] / knobs.get("temperature", 1.0))
    order = np.argsort(-probs_V)[: knobs.get("top_k") or 5]
    inside = probs_V[order] / probs_V[order].sum()
    order = order[np.cumsum(inside) - inside < knobs.get("top_p", 1.0)]
    order = order[probs_V[order] >= knobs.get("min_p", 0.0) * probs_V.max()]
    assert kept is None or len(order) == kept
    left_V = np.zeros(5)
    left_V[order] = probs_V[order]
    return left_V / left_V.sum()

  first_V = distribution(prompt)
  expected_VV = np.array([first_V[a] * distribution([*prompt, a]) for a in range(5)]) * draws
  counts_VV = np.zeros((5, 5))
  np.add.at(counts_VV, tuple(np.array(found).T), 1)
  assert counts_VV[expected_VV == 0].sum() == 0
  # Chi-square: mean of its degrees of freedom, variance of twice them; rare pairs counted as one.
  often = expected_VV > 5
  expected, counts = ([*x[often], x[~often].sum() + 1e-9] for x in (expected_VV, counts_VV))
  degrees = often.sum()
  surprise = ((np.array(counts) - expected) ** 2 / expected).sum()
  assert surprise < degrees + 4 * np.sqrt(2 * degrees)


def test_what_is_kept_by_hand():
  probs_V = np.array([0.1, 0.4, 0.2, 0.3])

  def kept(k, p):
    logits_RV = np.log(probs_V)[None]
    return np.isfinite(decoding._apply_top_k_top_p(logits_RV, np.array(k), np.array(p)))[0]

  assert kept(0, 1.0).tolist() == [True] * 4
  assert kept(2, 1.0).tolist() == [False, True, False, True]
  assert kept(0, 0.65).tolist() == [False, True, False, True]  # 0.4 + 0.3 reach 0.65
  assert kept(0, 0.75).tolist() == [False, True, True, True]
  assert kept(0, 0.01).tolist() == [False, True, False, False]
  # Of the two likeliest, 0.4 / 0.7 = 0.57 falls short of 0.6 and the second is needed.
  assert kept(2, 0.6).tolist() == [False, True, False, True]
  assert kept(2, 0.5).tolist() == [False, True, False, False]
  assert kept(9, 1.0).tolist() == [True] * 4


def test_what_is_near_the_likeliest_by_hand():
  probs_V = np.array([0.1, 0.4, 0.2, 0.3])

  def near(p, logits_V):
    return np.isfinite(decoding._apply_min_p(logits_V[None], np.array(p)))[0]

  def kept(p):
    return near(p, np.log(probs_V))

  assert kept(0.0).tolist() == [True] * 4
  assert kept(0.2).tolist() == [True] * 4  # 0.2 times 0.4 is 0.08
  assert kept(0.4).tolist() == [False, True, True, True]  # 0.16
  assert kept(0.7).tolist() == [False, True, False, True]  # 0.28
  assert kept(1.0).tolist() == [False, True, False, False]
  # What ranks have left out stays out, and shares among the rest are what they were.
  left_V = np.where(probs_V > 0.15, np.log(probs_V), -np.inf)
  assert near(0.0, left_V).tolist() == [False, True, True, True]
  assert near(0.7, left_V).tolist() == [False, True, False, True]


@pytest.mark.slow
def test_a_cache_that_grows_changes_nothing(monkeypatch):

  def sample():
    params = params_of(GPT2)
    return sampler.generate(GPT2, params, [[1], [2, 3]], max_tokens=10, eos_ids=(0,), num=9, seed=2)

  at_once = sample()
  assert list(sampler._growth(21)) == [20] and list(sampler._growth(1)) == []
  monkeypatch.setattr(sampler, "FIRST_TOKENS", 3)
  assert list(sampler._growth(10)) == [2, 3, 4]
  assert sample() == at_once
  lengths = {len(answer) for completions in at_once for answer in completions}
  assert min(lengths) < 3 and max(lengths) == 10


def test_an_answer_ends_where_it_is_said_to(monkeypatch):
  monkeypatch.setattr(sampler, "FIRST_TOKENS", 4)
  settings = {"max_tokens": 8, "seed": 1, "num": 8, "eos_ids": (0,), "width": 8}

  def ends(ids):  # at two equal tokens in a row
    return next((i + 2 for i in range(len(ids) - 1) if ids[i] == ids[i + 1]), None)

  whole = sampler.generate(LLAMA, params_of(LLAMA), PROMPTS, **settings)
  found = sampler.generate(LLAMA, params_of(LLAMA), PROMPTS, stop_fn=ends, **settings)
  assert found == [[answer[: ends(answer)] for answer in completions] for completions in whole]
  assert found != whole


@pytest.mark.parametrize("divided", [False, True], ids=["copies", "divided"])
def test_devices_share_the_rows(divided):
  mesh = jax.make_mesh((4, 2), ("data", "other"), (AxisType.Auto,) * 2)

  def place(x):
    spec = PartitionSpec(None, "other") if divided and x.ndim == 3 else PartitionSpec()
    return jax.device_put(x, NamedSharding(mesh, spec))

  settings = {"max_tokens": 6, "eos_ids": (0,), "num": 2, "seed": 3, "width": 8}
  prompts = PROMPTS + [[i % 5, 2] for i in range(5)]  # 11, which 8 does not divide
  alone = sampler.generate(LLAMA, params_of(LLAMA), prompts, **settings)
  placed = jax.tree.map(place, params_of(LLAMA))
  assert sampler.generate(LLAMA, placed, prompts, batch_size=20, **settings) == alone


def test_temperature_near_zero_is_greedy():
  params = params_of(GPT2)
  cold, greedy = (
    sampler.generate(GPT2, params, PROMPTS, max_tokens=10, temperature=t) for t in (1e-4, 0)
  )
  assert cold == greedy


def test_few_shapes_and_every_sample_once():
  lengths = [*range(1, 40), 200, 513]
  prompts = [[1] * length for length in lengths]
  for num, size in ((1, 16), (3, 16), (40, 16)):
    seen = []
    for batch in sampler._batches(prompts, num, size):
      seen += itertools.product(batch.prompt_N[batch.prompt_N >= 0], batch.sample_K)
      assert batch.ids_NL.shape[0] * len(batch.sample_K) <= size
      for row, prompt in enumerate(batch.prompt_N):
        length = lengths[prompt] if prompt >= 0 else 1
        assert batch.lengths_N[row] == length
        assert (batch.ids_NL[row] != 0).sum() == (length if prompt >= 0 else 0)
    wanted = set(itertools.product(range(len(prompts)), range(num)))
    assert wanted <= set(seen) and len(seen) == len(set(seen))
  widths = {sampler._round_up(length) for length in range(1, 2049)}
  assert len(widths) <= 20 and all(sampler._round_up(length) >= length for length in lengths)


@pytest.mark.parametrize(
  ("prompts", "change", "message"),
  [
    ([[]], {}, "prompt 0 has no tokens"),
    ([[1], [5]], {}, "prompt 1 contains an id outside the model's vocabulary of 5"),
    ([[1] * 30], {}, "prompt 0 has 30 tokens; with max_tokens 4 that exceeds .* 32 positions"),
    ([[1]], {"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
    ([[1]], {"num": 0}, "num is 0; it must be at least 1"),
    ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
    ([[1]], {"temperature": float("nan")}, "temperature is nan"),
    ([[1]], {"temperature": float("inf")}, "temperature is inf"),
    ([[1]], {"top_p": float("nan")}, "top_p is nan"),
    ([[1]], {"seed": 2**64}, "seed is 18446744073709551616; it must be 0 or more and below"),
    ([[1]], {"top_k": -1}, "top_k is -1"),
    ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
    ([[1]], {"min_p": 1.1}, "min_p is 1.1; it must lie between 0"),
    ([[1]], {"min_p": float("nan")}, "min_p is nan"),
  ],
)
def test_what_cannot_be_sampled_is_refused(prompts, change, message):
  with pytest.raises(UserError, match=message):
    sampler.generate(GPT2, params_of(GPT2), prompts, **{"max_tokens": 4} | change)


def test_no_prompts_give_no_answers():
  assert sampler.generate(LLAMA, params_of(LLAMA), [], max_tokens=3) == []


def test_bfloat16_generates_and_wide_models_need_no_more_positions_than_they_have():
  config = dataclasses.replace(GPT2, max_positions=9)
  params = jax.tree.map(lambda x: x.astype("bfloat16"), params_of(config))
  (completions,) = sampler.generate(config, params, [[1, 2]], max_tokens=7, num=3, dtype="bfloat16")
  assert [len(answer) for answer in completions] == [7] * 3
  assert all(0 <= token < 5 for answer in completions for token in answer)
