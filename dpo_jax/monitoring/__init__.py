"""What a run reports: metrics, alerts, plots, the report."""
