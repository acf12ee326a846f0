"""Worlds so small that every answer can be listed: what training should end at is then known.

Texts are letters 1, 2, ... and the end token 0; prompts have ids of their own behind the letters.
An answer is any row of letters with an end token, of at most `longest` tokens: one that has reached
that length can only end, so the probabilities of the listed answers sum to 1 under any policy.

X lists prompts, Y answers, E examples, C texts of visible tokens, V ids that are scored.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax import logprobs, losses, step
from dpo_jax.data import collate
from dpo_jax.data.examples import Example
from dpo_jax.structs import Array, Head, Model, PyTree, TokenBatch
from dpo_jax.training.optimizer import make_optimizer, make_schedule

END = 0
# Far below any logit a policy learns: exp of it is 0 in either precision.
NEVER = -1e9


class World(NamedTuple):
  """Prompts and all their answers.

  Attributes:
    letters: how many letters there are.
    longest: tokens of the longest answers, the end token included.
    prompts: X arrays of ids.
    completions: Y arrays of ids, the same answers to every prompt.
  """

  letters: int
  longest: int
  prompts: tuple[np.ndarray, ...]
  completions: tuple[np.ndarray, ...]

  @property
  def vocab(self) -> int:
    """Ids that are scored: the end token and the letters."""
    return self.letters + 1

  @property
  def ids(self) -> int:
    """Ids there are: those of answers and two of prompts."""
    return self.letters + 3


def make(*, prompts: int = 3, letters: int = 2, longest: int = 3) -> World:
  """A world of that many prompts, of one or two tokens each, and letters^0 + ... answers."""
  texts = [t for n in range(longest) for t in itertools.product(range(1, letters + 1), repeat=n)]
  own = range(letters + 1, letters + 3)
  asked = [t for n in (1, 2) for t in itertools.product(own, repeat=n)]
  if not 1 <= prompts <= len(asked):
    raise ValueError(f"{prompts} prompts; there are 1 to {len(asked)}")
  # The longest and the shortest in turn, so that few prompts are ragged already.
  asked = [t for pair in zip(asked[::-1], asked, strict=True) for t in pair][:prompts]
  array = lambda text: np.array(text, np.int32)
  return World(
    letters, longest, tuple(map(array, asked)), tuple(array((*text, END)) for text in texts)
  )


# --- policies -------------------------------------------------------------------------------------


def _visible(batch: TokenBatch) -> Array:
  """Which tokens each token may see, by the rule of `TokenBatch`: bool [N, L, L]."""
  pair, position, branch = batch.pair_NL, batch.position_NL, batch.branch_NL
  same = pair[:, :, None] == pair[:, None, :]
  past = position[:, :, None] >= position[:, None, :]
  mine = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
  return same & past & mine


def ending(model: Model, world: World) -> Model:
  """The same policy where an answer of the greatest length is sure to end."""

  def hidden(params: PyTree, batch: TokenBatch) -> Array:
    hidden_NLD = model.hidden(params, batch)
    letter_NL = (batch.ids_NL >= 1) & (batch.ids_NL <= world.letters)
    letters_NL = jnp.where(_visible(batch), letter_NL[:, None, :], False).sum(-1)
    full_NL1 = (letters_NL >= world.longest - 1)[..., None]
    return jnp.concatenate([hidden_NLD, full_NL1.astype(hidden_NLD.dtype)], axis=-1)

  def head(params: PyTree) -> Head:
    inner = model.head(params)
    kernel_VD = inner.kernel_VD[: world.vocab]
    bias_V = None if inner.bias_V is None else inner.bias_V[: world.vocab]
    never_V1 = jnp.where(jnp.arange(world.vocab) == END, 0.0, NEVER)[:, None]
    kernel_VD = jnp.concatenate([kernel_VD, never_V1.astype(kernel_VD.dtype)], axis=-1)
    return Head(kernel_VD, bias_V, inner.soft_cap)

  return Model(hidden, head, world.vocab)


def any_length(world: World) -> Model:
  """A row of logits for every text of visible tokens: {"table": [C, V]}.

  The row is computed from the tokens that the mask lets be seen, at their positions, so a layout
  that shows the wrong ones shows in it.
  """

  def hidden(params: PyTree, batch: TokenBatch) -> Array:
    place_NL = (batch.ids_NL + 1) * (world.ids + 1) ** batch.position_NL
    text_NL = jnp.where(_visible(batch), place_NL[:, None, :], 0).sum(-1)
    return jnp.asarray(params["table"])[text_NL]

  identity = lambda params: Head(jnp.eye(world.vocab, dtype=params["table"].dtype))
  return Model(hidden, identity, world.vocab)


def tabular(world: World) -> Model:
  """`any_length` with answers that end in time: any distribution over them is one of its points."""
  return ending(any_length(world), world)


def table(world: World, seed: int, scale: float = 0.7) -> dict[str, np.ndarray]:
  """Random parameters of `tabular`, float64."""
  texts = (world.ids + 1) ** (max(map(len, world.prompts)) + world.longest)
  return {"table": np.random.default_rng(seed).normal(0, scale, (texts, world.vocab))}


def log_policy(model: Model, params: PyTree, world: World) -> np.ndarray:
  """log π(y|x) of every answer by the production path, each text in a row of its own: [X, Y]."""
  texts = [Example(prompt, (answer,)) for prompt in world.prompts for answer in world.completions]
  length = collate.fit_row_length(texts, "padded")
  batch = collate.collate(texts, layout="padded", row_length=length)
  logps_NS = _compiled(model)(params, batch)
  used = np.asarray(batch.weight_NS).reshape(-1) > 0
  return np.asarray(logps_NS).reshape(-1)[used].reshape(len(world.prompts), -1)


@functools.cache
def _compiled(model: Model) -> logprobs.LogpsFn:
  return jax.jit(logprobs.make_logps_fn(model))


# --- data -----------------------------------------------------------------------------------------


def tuples(world: World, completions: int = 2) -> list[Example]:
  """Every row of K answers to every prompt, in the order of an array [X, Y, ..., Y]; weight 1."""
  lists = itertools.product(world.prompts, itertools.product(world.completions, repeat=completions))
  return [Example(prompt, texts, 1.0, row) for row, (prompt, texts) in enumerate(lists)]


def weigh(examples: list[Example], weight_XY: np.ndarray) -> list[Example]:
  """The examples of `tuples` that have a weight, each with it."""
  weights = np.asarray(weight_XY).reshape(-1)
  return [
    example._replace(weight=float(weight))
    for example, weight in zip(examples, weights, strict=True)
    if weight > 0
  ]


def bradley_terry(reward_XY: np.ndarray) -> np.ndarray:
  """p(y ≻ y'|x) = σ(r - r'): [X, Y, Y']."""
  return 1 / (1 + np.exp(reward_XY[:, None, :] - reward_XY[:, :, None]))


def pair_weights(log_mu_XY: np.ndarray, preference_XYY: np.ndarray) -> np.ndarray:
  """Population preferences: how often y is preferred to y' when both are drawn from μ; sums to X/2.

  An answer compared with itself is preferred half the time, as `preference_XYY` should say.
  """
  mu_XY = np.exp(log_mu_XY)
  return mu_XY[:, :, None] * mu_XY[:, None, :] * preference_XYY


def micro_batches(examples: list[Example], count: int = 2, seed: int = 0) -> list[list[Example]]:
  """The examples shuffled, in `count` micro-batches of different sizes."""
  order = np.random.default_rng(seed).permutation(len(examples))
  edges = [len(order) * (i + 1) * (i + 2) // (count * (count + 1)) for i in range(count)]
  return [[examples[i] for i in part] for part in np.split(order, edges[:-1])]


def lay_out(examples: list[Example], *, row_length: int = 48, **options) -> TokenBatch:
  """All examples as one batch of two ragged micro-batches, packed behind shared prompts."""
  return collate.collate_many(micro_batches(examples), row_length=row_length, **options)


def reweigh(batch: TokenBatch, weight_E: Array) -> TokenBatch:
  """The batch with weights by row of data; may be traced."""
  weight_NS = jnp.where(batch.row_NS >= 0, jnp.asarray(weight_E)[batch.row_NS], 0.0)
  return batch._replace(weight_NS=weight_NS)


# --- training -------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("objective", "tx", "steps", "before"))
def train(
  state: step.TrainState,
  reference: PyTree | None,
  batch: TokenBatch,
  *,
  objective: step.Objective,
  tx: optax.GradientTransformation,
  steps: int,
  before: Callable[[PyTree, TokenBatch], TokenBatch] = lambda params, batch: batch,
) -> tuple[step.TrainState, dict[str, Array]]:
  """`steps` production steps, each on the same whole batch, compiled as one loop.

  Args:
    state: where training starts.
    reference: frozen parameters.
    batch: micro-batches.
    objective, tx: as in `step.train_step`.
    steps: how many.
    before: the batch of a step, from the policy as it is: samples that follow it.

  Returns:
    The last state, and every metric of every step.
  """

  def one(state: step.TrainState, _: None):
    now = before(state.params, batch)
    state, metrics = step.train_step(state, reference, now, objective=objective, tx=tx)
    return state, {key: value for key, value in metrics.items() if value.ndim == 0}

  return jax.lax.scan(one, state, length=steps)


def optimizer(steps: int, *, peak: float = 0.1, rounds: int = 1) -> optax.GradientTransformation:
  """The production optimiser for `train`: a cosine to zero, as often as there are rounds."""
  schedule = make_schedule(
    learning_rate=peak, schedule="cosine", warmup_steps=0, total_steps=steps, final_fraction=0.0
  )
  again = lambda count: schedule(count % steps)
  return make_optimizer(schedule if rounds == 1 else again, b2=0.99, clip_norm=0.0)


# --- finite samples -------------------------------------------------------------------------------


def kl_divergence(log_p_XY: np.ndarray, log_q_XY: np.ndarray) -> np.ndarray:
  """KL(p ‖ q), nats: [X]."""
  return (np.exp(log_p_XY) * (log_p_XY - log_q_XY)).sum(-1)


def expected_gap(
  log_mu_XY: np.ndarray, log_reference_XY: np.ndarray, reward_XY: np.ndarray, beta: float
) -> float:
  """n KL(π̂ ‖ π*) as n grows, for the DPO minimum π̂ of n pairs; nats, a mean over prompts.

    tr(F_π F⁻¹)/2,   F = β²/X Σ_{y<y'} 2 μ(y) μ(y') p (1-p) (e_y - e_y')(e_y - e_y')ᵀ

  DPO is maximum likelihood of log π(y|x) up to a constant; F is its information in a labelled pair,
  and the gap is half the quadratic form of its error with F_π = diag(π*) - π* π*ᵀ.
  """
  prompts = len(reward_XY)
  log_XY = log_reference_XY + reward_XY / beta
  policy_XY = np.exp(log_XY - log_XY.max(-1, keepdims=True))
  policy_XY /= policy_XY.sum(-1, keepdims=True)
  p_XYY = bradley_terry(reward_XY)
  pairs_XYY = pair_weights(log_mu_XY, 2 * p_XYY * (1 - p_XYY))
  gaps = []
  for pairs_YY, policy_Y in zip(pairs_XYY, policy_XY, strict=True):
    information_YY = beta**2 / prompts * (np.diag(pairs_YY.sum(1)) - pairs_YY)
    fisher_YY = np.diag(policy_Y) - np.outer(policy_Y, policy_Y)
    gaps.append(np.trace(fisher_YY @ np.linalg.pinv(information_YY)) / 2)
  return float(np.mean(gaps))


class Gaps(NamedTuple):
  """Distances from the optimum of policies trained on samples; N sizes, S samples of each.

  Attributes:
    sizes: how many pairs were drawn.
    gap_NS: KL(π̂ ‖ π*), nats, a mean over prompts.
    slope_NS: norm of the loss's gradient where training ended: how well the minimum was found.
    expected: `expected_gap`.
  """

  sizes: tuple[int, ...]
  gap_NS: np.ndarray
  slope_NS: np.ndarray
  expected: float


def finite_samples(
  sizes: tuple[int, ...], *, beta: float, samples: int, seed: int = 0, steps: int = 400
) -> Gaps:
  """Draws pairs from the preferences of a random world and trains on them by `sigmoid`, to the end.

  A pair is two answers drawn from μ, half reference and half uniform, to a prompt drawn evenly, and
  a label by Bradley-Terry. Answers are compared with themselves too; that tells nothing. float64.

  Args:
    sizes: numbers of pairs.
    beta: reward units a nat.
    samples: how many sets of pairs of each size; they are trained on side by side.
    seed: of the world and the draws.
    steps: of training.
  """
  with jax.enable_x64(True):
    rng = np.random.default_rng(seed)
    world = make()
    model, reference = tabular(world), table(world, seed)
    log_reference_XY = log_policy(model, reference, world)
    reward_XY = rng.normal(0, 1, log_reference_XY.shape)
    log_mu_XY = np.log((np.exp(log_reference_XY) + 1 / len(world.completions)) / 2)
    log_optimal_XY = log_reference_XY + reward_XY / beta
    log_optimal_XY -= np.log(np.exp(log_optimal_XY).sum(-1, keepdims=True))

    weight_XYY = pair_weights(log_mu_XY, bradley_terry(reward_XY))
    share_E = weight_XYY.reshape(-1) / weight_XYY.sum()
    batch = lay_out(tuples(world))
    loss = losses.resolve("sigmoid", beta=beta)
    objective = step.Objective(logprobs.make_logps_fn(model), loss)
    tx = optimizer(steps)

    @jax.jit
    @jax.vmap
    def trained(weight_E: Array) -> tuple[PyTree, Array]:
      state = step.init_state(jax.tree.map(jnp.asarray, reference), tx, loss)
      drawn = reweigh(batch, weight_E)
      state, metrics = train(state, reference, drawn, objective=objective, tx=tx, steps=steps)
      return state.params, metrics["grad_norm"][-1]

    gaps, slopes = [], []
    for size in sizes:
      count_SE = rng.multinomial(size, share_E, size=samples)
      params_S, slope_S = trained(count_SE.astype(float))
      policies = [jax.tree.map(lambda x, s=s: x[s], params_S) for s in range(samples)]
      logs = [log_policy(model, params, world) for params in policies]
      gaps.append([kl_divergence(log_XY, log_optimal_XY).mean() for log_XY in logs])
      slopes.append(np.asarray(slope_S))
    expected = expected_gap(log_mu_XY, log_reference_XY, reward_XY, beta)
    return Gaps(tuple(sizes), np.array(gaps), np.array(slopes), expected)
