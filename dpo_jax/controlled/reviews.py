"""The embedded task: short reviews from a grammar, and the true reward of any of them.

A text is an opening, which is the prompt (`I watched this new film on Friday with friends.`), and
the rest of the review, which is the answer (` The plot was not very clever, but overall, we would
probably watch it again.`). Everything about the task is known: the probability of a text,
the reward of any string, hence the best that any policy can do at any distance from the grammar.

The grammar writes two statements an answer, in either order: one about an *aspect* of the thing
reviewed and a *verdict* about the whole. What they say is drawn independently; `but` and `yet` join
two of opposite sign, `and` joins the rest, and some stand as two sentences.

The reward reads sentiment, one statement at a time:

  value = word x turn x degree,   word in {-2, -1, 0, 1, 2}
    turn    -1/2 if the statement is negated (not, never, hardly, -n't), else 1
    degree  3/2 if intensified (very, really, ...), 1/2 if hedged (rather, I suppose, ...), both 3/4

and a text is worth `UNIT` = 3 times the sum over its first `STATEMENTS` = 2 statements, so it lies
in [-18, 18] and Bradley-Terry gives most pairs the label that their rewards deserve. Nothing is
gained by repetition: a modifier counts once in a statement, an aspect once in a review, a verdict
once, aspects of other things are worth nothing, nor is what is not said.
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
  return re.findall(r"[a-z']+|[.!?;]", text.lower())


def _statements(words: list[str]) -> Iterator[list[str]]:
  """Runs of words between the marks and conjunctions that end a statement."""
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
  """What one statement says of its subject, in [-3, 3]; 0 without a word of sentiment.

  The first word of sentiment counts, and each sort of modifier counts once.
  """
  value = float(next((lexicon.VALUE[word] for word in words if word in lexicon.VALUE), 0))
  if any(word in lexicon.NEGATORS or word.endswith("n't") for word in words):
    value *= lexicon.TURN
  if any(word in lexicon.INTENSIFIERS for word in words):
    value *= lexicon.INTENSIFIED
  if any(word in lexicon.HEDGES for word in words):
    value *= lexicon.HEDGED
  return value


def reward(prompt: str, answer: str) -> float:
  """True reward of an answer to a prompt, in [-REWARD_BOUND, REWARD_BOUND]; any text has one.

  Args:
    prompt: the opening. The first thing it names decides which aspects are to the point; if it
      names none, all are.
    answer: the rest of the review, finished or not.
  """
  thing = next((word for word in _words(prompt) if word in lexicon.KIND_OF), None)
  relevant = lexicon.ASPECTS if thing is None else lexicon.TRAIT_OF[lexicon.KIND_OF[thing]]
  total, said = 0.0, set()
  for number, words in enumerate(_statements(_words(answer))):
    if number == STATEMENTS:
      break
    subject = next((word for word in words if word in lexicon.ASPECTS), "verdict")
    if subject not in said and (subject == "verdict" or subject in relevant):
      total += statement_value(words)
    said.add(subject)
  return UNIT * total


# --- The grammar ----------------------------------------------------------------------------------


class Table(NamedTuple):
  """Every way to make one statement: texts, what they are worth, and how likely they are."""

  texts: tuple[str, ...]
  value_T: np.ndarray
  prob_T: np.ndarray
  cumulative_T: np.ndarray


def _table(rows: list[tuple[float, str, float]]) -> Table:
  """From (weight, text, value); a tail may still hedge what no other word hedges."""
  spread = []
  for weight, text, value in rows:
    if lexicon.HEDGES.isdisjoint(text.split()):
      share = weight * lexicon.TAILED / len(lexicon.HEDGING_TAILS)
      spread += [(share, text + tail, value * lexicon.HEDGED) for tail in lexicon.HEDGING_TAILS]
      weight *= 1 - lexicon.TAILED
    spread.append((weight, text, value))
  weights, texts, values = zip(*spread, strict=True)
  prob_T = np.array(weights) / math.fsum(weights)
  return Table(texts, np.array(values), prob_T, np.cumsum(prob_T))


def _say(
  share: float, frame: str, ways: tuple, words: dict[int, list[str]], **fixed: str
) -> list[tuple[float, str, float]]:
  """All (weight, text, value) of a frame: strengths by STRENGTHS, evenly within a strength."""
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
  """The words of each strength, from several tables."""
  return {s: [w for table in tables for w in table.get(s, "").split()] for s in tables[0]}


@functools.cache
def aspect_table(kind: str, aspect: str, together: bool) -> Table:
  """Every statement about one aspect, by one person or by several together."""
  said = {
    "aspect": aspect,
    "be": "were" if aspect.endswith("s") else "was",
    "who": "we" if together else "I",
    "whom": "us" if together else "me",
  }
  adjectives = _choices(lexicon.GENERAL, lexicon.TRAITS[lexicon.TRAIT_OF[kind][aspect]])
  return _table(
    _say(0.7, "the {aspect} {way} {word}", lexicon.LINKS, adjectives, **said)
    + _say(0.18, "{who} {way} the {aspect}", lexicon.ACTS, _choices(lexicon.LIKING), **said)
    + _say(0.12, "the {aspect} {way} {whom}", lexicon.ACTS, _choices(lexicon.STRIKING), **said)
  )


@functools.cache
def verdict_table(kind: str, together: bool) -> Table:
  """Every verdict about the whole."""
  said = {"who": "we", "be": "were"} if together else {"who": "I", "be": "was"}
  intents = {
    2: ["recommend it", "recommend it to a friend", lexicon.KINDS[kind].again],
    -2: ["avoid it", "advise against it"],
  }
  rows = _say(0.55, "{who} {way} {word}", lexicon.LINKS, _choices(lexicon.FEELINGS), **said)
  rows += _say(0.45, "{who} {way} {word}", lexicon.INTENTS, intents, **said)
  return _table(
    [(weight, lead + text, value) for weight, text, value in rows for lead in lexicon.LEADS]
  )


def joints(first: float, second: float) -> tuple[str, ...]:
  """What may join two statements of these values in one sentence."""
  return lexicon.CONTRASTS if first * second < 0 else lexicon.ADDITIONS


class _Dice:
  """The uniform numbers of one text, used up one by one."""

  SIDES = 20  # more than any text uses

  def __init__(self, uniform_U: np.ndarray):
    self._numbers = iter(uniform_U.tolist())

  def chance(self, probability: float) -> bool:
    return next(self._numbers) < probability

  def pick(self, choices):
    return choices[int(next(self._numbers) * len(choices))]

  def row(self, table: Table) -> tuple[str, float]:
    at = int(np.searchsorted(table.cumulative_T, next(self._numbers), side="right"))
    at = min(at, len(table.texts) - 1)  # the last cumulative sum may fall short of 1 by rounding
    return table.texts[at], float(table.value_T[at])


def _capital(text: str) -> str:
  return text[0].upper() + text[1:]


def _opening(dice: _Dice, kind: lexicon.Kind, together: bool) -> str:
  who, verb = dice.pick(lexicon.TOGETHER if together else lexicon.ALONE), dice.pick(kind.openings)
  article, quality = dice.pick(lexicon.ARTICLES), dice.pick(lexicon.QUALITIES)
  thing, time, occasion = (
    dice.pick(kind.things.split()),
    dice.pick(lexicon.TIMES),
    dice.pick(lexicon.OCCASIONS),
  )
  return f"{who} {verb} {article}{quality} {thing} {time}{occasion}."


def _review(dice: _Dice) -> tuple[str, str]:
  name, together = dice.pick(tuple(lexicon.KINDS)), dice.chance(0.5)
  opening = _opening(dice, lexicon.KINDS[name], together)
  aspect = dice.pick(tuple(lexicon.TRAIT_OF[name]))
  statements = [
    dice.row(aspect_table(name, aspect, together)),
    dice.row(verdict_table(name, together)),
  ]
  if dice.chance(lexicon.VERDICT_FIRST):
    statements.reverse()
  (first, value), (second, also) = statements
  if dice.chance(lexicon.JOINED):
    return opening, f" {_capital(first)}{dice.pick(joints(value, also))}{second}."
  return opening, f" {_capital(first)}. {_capital(second)}."


def generate(count: int, seed: int) -> tuple[list[str], list[str]]:
  """Draws texts from the grammar: (prompts, answers); text k depends on (seed, k) alone.

  An answer begins with a space, so that prompt + answer is the text.
  """
  uniform_CU = np.random.default_rng(seed).random((count, _Dice.SIDES))
  reviews = [_review(_Dice(uniform_U)) for uniform_U in uniform_CU]
  return [prompt for prompt, _ in reviews], [answer for _, answer in reviews]


def distinct(count: int, seed: int) -> list[tuple[str, str]]:
  """`count` texts from the grammar, no two of which share a prompt: [(prompt, answer), …]."""
  drawn = 2 * count
  while True:
    reviews = dict(zip(*generate(drawn, seed), strict=True))
    if len(reviews) >= count:
      return list(reviews.items())[:count]
    drawn *= 2


# --- Its words ------------------------------------------------------------------------------------


@functools.cache
def vocabulary() -> tuple[str, ...]:
  """Every piece that a text of the grammar is made of, sorted."""
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
      parts |= {f" {way}" for text in texts for way in (text, _capital(text))}
  pieces = {piece for part in parts for piece in word_tokenizer.pieces(part)}
  return tuple(sorted(pieces - {" "}))
