"""Tests, in folders that mirror the package; `support` has what they share."""
