"""Proves that the production step reaches the optimum of each loss, known in closed form.

Every completion of a small world is listed, and every ordered pair of them is an example, weighted
by how often it occurs. So the minimum of the loss is that of infinitely much data. The path is the
one that trains large models: layout with packing and shared prompts, ragged micro-batches,
log-probs at scored tokens, step, optimizer. Deliberate mistakes take the same path and must miss
the optimum.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import derivation, logprobs, losses, step
from dpo_jax.data import collate
from dpo_jax.data.examples import Example
from dpo_jax.experiments import finite_worlds
from dpo_jax.model import transformer
from dpo_jax.model.config import ModelConfig
from dpo_jax.structs import Model
from tests.support import closed_forms
from tests.support.closed_forms import DIVERGENCES, under_divergence

BETA, FLIPPED, STEPS = 0.5, 0.2, 500
WORLD = finite_worlds.make()
TOKENS_Y = np.array([len(completion) for completion in WORLD.completions])
MODEL = finite_worlds.tabular(WORLD)
TABLE = finite_worlds.table(WORLD, seed=0)
# Computed without the production path, which is compared with it in a test below.
REFERENCE = closed_forms.walk(TABLE["table"], WORLD)
REWARD = np.random.default_rng(1).normal(0, 1, REFERENCE.shape)
BETTER = 1 / (1 + np.exp(REWARD[:, None, :] - REWARD[:, :, None]))
OPTIMUM = closed_forms.tilted(REFERENCE, REWARD / BETA)
# A distribution μ of completions in the pairs that is not the reference: half of it is uniform.
ELSEWHERE = np.log((np.exp(REFERENCE) + 1 / len(WORLD.completions)) / 2)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


# --- training -------------------------------------------------------------------------------------


@functools.cache
def program(model, name, given, completions, steps, rounds=1, peak=0.1):
  """Returns objective and optimizer; the cache makes equal arguments compile only once."""
  loss = losses.resolve(name, **dict(given))
  objective = step.Objective(
    logprobs.make_scored_fn(model, beyond_shorter=loss.ld_alpha, aligned=loss.wpo),
    loss,
    completions=completions,
    reference=step.LiveReference(step.Sync(every=steps, alpha=1.0)) if rounds > 1 else None,
  )
  return objective, finite_worlds.optimizer(steps, rounds=rounds, peak=peak)


def copy(params):
  """Copies parameters to new buffers, since a state and its reference may not share any."""
  return jax.tree.map(lambda x: jnp.array(np.asarray(x)), params)


def trained(
  examples,
  name="sigmoid",
  *,
  model=MODEL,
  start=TABLE,
  reference=None,
  steps=STEPS,
  peak=0.1,
  edit=lambda batch: batch,
  batch_fn=None,
  layout="shared",
  eval_model=None,
  **given,
):
  """Trains on `examples` and returns log π of every completion: [X, Y].

  Args:
    examples: weighted examples.
    name: name of the loss; `given` are its arguments.
    model: the model to train.
    start: initial parameters.
    reference: reference parameters, where they are not `start`.
    steps, peak: number of steps and peak learning rate.
    edit: changes the batch before training.
    batch_fn: computes the batch of every step.
    layout: layout of the rows.
    eval_model: the model that reads log π from the trained parameters, where it is not `model`.
  """
  completions = len(examples[0].completions)
  objective, tx = program(model, name, tuple(given.items()), completions, steps, peak=peak)
  batch = edit(
    finite_worlds.lay_out(examples, row_length=48 if layout == "shared" else 60, layout=layout)
  )
  state = step.init_state(copy(start), tx, objective.loss)
  # `init_state` makes them float32, and a scan needs the type that float64 updates return.
  state = state._replace(running_stats=jax.tree.map(jnp.float64, state.running_stats))
  state, metrics = finite_worlds.train(
    state,
    copy(start if reference is None else reference),
    batch,
    objective=objective,
    tx=tx,
    steps=steps,
    **({"batch_fn": batch_fn} if batch_fn else {}),
  )
  assert np.isfinite(metrics["loss"]).all()
  return finite_worlds.log_policy(eval_model or model, state.params, WORLD)


def population(preference=BETTER, mu=REFERENCE):
  """Lists every ordered pair of completions with weight μ(y_w) μ(y_l) p(y_w ≻ y_l)."""
  weight = np.exp(mu)[:, :, None] * np.exp(mu)[:, None, :] * preference
  return finite_worlds.weigh(finite_worlds.tuples(WORLD), weight)


def flipped(preference):
  """Returns the preferences after a share of the labels is flipped."""
  return (1 - FLIPPED) * preference + FLIPPED * (1 - preference)


def assert_reached(found, expected, bound=1e-8):
  """Asserts that KL(found ‖ expected) is below `bound` nats for every prompt."""
  np.testing.assert_allclose(np.exp(found).sum(-1), 1, rtol=1e-12)
  gap = closed_forms.kl(found, expected)
  assert gap.max() < bound, gap


# --- the world itself -----------------------------------------------------------------------------


def test_all_completions_are_listed_and_each_policy_sums_to_one():
  # 1 + 2 + 4 sequences of two letters, each with its end token
  assert sorted(map(tuple, WORLD.completions)) == [
    (0,),
    (1, 0),
    (1, 1, 0),
    (1, 2, 0),
    (2, 0),
    (2, 1, 0),
    (2, 2, 0),
  ]
  np.testing.assert_allclose(np.exp(REFERENCE).sum(-1), 1, rtol=1e-12)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_the_production_path_agrees_with_a_walk_through_the_table(layout):
  np.testing.assert_allclose(finite_worlds.log_policy(MODEL, TABLE, WORLD), REFERENCE, rtol=1e-12)
  examples = finite_worlds.tuples(WORLD)
  batch = collate.collate(examples, layout=layout, row_length=60)
  logps = np.asarray(jax.jit(logprobs.make_logps_fn(MODEL))(TABLE, batch)).reshape(-1, 2)
  rows = np.asarray(batch.row_NS).reshape(-1, 2)[:, 0]
  pairs = np.stack(np.broadcast_arrays(REFERENCE[:, :, None], REFERENCE[:, None, :]), -1)
  np.testing.assert_allclose(logps[rows >= 0], pairs.reshape(-1, 2)[rows[rows >= 0]], rtol=1e-12)


def test_the_optimum_equals_that_of_the_derivation():
  found = derivation.optimal_policy(REFERENCE, REWARD, beta=BETA)
  np.testing.assert_allclose(found, OPTIMUM, rtol=1e-12)


# --- DPO ------------------------------------------------------------------------------------------


def test_sigmoid_reaches_the_optimum_quickly():
  """Belongs to the default suite; the slow tests are ten thousand times as strict."""
  assert closed_forms.kl(REFERENCE, OPTIMUM).min() > 0.1
  assert_reached(trained(population(), beta=BETA, steps=150), OPTIMUM, bound=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("mu", [REFERENCE, ELSEWHERE], ids=["own", "elsewhere"])
def test_sigmoid_reaches_the_optimum_wherever_the_pairs_come_from(mu, layout):
  assert_reached(trained(population(mu=mu), beta=BETA, layout=layout), OPTIMUM)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_sigmoid_reaches_the_optimum_with_the_projects_transformer():
  """Trains the model of the commands, in its own float32; all prompts share its weights."""
  config = ModelConfig(
    family="llama", vocab=WORLD.ids, width=32, layers=2, heads=2, kv_heads=2, head_width=16,
    mlp_width=64, max_positions=16, norm="rms", norm_eps=1e-6, positions="rotary",
    activation="silu", gated=True, qkv_bias=False, out_bias=False, mlp_bias=False, tied=False,
    init_std=0.3,
  )  # fmt: skip

  def exact(log_XY):
    # In float32 probabilities sum to 1 up to 1e-7 only, which the KL would show.
    return closed_forms.normalized(log_XY.astype(np.float64))

  model = finite_worlds.with_length_limit(transformer.build(config, remat="none"), WORLD)
  start = transformer.init_params(config, seed=4)
  reference = exact(finite_worlds.log_policy(model, start, WORLD))
  mu = np.log((np.exp(reference) + 1 / len(WORLD.completions)) / 2)
  pace = {"steps": 800, "peak": 0.003}
  found = trained(population(mu=mu), model=model, start=start, beta=BETA, **pace)
  assert_reached(exact(found), closed_forms.tilted(reference, REWARD / BETA))


# --- every loss with a closed form ----------------------------------------------------------------

# Completions with one of two scores; the better score wins nine times in ten, or always.
GOOD = np.random.default_rng(2).permuted(np.tile([0.0, 0, 0, 0, 1, 1, 1], (3, 1)), axis=1)
SIDE = GOOD[:, :, None] - GOOD[:, None, :]


def with_scores():
  """Returns the preferences of `population`, each completion with its score."""
  scores = list(itertools.product(*(range(n) for n in (*BETTER.shape,))))

  def with_offsets(example):
    x, y, z = scores[example.row]
    return example._replace(scores=(OFFSET[x, y], OFFSET[x, z]))

  return [with_offsets(example) for example in population(mu=ELSEWHERE)]


OFFSET = np.round(np.random.default_rng(4).uniform(0, 2, REFERENCE.shape), 3)


def rankings():
  """Lists every order of every three completions with its Plackett-Luce probability."""
  mu, good = np.exp(REFERENCE), np.exp(REWARD)
  triples = finite_worlds.tuples(WORLD, completions=3)
  weights = np.zeros(len(triples))
  places = itertools.product(range(len(good)), itertools.product(range(good.shape[1]), repeat=3))
  for row, (x, order) in enumerate(places):
    if len(set(order)) == 3:  # three different completions
      left = good[x, list(order)]
      likely = left[0] / left.sum() * left[1] / left[1:].sum()
      weights[row] = mu[x, list(order)].prod() * likely
  return finite_worlds.weigh(triples, weights)


def texts():
  """Lists every completion with its probability under the optimum."""
  return finite_worlds.weigh(finite_worlds.tuples(WORLD, completions=1), np.exp(OPTIMUM))


def margin_of(loss, share):
  """Finds the margin m that minimizes share · loss(m) + (1 - share) · loss(-m) by grid search."""
  middle, width = 0.0, 6.0
  while width > 1e-9:
    z = np.linspace(middle - width, middle + width, 101)
    middle, width = z[(share * loss(z) + (1 - share) * loss(-z)).argmin()], width / 10
  return middle


def discopop(z):
  g = 1 / (1 + np.exp(-z))
  return np.log1p(np.exp(-z)) * (1 - g) + np.exp(-z) * g


def contrasting(chosen, rejected):
  """Lists pairs whose chosen and rejected completions are sampled independently of each other.

  Of y and y', y is then chosen with odds chosen(y) rejected(y') : chosen(y') rejected(y).
  """
  weight = normal(chosen)[:, :, None] * normal(rejected)[:, None, :]
  return finite_worlds.weigh(finite_worlds.tuples(WORLD), weight)


def normal(mass):
  """Divides by the sum, so that each prompt has a distribution."""
  return mass / mass.sum(-1, keepdims=True)


def unlearned(logit, weight, share):
  """Returns completions to keep and to forget, for which both slopes cancel at π*, and π*.

  Where a completion is forgotten as often as any other, its slope is 2 σ(logit) times `share`. It
  is kept so often that what is left is in proportion to π*, which its sum of 1 holds.
  """
  star = np.exp(OPTIMUM)
  forgotten = normal(np.ones_like(star))
  slope = 2 * forgotten * share / (1 + np.exp(-logit))
  kept = TOKENS_Y * (star + slope) / weight
  singles = finite_worlds.tuples(WORLD, completions=1)

  def labeled(label, mass):
    return [one._replace(scores=(label,)) for one in finite_worlds.weigh(singles, mass)]

  return labeled(1.0, kept) + labeled(0.0, forgotten), OPTIMUM


def golden():
  """Lists triples for tpo: the best one sampled for its likelihood, the pair independently of it.

  Likelihood per token divides by the length again; the pair prefers by β log π*.
  """
  best = normal(np.exp(OPTIMUM) * TOKENS_Y)
  lost = normal(np.exp(-BETA * OPTIMUM))
  even = normal(np.ones_like(OPTIMUM))
  weight = best[:, :, None, None] * even[:, None, :, None] * lost[:, None, None, :]
  return finite_worlds.weigh(finite_worlds.tuples(WORLD, completions=3), weight)


def classified():
  """Returns pairs for bco_pair and its optimum: rewards symmetric about δ, which is their mean.

  There log π/π_ref = (δ + a s)/β with s in {-1, 0, 1}, and a such that π sums to 1 for every
  prompt.
  """
  delta, side = -0.2, np.tile([-1.0, -1, -1, 0, 1, 1, 1], (3, 1))

  def log_ratio(a):
    return (delta + a * side) / BETA

  def excess(a):
    return np.exp(REFERENCE + log_ratio(a)).sum(-1, keepdims=True) - 1

  a = closed_forms.root(excess, 0.3, 20, (3, 1))
  share = 1 / (1 + np.exp(-a * side))  # how often a completion is the chosen one of its pair
  return contrasting(share, 1 - share), REFERENCE + log_ratio(a)


def all_cases():
  """Builds all cases: name -> (loss, arguments, examples, log-probs of the optimum)."""
  ref, tilted, s = REFERENCE, closed_forms.tilted, REWARD / BETA
  uniform = np.zeros_like(ref)
  own, away = population(), population(mu=ELSEWHERE)

  def two_scores(share):
    return population(preference=0.5 + SIDE * (share - 0.5), mu=ELSEWHERE)

  won = closed_forms.better_than_mu(REFERENCE, BETTER)
  won_away = closed_forms.better_than_mu(ELSEWHERE, BETTER)
  # Losses that add the likelihood of the chosen completion to a loss of pairs: the pairs are chosen
  # such that both terms have the same optimum.
  star, even = np.exp(OPTIMUM), np.ones_like(ref)
  by_token = star * TOKENS_Y  # a likelihood per token divides by the length again
  apart = contrasting(by_token, by_token * np.exp(BETA * (ref - OPTIMUM)))
  mean = OPTIMUM / TOKENS_Y
  odds_apart = contrasting(by_token, by_token * (1 - np.exp(mean)) / np.exp(mean))
  noisy, smooth = {"label_smoothing": FLIPPED}, {"label_smoothing": 0.1}
  odds = math.log(0.9 / 0.1)
  half = np.log(1 - 0.5 + 0.5 * star / np.exp(ref))  # bdpo's mixture, over π_ref, at π*
  # bdpo gains less from lowering y_l than from raising y_w: by the factor λ π*/π_mix. The pairs
  # make up for it, and lower those terms' sum by what the probabilities' sum of 1 holds against.
  felt = 0.5 * star / np.exp(ref) / np.exp(half)
  lost = np.full_like(ref, 1 / ref.shape[1])
  won_for = (1 - (felt * lost).sum(-1, keepdims=True)) * star + felt * lost
  z_bounded = BETA * ((OPTIMUM - ref)[:, :, None] - half[:, None, :])
  bounded = won_for[:, :, None] * lost[:, None, :] * (1 + np.exp(z_bounded))
  cases = {
    "robust": ("robust", noisy, population(flipped(BETTER)), OPTIMUM),
    "ipo": ("ipo", {}, away, tilted(ref, won_away / BETA)),
    "plackett_luce": ("plackett_luce", {}, rankings(), OPTIMUM),
    "sft": ("sft", {}, texts(), OPTIMUM),
    "wpo": ("sigmoid", {"wpo": True}, away, OPTIMUM),
    # An offset by the difference of scores adds the scores to the reward.
    "odpo": (
      "odpo", {"margin_scale": 0.7}, with_scores(), tilted(ref, (REWARD + 0.7 * OFFSET) / BETA)
    ),
    # The scores are the reward, whichever completion is called chosen, and however often.
    **{
      f"rpo {distance}": (
        "rpo", {"margin_scale": 0.7, "distance": distance}, with_scores(),
        tilted(ref, 0.7 * OFFSET / BETA),
      )
      for distance in ("squared", "backward_kl", "forward_kl")
    },
    "bdpo": (
      "bdpo", {}, finite_worlds.weigh(finite_worlds.tuples(WORLD), bounded), OPTIMUM
    ),
    "alpha_po": (
      "alpha_po", {"gamma": 0.0, "reward_alpha": 0.5}, away,
      closed_forms.reshaped(s, TOKENS_Y, 0.5),
    ),
    "npo": ("npo", {"retain_weight": 0.5}, *unlearned(BETA * (OPTIMUM - ref), 0.5, even)),
    "simnpo": (
      "simnpo", {"gamma": 0.3}, *unlearned(BETA * OPTIMUM / TOKENS_Y + 0.3, 1.0, even / TOKENS_Y)
    ),
    "tpo": ("tpo", {}, golden(), OPTIMUM),
    "chi_po": ("chi_po", {}, away, under_divergence(ref, s, DIVERGENCES["chi_po"])),
    # Labels without error between two scores: the margin stays finite.
    "cdpo": ("cdpo", smooth, two_scores(1.0), tilted(ref, GOOD * odds / BETA)),
    "exo_pair": ("exo_pair", smooth, two_scores(0.9), tilted(ref, GOOD * 0.8 * odds / BETA)),
    "hinge": ("hinge", {}, two_scores(0.9), tilted(ref, GOOD / BETA)),
    "discopop": (
      "discopop", {"tau": 1.0}, two_scores(0.9),
      tilted(ref, GOOD * margin_of(discopop, 0.9) / BETA),
    ),
    # Completions sampled from the reference, β = 1: the optimum is twice π_ref times the win rate.
    "nca_pair": ("nca_pair", {"beta": 1.0}, own, ref + np.log(2 * won)),
    "sppo_hard": ("sppo_hard", {}, own, closed_forms.regressed(ref, (won - 0.5) / BETA)),
    "sigmoid_norm": ("sigmoid_norm", {}, away, closed_forms.averaged(ref, s, TOKENS_Y)),
    "ipo_mean": ("ipo_mean", {}, away, closed_forms.averaged(ref, won_away / BETA, TOKENS_Y)),
    "simpo": ("simpo", {"gamma": 0.0}, away, closed_forms.averaged(uniform, s, TOKENS_Y)),
    "reference_free": ("sigmoid", {"reference_free": True}, away, tilted(uniform, s)),
    "cpo": ("cpo", {"beta": 1.0}, contrasting(star, even), OPTIMUM),
    "orpo": ("orpo", {}, odds_apart, OPTIMUM),
    "sft_weight": ("sigmoid", {"sft_weight": 0.5}, apart, OPTIMUM),
    "sum": ("0.7*sigmoid + 0.3*sft", {"beta": BETA}, apart, OPTIMUM),
    "bco_pair": ("bco_pair", {}, *classified()),
  }  # fmt: skip
  for link in ("forward_kl", "jensen_shannon", "alpha"):
    given = {"link": link} | ({"link_alpha": 0.4} if link == "alpha" else {})
    cases[link] = (
      "sigmoid",
      given,
      away,
      under_divergence(ref, s, DIVERGENCES[link]),
    )
  return cases


CASES = all_cases()


# Losses whose minimum over a population has no closed form, or lies at probabilities of 0 or 1.
WITHOUT_CLOSED_FORM = {
  "apo_zero": "linear in σ(βc): a completion is pulled all the way up or down",
  "kto": "linear in σ(β(a - z0)): the same",
  "apo_down": "the optima of its two sigmoids differ",
  "dpop": "the penalty is on the chosen completion alone, so margins do not add up",
  "aot": "reads sorted quantities, not pairs",
  "aot_unpaired": "reads sorted quantities, not pairs",
}


def test_every_loss_has_its_optimum_here_or_a_reason():
  proven = {"sigmoid", "policy_gradient"} | {name for name, *_ in CASES.values()}
  assert not proven & WITHOUT_CLOSED_FORM.keys()
  for name in losses.LOSSES.keys() - proven - WITHOUT_CLOSED_FORM.keys():
    pytest.fail(
      f"loss {name} is not trained to its optimum; add to all_cases() in {__file__}:"
      f' "{name}": ("{name}", {{}}, away, LOG_PROBS_OF_THE_OPTIMUM), or to WITHOUT_CLOSED_FORM the'
      " reason why there is none"
    )


def given_of(name, given):
  """Adds β to the arguments of a loss that has a β."""
  reads_beta = name in losses.LOSSES and "beta" in losses.arguments(name)
  return ({"beta": BETA} if reads_beta else {}) | given


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("case", CASES)
def test_each_loss_reaches_its_own_optimum(case):
  name, given, examples, expected = CASES[case]
  assert closed_forms.kl(REFERENCE, expected).min() > 1e-3  # training has a distance to cover
  # The hinge has kinks, around which training oscillates until the learning rate is small.
  steps = 4 * STEPS if name == "hinge" else STEPS
  assert_reached(trained(examples, name, steps=steps, **given_of(name, given)), expected)


# --- planted mistakes -----------------------------------------------------------------------------


def heads(batch):
  """Marks the first scored token of every completion, whose input is the prompt's last token."""
  return (batch.branch_NL > 0) & (batch.ids_NL > WORLD.letters)


def without_the_first_token(batch):
  return batch._replace(weight_NL=np.where(heads(batch), 0, batch.weight_NL).astype(np.float32))


def without_the_end_token(batch):
  """Drops the end token, like a mask made from ids where the padding token is the end token."""
  scored = batch.weight_NL * (batch.target_NL != finite_worlds.END)
  return batch._replace(weight_NL=scored.astype(np.float32))


def after_the_chosen():
  """Predicts the first rejected token at the chosen completion's end, as in a plain long row."""
  inner = finite_worlds.unlimited_tabular(WORLD)

  def hidden(params, batch):
    scored = jnp.where(batch.branch_NL == 1, 1, 0)
    same = batch.pair_NL[:, :, None] == batch.pair_NL[:, None, :]
    tokens_NL = jnp.where(same, scored[:, None, :], 0).sum(-1)  # in the chosen completion
    wrong_NL = (batch.branch_NL == 2) & (batch.ids_NL > WORLD.letters)
    moved = batch._replace(
      ids_NL=jnp.where(wrong_NL, finite_worlds.END, batch.ids_NL),
      branch_NL=jnp.where(wrong_NL, 1, batch.branch_NL),
      position_NL=batch.position_NL + jnp.where(wrong_NL, tokens_NL, 0),
    )
    wrong_NLV, right_NLV = inner.hidden(params, moved), inner.hidden(params, batch)
    return jnp.where(wrong_NL[..., None], wrong_NLV, right_NLV)

  return finite_worlds.with_length_limit(Model(hidden, inner.head, inner.vocab), WORLD)


MISTAKES = {
  "none": {},
  "mean for sum": {"name": "sigmoid_norm"},
  "no reference": {"reference_free": True},
  "another reference": {"reference": finite_worlds.table(WORLD, seed=7)},
  "first completion token dropped": {"edit": without_the_first_token},
  "end token dropped": {"edit": without_the_end_token},
  "first rejected token predicted after the chosen completion": {
    "model": after_the_chosen(),
    "eval_model": MODEL,
  },
  "cdpo for robust, on flipped labels": {"name": "cdpo", "label_smoothing": FLIPPED},
  "flipped labels treated as true": {"flipped": True},
}


def mistaken(mistake):
  """Trains with a mistake and returns KL(π ‖ π*) per prompt."""
  settings = dict(MISTAKES[mistake])
  noisy = settings.pop("flipped", False) or settings.get("name") == "cdpo"
  found = trained(population(flipped(BETTER) if noisy else BETTER), beta=BETA, **settings)
  return closed_forms.kl(found, OPTIMUM)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_misses_the_optimum(mistake):
  gap = mistaken(mistake).max()
  assert (gap < 1e-8) if mistake == "none" else (gap > 1e-3), gap


# --- the assumed objective itself -----------------------------------------------------------------


def follow(params, batch):
  """Weights each pair of the batch by the probability that the policy samples both completions.

  The weights get no gradient, just as sampling has none.
  """
  logps_ANS = jax.lax.map(functools.partial(logprobs.make_logps_fn(MODEL), params), batch)
  both = jnp.exp(logps_ANS.reshape(*logps_ANS.shape[:2], -1, 2).sum(-1))
  weight_ANS = jnp.repeat(both, 2, axis=-1) * (batch.weight_NS > 0)
  return batch._replace(weight_NS=jax.lax.stop_gradient(weight_ANS))


def scored_pairs():
  """Lists every pair of completions with their rewards."""
  places = itertools.product(*(range(n) for n in BETTER.shape))
  return [
    example._replace(scores=(REWARD[x, y], REWARD[x, z]))
    for example, (x, y, z) in zip(finite_worlds.tuples(WORLD), places, strict=True)
  ]


DOWNHILL = optax.sgd(1.0)


def expected_gradient(table):
  """Returns the expectation of policy_gradient's gradient, from one production step of size 1."""
  params, tx = {"table": jnp.asarray(table)}, DOWNHILL
  objective, _ = program(MODEL, "policy_gradient", (("beta", BETA),), 2, STEPS)
  state, _ = finite_worlds.train(
    step.init_state(params, tx), copy(TABLE), finite_worlds.lay_out(scored_pairs()),
    objective=objective, tx=tx, steps=1, batch_fn=follow,
  )  # fmt: skip
  return np.asarray(params["table"] - state.params["table"])


def test_the_expected_policy_gradient_is_that_of_the_assumed_objective():
  table = finite_worlds.table(WORLD, seed=5)["table"]
  texts = [Example(x, (y,)) for x in WORLD.prompts for y in WORLD.completions]
  batch = collate.collate(texts, layout="padded", row_length=8)

  def assumed(table):
    log_XY = logprobs.make_logps_fn(MODEL)({"table": table}, batch)[: len(texts)]
    return derivation.assumed_objective(
      log_XY.reshape(REFERENCE.shape), REFERENCE, REWARD, beta=BETA
    )

  expected = np.asarray(jax.jit(jax.grad(assumed))(table))
  found = expected_gradient(table)
  # Scores are stored in float32.
  np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())
  assert np.abs(expected).max() > 0.01
  optimal = closed_forms.unwalk(OPTIMUM, WORLD, table)
  np.testing.assert_allclose(closed_forms.walk(optimal, WORLD), OPTIMUM, rtol=1e-10)
  assert np.abs(expected_gradient(optimal)).max() < 1e-7


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_policy_gradient_reaches_the_optimum():
  found = trained(scored_pairs(), "policy_gradient", batch_fn=follow, steps=3 * STEPS, beta=BETA)
  assert_reached(found, OPTIMUM)


# --- a reference that follows ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_every_hard_sync_moves_on_by_the_whole_reward():
  """Checks TR-DPO: after j rounds the policy is π_ref exp(j r/β)/Z, ever further from the first."""
  objective, tx = program(MODEL, "sigmoid", (("beta", BETA),), 2, STEPS, rounds=3)
  batch, distance = finite_worlds.lay_out(population(mu=ELSEWHERE)), []
  state = step.init_state(copy(TABLE), tx, objective.loss)._replace(reference=copy(TABLE))
  for j in (1, 2, 3):
    state, _ = finite_worlds.train(state, None, batch, objective=objective, tx=tx, steps=STEPS)
    found = finite_worlds.log_policy(MODEL, state.params, WORLD)
    assert_reached(found, closed_forms.tilted(REFERENCE, j * REWARD / BETA))
    distance.append(closed_forms.kl(found, REFERENCE).mean())
  assert distance[0] < distance[1] < distance[2], distance


# --- finite samples -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_gap_falls_as_one_over_the_number_of_pairs(beta):
  """Checks slope -1 on log axes, and the height that the Fisher information of a pair predicts."""
  found = finite_worlds.finite_samples((2000, 16000, 128000), beta=beta, samples=16)
  assert found.slope_SzRs.max() < 1e-6  # each minimum was found
  gap_N = found.gap_SzRs.mean(axis=1)
  slope = np.polyfit(np.log(found.sizes), np.log(gap_N), 1)[0]
  assert -1.1 < slope < -0.9, slope
  ratio = (gap_N * np.array(found.sizes)).mean() / found.expected
  assert 0.8 < ratio < 1.25, ratio
