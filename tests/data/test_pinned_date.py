"""A template that writes today's date writes the run's first day, whenever it is rendered."""

import datetime

import pytest

from dpo_jax.data.fields import Conversation
from dpo_jax.data.tokenizer import load_tokenizer
from tests.support import small_tokenizers

FIRST_DAY = datetime.datetime(2026, 11, 7, 9, 5, 3)
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
ASKED = Conversation([{"role": "user", "content": "hi"}])


def rendered(folder, template, moment=FIRST_DAY):
  tokenizer = load_tokenizer(small_tokenizers.byte_level(folder, chat_template=template))
  dated = bool(moment) and tokenizer.template.pin_date(moment)
  return dated, tokenizer.template._render(ASKED)


@pytest.mark.parametrize(
  ("begin", "text"),
  [
    ('{{ strftime_now("%d %b %Y") }}', "07 Nov 2026"),  # Llama 3.2
    ('{{- strftime_now("%Y-%m-%d %H:%M:%S") }}', "2026-11-07 09:05:03"),
    ('{%- set d = strftime_now("%-d %B") %}{{ d }}', "7 November"),
    ('{% if strftime_now is defined %}{{ strftime_now("%A") }}{% endif %}', "Saturday"),
    ('{% macro head() %}{{ strftime_now("%y") }}{% endmacro %}{{ head() }}', "26"),
    # The line break that it begins with is a part of it.
    ('\n{{ strftime_now("%j") }}', "\n311"),
  ],
)
def test_the_date_is_that_of_the_first_day(tmp_path, begin, text):
  assert rendered(tmp_path, begin + TURNS) == (True, text + "<user>hi")


def test_a_template_without_a_date_stays_as_it_is(tmp_path):
  assert rendered(tmp_path, "\n" + TURNS) == (False, "\n<user>hi")


def test_named_templates_are_pinned_too(tmp_path):
  named = [
    {"name": "default", "template": '{{ strftime_now("%Y") }}' + TURNS},
    {"name": "tool_use", "template": "tools" + TURNS},
  ]
  assert rendered(tmp_path, named) == (True, "2026<user>hi")
