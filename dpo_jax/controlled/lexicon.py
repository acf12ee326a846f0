"""The words of the controlled task: the things that reviews are about, and words of sentiment.

The strength of a word of sentiment runs from -2 to 2. The words of one strength are in one string,
separated by spaces, and equally likely. A wording table contains (probability, factor, wordings):
the factor is what the reward multiplies the strength by when it reads one of these wordings. A test
checks that grammar and reward agree on it.
"""

from __future__ import annotations

from typing import NamedTuple

# Factors of the reward. A negation halves the strength besides turning it: "not good" is less bad
# than "bad".
TURN, INTENSIFIED, HEDGED = -0.5, 1.5, 0.5

# Probability of each strength. Symmetric, so that the mean reward of the grammar is 0.
STRENGTHS = {2: 0.15, 1: 0.3, 0: 0.1, -1: 0.3, -2: 0.15}

GENERAL = {
  2: "wonderful superb",
  1: "good pleasant",
  0: "ordinary average",
  -1: "bad disappointing",
  -2: "awful dreadful",
}
TRAITS = {
  "taste": {2: "delicious exquisite", 1: "tasty fresh", -1: "bland stale", -2: "inedible vile"},
  "people": {2: "charming brilliant", 1: "friendly helpful", -1: "slow lazy", -2: "rude hostile"},
  "story": {2: "gripping enchanting", 1: "clever moving", -1: "dull trite", -2: "dire unbearable"},
  "sight": {2: "gorgeous stunning", 1: "pretty elegant", -1: "shabby drab", -2: "hideous ghastly"},
  "make": {
    2: "flawless ingenious",
    1: "sturdy solid",
    -1: "flimsy clumsy",
    -2: "useless worthless",
  },
}
FEELINGS = {
  2: "delighted thrilled",
  1: "pleased happy",
  0: "unsure",
  -1: "annoyed unhappy",
  -2: "furious miserable",
}
LIKING = {2: "love adore", 1: "enjoy like", -1: "dislike", -2: "hate despise"}  # we liked the soup
STRIKING = {2: "delight amaze", 1: "impress", -1: "disappoint annoy", -2: "disgust"}  # it amazed us


class Kind(NamedTuple):
  """A kind of thing to review.

  Attributes:
    things: nouns of this kind.
    openings: verbs of the first sentence.
    again: the verdict of somebody who would repeat the experience.
    aspects: trait -> aspects of such a thing. An aspect that ends in s is a plural.
  """

  things: str
  openings: tuple[str, str]
  again: str
  aspects: dict[str, str]


KINDS = {
  "meal": Kind(
    "restaurant cafe bistro diner pizzeria tavern",
    ("ate at", "had dinner at"),
    "eat there again",
    {"sight": "tables", "people": "service waiters", "taste": "food soup desserts coffee"},
  ),
  "stay": Kind(
    "hotel hostel guesthouse motel inn lodge resort",
    ("stayed at", "booked"),
    "stay there again",
    {"people": "staff service", "sight": "lobby bathroom beds view", "taste": "breakfast"},
  ),
  "film": Kind(
    "film movie comedy thriller drama western musical",
    ("watched", "saw"),
    "watch it again",
    {"people": "actors director", "story": "plot characters ending", "sight": "costumes music"},
  ),
  "book": Kind(
    "novel book biography memoir mystery diary",
    ("read", "finished"),
    "read it again",
    {"sight": "cover pictures", "story": "plot characters writing chapters ending"},
  ),
  "gadget": Kind(
    "phone laptop tablet camera printer monitor",
    ("bought", "ordered"),
    "buy it again",
    {"sight": "design case", "make": "screen buttons battery software charger"},
  ),
}
KIND_OF = {thing: name for name, kind in KINDS.items() for thing in kind.things.split()}
TRAIT_OF = {  # kind -> aspect -> trait
  name: {aspect: trait for trait, words in kind.aspects.items() for aspect in words.split()}
  for name, kind in KINDS.items()
}
ASPECTS = frozenset(aspect for traits in TRAIT_OF.values() for aspect in traits)

ALONE = ("I",)
TOGETHER = (
  "We",
  *(f"My {person} and I" for person in ("sister", "brother", "wife", "husband", "cousin", "boss")),
)
ARTICLES = ("the", "this")
QUALITIES = (
  *("", " new", " old", " little", " famous", " popular", " modern", " simple", " curious"),
  *(" local", " foreign", " cheap", " costly", " quaint", " odd", " big", " much praised"),
)
TIMES = (
  *("yesterday", "last week", "last month", "last summer", "last winter", "in May", "in June"),
  *("in March", "in October", "in November", "on Monday", "on Friday", "on Saturday", "on Sunday"),
  *("two days ago", "some weeks ago", "this morning", "last night", "at Christmas"),
)
OCCASIONS = (
  "",
  " with friends",
  " after work",
  " on a rainy day",
  " for the first time",
  " on a whim",
  " in the evening",
  " with colleagues",
  " with our neighbours",
  " by chance",
  " before the holidays",
)

# Wording tables; the probabilities of each sum to 1. Angle brackets show where a wording stands.
LINKS = (  # the soup <link> good
  (0.43, 1.0, ("{be}",)),
  (0.22, INTENSIFIED, ("{be} very", "{be} truly")),
  (0.13, HEDGED, ("{be} fairly", "{be} rather")),
  (0.16, TURN, ("{be} not", "{be}n't", "{be} never")),
  (0.06, TURN * INTENSIFIED, ("{be} not very", "{be}n't very")),
)
ACTS = (  # the soup <act> us; we <act> the soup
  (0.55, 1.0, ("{past}",)),
  (0.15, INTENSIFIED, ("really {past}", "truly {past}")),
  (0.10, HEDGED, ("somewhat {past}", "rather {past}")),
  (0.20, TURN, ("did not {base}", "didn't {base}", "hardly {past}", "never {past}")),
)
INTENTS = (  # I <intent> recommend it
  (0.45, 1.0, ("would",)),
  (0.15, INTENSIFIED, ("would definitely", "would certainly")),
  (0.20, HEDGED, ("would probably", "would perhaps")),
  (0.20, TURN, ("would not", "wouldn't", "would never")),
)
LEADS = ("", "overall, ", "in the end, ", "all in all, ")
HEDGING_TAILS = (", I suppose", ", I guess")
TAILED = 0.1  # probability that a statement without a hedge gets one of these tails

# The words by which the reward recognizes negations, intensifiers and hedges. Every wording above
# must contain words of these sets that give its factor, and no others.
NEGATORS = frozenset(("not", "never", "hardly"))  # and every word that ends in n't
INTENSIFIERS = frozenset(("very", "really", "truly", "extremely", "definitely", "certainly"))
HEDGES = frozenset(
  ("somewhat", "fairly", "rather", "little", "probably", "perhaps", "suppose", "guess")
)
CONTRASTS, ADDITIONS = (", but ", ", yet "), (", and ",)
JOINED = 0.7  # probability that the two statements of a review are in one sentence
VERDICT_FIRST = 0.3  # probability that the verdict precedes the aspect
BREAKS = frozenset((".", "!", "?", ";", "but", "yet", "and"))  # end a statement for the reward


def past(verb: str) -> str:
  """Returns the past tense of a regular verb."""
  return verb + ("d" if verb.endswith("e") else "ed")


def _values() -> dict[str, int]:
  """Returns the strength of every word of sentiment, in all its forms."""
  values = {"recommend": 2, "again": 2, "avoid": -2, "against": -2}
  for table in (GENERAL, FEELINGS, *TRAITS.values(), LIKING, STRIKING):
    for strength, words in table.items():
      values |= dict.fromkeys(words.split(), strength)
  for table in (LIKING, STRIKING):
    for strength, verbs in table.items():
      values |= {past(verb): strength for verb in verbs.split()}
  return values


VALUE = _values()  # word of sentiment -> strength
