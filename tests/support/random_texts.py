"""Hypothesis strategies for texts, and settings for tests of tokenizers with them."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# Few characters, so that spaces, line feeds and characters of several bytes often meet.
SHORT = st.text(" \n\tgodb🙂é한", min_size=1, max_size=8)


# Every character but surrogates (Cs), which UTF-8 cannot encode.
ANYTHING = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


BY_MANY = settings(
  max_examples=60,
  deadline=None,
  suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
