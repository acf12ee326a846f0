"""Reports of a run: its metrics, alerts, plots, and one page with all of them.

`loggers` writes metrics, `alerts` finds failures in them, `plots` draws them, and `report` makes
the page.
"""
