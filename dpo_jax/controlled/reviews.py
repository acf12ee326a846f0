"""The controlled task: short reviews from a grammar, with a known reward for any text.

A review is an opening, which is the prompt (`I watched this new film on Friday with friends.`), and
a rest, which is the completion (` The plot was not very clever, but overall, we would probably
watch it again.`). Everything about the task is known: the probability of a review under the grammar
and the reward of any text, and so the highest reward of any policy at a given KL from the grammar.

A completion of the grammar has two statements, in either order: one about an *aspect* of the thing
reviewed, and a *verdict* about the whole. Their sentiments are sampled independently. `but` and
`yet` join two of opposite sign and `and` joins the others, or they are two sentences.

The reward reads the sentiment of one statement at a time:

  value = word x turn x degree,   word in {-2, -1, 0, 1, 2}
    turn    -1/2 if the statement is negated (not, never, hardly, -n't), else 1
    degree  3/2 if intensified (very, really, ...), 1/2 if hedged (rather, I suppose, ...), both 3/4

The reward of a review is `UNIT` = 3 times the sum over its first `STATEMENTS` = 2 statements, so it
lies in [-18, 18]. At this scale Bradley-Terry prefers the higher reward in most pairs. Repetition
gains nothing: a modifier counts once per statement, an aspect and a verdict once per review, and
aspects of other things count nothing.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dpo_jax.controlled import lexicon, word_tokenizer

STATEMENTS = 2
UNIT = 3.0  # reward of one unit of sentiment
REWARD_BOUND = 18.0  # two statements of 2 x 3/2 units


# --- The reward -----------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
  """Splits a text into lower-case words and the punctuation marks that end a sentence."""
  return re.findall(r"[a-z']+|[.!?;]", text.lower())


def _statements(words: list[str]) -> Iterator[list[str]]:
  """Yields the statements of a text: the words between punctuation marks and conjunctions."""
  statement = []
  for word in words:
    if word in lexicon.BREAKS:
      if statement:
        yield statement
      statement = []
    else:
      statement.append(word)
  if statement:
    yield statement


def statement_value(words: list[str]) -> float:
  """Returns the sentiment of one statement, in [-3, 3]; 0 without a word of sentiment.

  Only the first word of sentiment counts, and each sort of modifier counts once.
  """
  value = float(next((lexicon.VALUE[word] for word in words if word in lexicon.VALUE), 0))
  if any(word in lexicon.NEGATORS or word.endswith("n't") for word in words):
    value *= lexicon.TURN
  if any(word in lexicon.INTENSIFIERS for word in words):
    value *= lexicon.INTENSIFIED
  if any(word in lexicon.HEDGES for word in words):
    value *= lexicon.HEDGED
  return value


def reward(prompt: str, completion: str) -> float:
  """Returns the reward of a completion, in [-REWARD_BOUND, REWARD_BOUND]; any text has one.

  Args:
    prompt: the opening. The first thing that it names decides which aspects are relevant; if it
      names none, all are.
    completion: the rest of the review, complete or not.
  """
  thing = next((word for word in _words(prompt) if word in lexicon.KIND_OF), None)
  relevant = lexicon.ASPECTS if thing is None else lexicon.TRAIT_OF[lexicon.KIND_OF[thing]]
  total, seen = 0.0, set()
  for number, words in enumerate(_statements(_words(completion))):
    # More statements than the grammar writes earn nothing: a policy cannot gain by length.
    if number == STATEMENTS:
      break
    subject = next((word for word in words if word in lexicon.ASPECTS), "verdict")
    if subject not in seen and (subject == "verdict" or subject in relevant):
      total += statement_value(words)
    seen.add(subject)
  return UNIT * total


# --- The grammar ----------------------------------------------------------------------------------


class Table(NamedTuple):
  """The phrases of one kind of statement, with their sentiments and probabilities.

  Attributes:
    texts: the phrases.
    value_Ph: sentiment of each, in [-3, 3], as `statement_value` reads it.
    prob_Ph: probability of each.
    cumulative_Ph: cumulative sums of the probabilities, to sample by.
  """

  texts: tuple[str, ...]
  value_Ph: np.ndarray
  prob_Ph: np.ndarray
  cumulative_Ph: np.ndarray


def _table(rows: list[tuple[float, str, float]]) -> Table:
  """Makes a table of (weight, text, value), and adds hedging tails to the texts without a hedge."""
  phrases = []
  for weight, text, value in rows:
    # A second hedge would not change the reward, so the value of such a phrase would be wrong.
    if lexicon.HEDGES.isdisjoint(text.split()):
      share = weight * lexicon.TAILED / len(lexicon.HEDGING_TAILS)
      phrases += [(share, text + tail, value * lexicon.HEDGED) for tail in lexicon.HEDGING_TAILS]
      weight *= 1 - lexicon.TAILED
    phrases.append((weight, text, value))
  weights, texts, values = zip(*phrases, strict=True)
  # fsum rounds once, so that the sum does not depend on the order of the phrases.
  prob_Ph = np.array(weights) / math.fsum(weights)
  return Table(texts, np.array(values), prob_Ph, np.cumsum(prob_Ph))


def _phrases(
  share: float, frame: str, ways: tuple, words: dict[int, list[str]], **fixed: str
) -> list[tuple[float, str, float]]:
  """Lists all (weight, text, value) of a sentence frame.

  Args:
    share: total weight of the frame.
    frame: a format string with `way` and `word`.
    ways: a wording table of the lexicon.
    words: strength -> words, which are equally likely within a strength.
    fixed: the other words of the frame.
  """
  share /= sum(lexicon.STRENGTHS[strength] for strength in words)
  rows = []
  for strength, choices in words.items():
    for chance, factor, wordings in ways:
      weight = share * lexicon.STRENGTHS[strength] * chance / (len(choices) * len(wordings))
      for wording, word in itertools.product(wordings, choices):
        way = wording.format(base=word, past=lexicon.past(word), **fixed)
        rows.append((weight, frame.format(way=way, word=word, **fixed), strength * factor))
  return rows


def _choices(*tables: dict[int, str]) -> dict[int, list[str]]:
  """Merges tables of words: strength -> words of all tables."""
  return {s: [w for table in tables for w in table.get(s, "").split()] for s in tables[0]}


@functools.cache
def aspect_table(kind: str, aspect: str, together: bool) -> Table:
  """Returns every statement about one aspect, in the singular (I) or the plural (we)."""
  fixed = {
    "aspect": aspect,
    "be": "were" if aspect.endswith("s") else "was",
    "who": "we" if together else "I",
    "whom": "us" if together else "me",
  }
  adjectives = _choices(lexicon.GENERAL, lexicon.TRAITS[lexicon.TRAIT_OF[kind][aspect]])
  return _table(
    _phrases(0.7, "the {aspect} {way} {word}", lexicon.LINKS, adjectives, **fixed)
    + _phrases(0.18, "{who} {way} the {aspect}", lexicon.ACTS, _choices(lexicon.LIKING), **fixed)
    + _phrases(0.12, "the {aspect} {way} {whom}", lexicon.ACTS, _choices(lexicon.STRIKING), **fixed)
  )


@functools.cache
def verdict_table(kind: str, together: bool) -> Table:
  """Returns every verdict about the whole, in the singular (I) or the plural (we)."""
  fixed = {"who": "we", "be": "were"} if together else {"who": "I", "be": "was"}
  intents = {
    2: ["recommend it", "recommend it to a friend", lexicon.KINDS[kind].again],
    -2: ["avoid it", "advise against it"],
  }
  rows = _phrases(0.55, "{who} {way} {word}", lexicon.LINKS, _choices(lexicon.FEELINGS), **fixed)
  rows += _phrases(0.45, "{who} {way} {word}", lexicon.INTENTS, intents, **fixed)
  return _table(
    [(weight, lead + text, value) for weight, text, value in rows for lead in lexicon.LEADS]
  )


def joints(first: float, second: float) -> tuple[str, ...]:
  """Returns the conjunctions that may join two statements with these values in one sentence."""
  return lexicon.CONTRASTS if first * second < 0 else lexicon.ADDITIONS


class _Dice:
  """The uniform random numbers of one review, used one by one.

  A review with numbers of its own is the same whatever reviews were sampled before it.
  """

  SIDES = 20  # numbers per review; more than any review uses

  def __init__(self, uniform_U: np.ndarray):
    self._numbers = iter(uniform_U.tolist())

  def chance(self, probability: float) -> bool:
    """Returns True with this probability."""
    return next(self._numbers) < probability

  def pick(self, choices):
    """Returns one of the choices, all equally likely."""
    return choices[int(next(self._numbers) * len(choices))]

  def phrase(self, table: Table) -> tuple[str, float]:
    """Samples a phrase of a table: (text, value)."""
    at = int(np.searchsorted(table.cumulative_Ph, next(self._numbers), side="right"))
    at = min(at, len(table.texts) - 1)  # the last cumulative sum may be below 1 by rounding
    return table.texts[at], float(table.value_Ph[at])


def _capitalize(text: str) -> str:
  # Not str.capitalize, which would turn the "I" of the rest into "i".
  return text[0].upper() + text[1:]


def _opening(dice: _Dice, kind: lexicon.Kind, together: bool) -> str:
  """Samples the prompt of a review."""
  # The order of the dice is part of the task: another order gives other texts for the same seed.
  who, verb = dice.pick(lexicon.TOGETHER if together else lexicon.ALONE), dice.pick(kind.openings)
  article, quality = dice.pick(lexicon.ARTICLES), dice.pick(lexicon.QUALITIES)
  thing, time, occasion = (
    dice.pick(kind.things.split()),
    dice.pick(lexicon.TIMES),
    dice.pick(lexicon.OCCASIONS),
  )
  return f"{who} {verb} {article}{quality} {thing} {time}{occasion}."


def _review(dice: _Dice) -> tuple[str, str]:
  """Samples a review: (prompt, completion)."""
  name, together = dice.pick(tuple(lexicon.KINDS)), dice.chance(0.5)
  opening = _opening(dice, lexicon.KINDS[name], together)
  aspect = dice.pick(tuple(lexicon.TRAIT_OF[name]))
  statements = [
    dice.phrase(aspect_table(name, aspect, together)),
    dice.phrase(verdict_table(name, together)),
  ]
  if dice.chance(lexicon.VERDICT_FIRST):
    statements.reverse()
  (first, value), (second, also) = statements
  if dice.chance(lexicon.JOINED):
    return opening, f" {_capitalize(first)}{dice.pick(joints(value, also))}{second}."
  return opening, f" {_capitalize(first)}. {_capitalize(second)}."


def generate(count: int, seed: int) -> tuple[list[str], list[str]]:
  """Samples reviews from the grammar; review k depends on (seed, k) alone.

  Returns:
    Prompts and completions. A completion begins with a space, so that prompt + completion is the
    whole text.
  """
  # The generator fills an array row by row, so row k is the same for every count.
  uniform_BU = np.random.default_rng(seed).random((count, _Dice.SIDES))
  reviews = [_review(_Dice(uniform_U)) for uniform_U in uniform_BU]
  return [prompt for prompt, _ in reviews], [completion for _, completion in reviews]


def distinct(count: int, seed: int) -> list[tuple[str, str]]:
  """Samples `count` reviews with different prompts: [(prompt, completion), …]."""
  sampled = 2 * count
  while True:
    # A dict keeps the place of a prompt's first review and the completion of its last.
    reviews = dict(zip(*generate(sampled, seed), strict=True))
    if len(reviews) >= count:
      return list(reviews.items())[:count]
    sampled *= 2


# --- The vocabulary -------------------------------------------------------------------------------


@functools.cache
def vocabulary() -> tuple[str, ...]:
  """Returns every piece that occurs in a review of the grammar, sorted."""
  parts = {
    ".",
    *lexicon.ALONE,
    *lexicon.TOGETHER,
    *lexicon.QUALITIES,
    *lexicon.OCCASIONS,
    *lexicon.HEDGING_TAILS,
    *lexicon.CONTRASTS,
    *lexicon.ADDITIONS,
  }
  parts |= {f" {part}" for part in (*lexicon.ARTICLES, *lexicon.TIMES, *lexicon.KIND_OF)}
  for name, kind in lexicon.KINDS.items():
    parts |= {f" {part}" for part in kind.openings}
    for together in (False, True):
      tables = [aspect_table(name, aspect, together) for aspect in lexicon.TRAIT_OF[name]]
      tables.append(verdict_table(name, together))
      texts = [text for table in tables for text in table.texts]
      parts |= {f" {way}" for text in texts for way in (text, _capitalize(text))}
  pieces = {piece for part in parts for piece in word_tokenizer.pieces(part)}
  return tuple(sorted(pieces - {" "}))
