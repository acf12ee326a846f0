"""docs/configuration.md has every field of a run, with the default that the code has."""

from tests.tools import configuration_page


def test_the_page_is_what_defaults_py_says():
  page = configuration_page.PAGE.read_text(encoding="utf-8")
  assert page == configuration_page.page(), "run python -m tests.tools.configuration_page"
