"""Worlds small enough to list every completion, so that the optimum of training is known exactly.

Token ids: 0 is the end token, 1, 2, ... are letters, and two more ids occur in prompts alone. A
completion is any sequence of letters followed by the end token, of at most `longest` tokens. A
completion of that length must end there, so the probabilities of the listed completions sum to 1
under every policy.

X lists prompts, Y completions, E examples, C sequences of visible tokens, V ids that are scored.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

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
# Far below any logit that a policy learns: its exponential is 0 in float32 and in float64. It is
# finite, because infinity times the feature 0 in `with_length_limit` would be NaN.
NEVER = -1e9


class World(NamedTuple):
  """Contains all prompts and all completions of a finite world.

  Attributes:
    letters: number of letters.
    longest: number of tokens in the longest completions, the end token included.
    prompts: X arrays of ids.
    completions: Y arrays of ids; every prompt has the same completions.
  """

  letters: int
  longest: int
  prompts: tuple[np.ndarray, ...]
  completions: tuple[np.ndarray, ...]

  @property
  def vocab(self) -> int:
    """The number of ids that can be scored: the end token and the letters."""
    return self.letters + 1

  @property
  def ids(self) -> int:
    """The number of all ids: those of completions and two that occur in prompts alone."""
    return self.letters + 3


def make(*, prompts: int = 3, letters: int = 2, longest: int = 3) -> World:
  """Builds a world with prompts of one or two tokens and Σ_n letters^n completions, n < `longest`.

  Raises:
    ValueError: there are fewer different prompts than requested, or none is requested.
  """
  texts = [t for n in range(longest) for t in itertools.product(range(1, letters + 1), repeat=n)]
  prompt_ids = range(letters + 1, letters + 3)
  possible = [t for n in (1, 2) for t in itertools.product(prompt_ids, repeat=n)]
  if not 1 <= prompts <= len(possible):
    raise ValueError(f"{prompts} prompts; there are 1 to {len(possible)}")
  # Long and short prompts take turns, so that even two prompts differ in length.
  ordered = [t for pair in zip(possible[::-1], possible, strict=True) for t in pair]
  return World(
    letters,
    longest,
    tuple(np.array(prompt, np.int32) for prompt in ordered[:prompts]),
    tuple(np.array((*text, END), np.int32) for text in texts),
  )


# --- policies -------------------------------------------------------------------------------------


def _visible(batch: TokenBatch) -> Array:
  """Returns the attention mask by the rule of `TokenBatch`: bool [N, L, L], query before key.

  It is written out here again: the proofs must not share a mistake with the models' own mask.
  """
  pair, position, branch = batch.pair_NL, batch.position_NL, batch.branch_NL
  same = pair[:, :, None] == pair[:, None, :]
  past = position[:, :, None] >= position[:, None, :]
  mine = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
  return same & past & mine


def with_length_limit(model: Model, world: World) -> Model:
  """Wraps a model so that every completion of the greatest length ends with certainty.

  Ids that occur in prompts alone are removed from the head. Where a token sees `longest` - 1
  letters, all logits but that of the end token are lowered by 1e9.
  """

  def hidden(params: PyTree, batch: TokenBatch) -> Array:
    hidden_NLD = model.hidden(params, batch)
    letter_NL = (batch.ids_NL >= 1) & (batch.ids_NL <= world.letters)
    # Visible letters are counted, not positions: prompts differ in length and contain no letter.
    letters_NL = jnp.where(_visible(batch), letter_NL[:, None, :], False).sum(-1)
    full_NL1 = (letters_NL >= world.longest - 1)[..., None]
    # A feature of its own, 0 or 1, which the head multiplies by `NEVER`. So the limit is part of
    # hidden states and unembedding, and the production path computes log-probs as for any model.
    return jnp.concatenate([hidden_NLD, full_NL1.astype(hidden_NLD.dtype)], axis=-1)

  def head(params: PyTree) -> Head:
    inner = model.head(params)
    kernel_VD = inner.kernel_VD[: world.vocab]
    bias_V = None if inner.bias_V is None else inner.bias_V[: world.vocab]
    never_V1 = jnp.where(jnp.arange(world.vocab) == END, 0.0, NEVER)[:, None]
    kernel_VD = jnp.concatenate([kernel_VD, never_V1.astype(kernel_VD.dtype)], axis=-1)
    return Head(kernel_VD, bias_V, inner.soft_cap)

  return Model(hidden, head, world.vocab)


def unlimited_tabular(world: World) -> Model:
  """Builds a model with one row of logits per sequence of visible tokens: {"table": [C, V]}.

  The row is chosen by the tokens that the mask makes visible and by their positions. A layout that
  shows a token too many or too few therefore reads another row, and is noticed.
  """

  def hidden(params: PyTree, batch: TokenBatch) -> Array:
    # The row's number has the ids for digits, base ids + 1; the digit 0 means no token, so ids
    # count from 1.
    digit_NL = (batch.ids_NL + 1) * (world.ids + 1) ** batch.position_NL
    text_NL = jnp.where(_visible(batch), digit_NL[:, None, :], 0).sum(-1)
    return jnp.asarray(params["table"])[text_NL]

  def head(params: PyTree) -> Head:
    # The hidden state is the row of logits itself.
    return Head(jnp.eye(world.vocab, dtype=params["table"].dtype))

  return Model(hidden, head, world.vocab)


def tabular(world: World) -> Model:
  """Builds a tabular policy over the listed completions; it can represent every distribution."""
  return with_length_limit(unlimited_tabular(world), world)


def table(world: World, seed: int, scale: float = 0.7) -> dict[str, np.ndarray]:
  """Samples parameters of `tabular`: normal logits with standard deviation `scale`, float64."""
  texts = (world.ids + 1) ** (max(map(len, world.prompts)) + world.longest)
  return {"table": np.random.default_rng(seed).normal(0, scale, (texts, world.vocab))}


def log_policy(model: Model, params: PyTree, world: World) -> np.ndarray:
  """Computes log π(y|x) of every completion by the production path: [X, Y], in nats.

  The layout is padded, one sequence per row.
  """
  sequences = [Example(x, (y,)) for x in world.prompts for y in world.completions]
  length = collate.fit_row_length(sequences, "padded")
  batch = collate.collate(sequences, layout="padded", row_length=length)
  logps_NS = _compiled(model)(params, batch)
  # Rows of padding come after the others, and the padded layout keeps the order of its examples.
  used = np.asarray(batch.weight_NS).reshape(-1) > 0
  return np.asarray(logps_NS).reshape(-1)[used].reshape(len(world.prompts), -1)


@functools.cache
def _compiled(model: Model) -> logprobs.LogpsFn:
  """Returns one compiled function per model: a new one per call would be compiled again."""
  return jax.jit(logprobs.make_logps_fn(model))


# --- data -----------------------------------------------------------------------------------------


def tuples(world: World, completions: int = 2) -> list[Example]:
  """Lists every tuple of K completions of every prompt as an example of weight 1.

  Examples have the order of an array [X, Y, ..., Y], so that such an array can weight them.
  """
  lists = itertools.product(world.prompts, itertools.product(world.completions, repeat=completions))
  return [Example(prompt, texts, 1.0, row) for row, (prompt, texts) in enumerate(lists)]


def weigh(examples: list[Example], weight_XY: np.ndarray) -> list[Example]:
  """Gives the examples of `tuples` these weights; examples of weight 0 are left out."""
  weights = np.asarray(weight_XY).reshape(-1)
  return [
    example._replace(weight=float(weight))
    for example, weight in zip(examples, weights, strict=True)
    if weight > 0
  ]


def bradley_terry(reward_XY: np.ndarray) -> np.ndarray:
  """Computes p(y ≻ y'|x) = σ(r - r'): [X, Y, Y']."""
  return 1 / (1 + np.exp(reward_XY[:, None, :] - reward_XY[:, :, None]))


def pair_weights(log_mu_XY: np.ndarray, preference_XYY: np.ndarray) -> np.ndarray:
  """Computes μ(y) μ(y') p(y ≻ y'), the weights of infinitely many labeled pairs: [X, Y, Y'].

  Both completions are sampled from μ. A completion compared with itself must be preferred with
  probability 1/2 in `preference_XYY`; the weights then sum to X/2.
  """
  mu_XY = np.exp(log_mu_XY)
  return mu_XY[:, :, None] * mu_XY[:, None, :] * preference_XYY


def micro_batches(examples: list[Example], count: int = 2, seed: int = 0) -> list[list[Example]]:
  """Shuffles examples into `count` micro-batches whose sizes are as 1 : 2 : 3 : ....

  Different sizes, because gradients must be right where a mean of means would be wrong.
  """
  order = np.random.default_rng(seed).permutation(len(examples))
  edges = [len(order) * (i + 1) * (i + 2) // (count * (count + 1)) for i in range(count)]
  return [[examples[i] for i in part] for part in np.split(order, edges[:-1])]


def lay_out(examples: list[Example], *, row_length: int = 48, **options) -> TokenBatch:
  """Builds one batch of two micro-batches of different sizes; prompts are shared by default."""
  return collate.collate_many(micro_batches(examples), row_length=row_length, **options)


def reweigh(batch: TokenBatch, weight_E: Array) -> TokenBatch:
  """Returns the batch with new weights per data row; `weight_E` may be traced."""
  # An empty slot has data row -1, which would read the last weight.
  weight_NS = jnp.where(batch.row_NS >= 0, jnp.asarray(weight_E)[batch.row_NS], 0.0)
  return batch._replace(weight_NS=weight_NS)


# --- training -------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("objective", "tx", "steps", "batch_fn"))
def train(
  state: step.TrainState,
  reference: PyTree | None,
  batch: TokenBatch,
  *,
  objective: step.Objective,
  tx: optax.GradientTransformation,
  steps: int,
  batch_fn: Callable[[PyTree, TokenBatch], TokenBatch] = lambda params, batch: batch,
) -> tuple[step.TrainState, dict[str, Array]]:
  """Runs `steps` production steps on one batch, compiled as a single loop.

  Args:
    state: initial state.
    reference: reference parameters; None where the state contains the reference.
    batch: every array with a leading axis of micro-batches.
    objective, tx: as in `step.train_step`.
    steps: number of steps.
    batch_fn: computes the batch of a step from the current parameters and `batch`.

  Returns:
    The last state, and every scalar metric of every step.
  """

  def one_step(state: step.TrainState, _: None):
    current = batch_fn(state.params, batch)
    state, metrics = step.train_step(state, reference, current, objective=objective, tx=tx)
    return state, {key: value for key, value in metrics.items() if value.ndim == 0}

  return jax.lax.scan(one_step, state, length=steps)


def optimizer(steps: int, *, peak: float = 0.1, rounds: int = 1) -> optax.GradientTransformation:
  """Builds the production optimizer with a cosine to zero, repeated for each of `rounds` rounds.

  The learning rate must reach zero: only then does Adam stop moving around the minimum.
  """
  schedule = make_schedule(
    learning_rate=peak, schedule="cosine", warmup_steps=0, total_steps=steps, final_fraction=0.0
  )

  def restarted(count: Any) -> Any:  # an optax.Schedule, whose types are as wide
    return schedule(count % steps)

  return make_optimizer(schedule if rounds == 1 else restarted, b2=0.99, clip_norm=0.0)


# --- finite samples -------------------------------------------------------------------------------


def kl_divergence(log_p_XY: np.ndarray, log_q_XY: np.ndarray) -> np.ndarray:
  """Computes KL(p ‖ q) per prompt, in nats: [X]."""
  return (np.exp(log_p_XY) * (log_p_XY - log_q_XY)).sum(-1)


def expected_gap(
  log_mu_XY: np.ndarray, log_reference_XY: np.ndarray, reward_XY: np.ndarray, beta: float
) -> float:
  """Computes the limit of n E[KL(π̂ ‖ π*)] for the DPO minimum π̂ of n pairs, as n grows.

    tr(F_π F⁻¹)/2,   F = β²/X Σ_{y<y'} 2 μ(y) μ(y') p (1-p) (e_y - e_y')(e_y - e_y')ᵀ

  DPO is maximum likelihood for log π(y|x) up to a constant per prompt, and F is the Fisher
  information of one labeled pair. The errors of log π̂ have covariance F⁻¹/n. To second order their
  KL is half the quadratic form with F_π = diag(π*) - π* π*ᵀ. The result is in nats, a mean over
  prompts.
  """
  prompts = len(reward_XY)
  log_XY = log_reference_XY + reward_XY / beta
  policy_XY = np.exp(log_XY - log_XY.max(-1, keepdims=True))
  policy_XY /= policy_XY.sum(-1, keepdims=True)
  p_XYY = bradley_terry(reward_XY)
  pairs_XYY = pair_weights(log_mu_XY, 2 * p_XYY * (1 - p_XYY))
  gaps = []
  for pairs_YY, policy_Y in zip(pairs_XYY, policy_XY, strict=True):
    # A completion compared with itself cancels in the difference: its label says nothing.
    information_YY = beta**2 / prompts * (np.diag(pairs_YY.sum(1)) - pairs_YY)
    fisher_YY = np.diag(policy_Y) - np.outer(policy_Y, policy_Y)
    # The pseudo-inverse, since F is singular: adding a constant to log π(y|x) changes no margin.
    gaps.append(np.trace(fisher_YY @ np.linalg.pinv(information_YY)) / 2)
  return float(np.mean(gaps))


class Gaps(NamedTuple):
  """Distances from the optimum after training on finite data; N sizes, S data sets of each.

  Attributes:
    sizes: number of pairs in a data set.
    gap_NS: KL(π̂ ‖ π*) in nats, a mean over prompts.
    slope_NS: gradient norm of the loss at the last step; near 0 where the minimum was found.
    expected: the limit of size times gap, in nats, by `expected_gap`.
  """

  sizes: tuple[int, ...]
  gap_NS: np.ndarray
  slope_NS: np.ndarray
  expected: float


def finite_samples(
  sizes: tuple[int, ...], *, beta: float, samples: int, seed: int = 0, steps: int = 400
) -> Gaps:
  """Measures how far `sigmoid` ends from the optimum when it is trained on n sampled pairs.

  For a pair, a prompt is sampled uniformly, two completions from μ, and a label by Bradley-Terry.
  μ is half the reference and half uniform. The two completions may be equal; such a pair has no
  effect. Everything is computed in float64.

  Args:
    sizes: numbers of pairs per data set.
    beta: reward units per nat.
    samples: number of data sets of each size, trained in parallel.
    seed: random seed of the world and of the data sets.
    steps: number of training steps.
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
    # One batch lists every possible pair, and a data set is a vector of weights on it: how often
    # each pair was sampled. So one compiled program serves all data sets of all sizes.
    batch = lay_out(tuples(world))
    loss = losses.resolve("sigmoid", beta=beta)
    objective = step.Objective(logprobs.make_logps_fn(model), loss)
    tx = optimizer(steps)

    @jax.jit
    @jax.vmap
    def train_on(weight_E: Array) -> tuple[PyTree, Array]:
      state = step.init_state(jax.tree.map(jnp.asarray, reference), tx, loss)
      sampled = reweigh(batch, weight_E)
      state, metrics = train(state, reference, sampled, objective=objective, tx=tx, steps=steps)
      return state.params, metrics["grad_norm"][-1]

    gaps, slopes = [], []
    for size in sizes:
      count_SE = rng.multinomial(size, share_E, size=samples)
      params_S, slope_S = train_on(count_SE.astype(float))
      policies = [jax.tree.map(lambda x, s=s: x[s], params_S) for s in range(samples)]
      logs = [log_policy(model, params, world) for params in policies]
      gaps.append([kl_divergence(log_XY, log_optimal_XY).mean() for log_XY in logs])
      slopes.append(np.asarray(slope_S))
    expected = expected_gap(log_mu_XY, log_reference_XY, reward_XY, beta)
    return Gaps(tuple(sizes), np.array(gaps), np.array(slopes), expected)
