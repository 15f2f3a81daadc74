"""Statistics, figures and verdicts of finished runs."""
