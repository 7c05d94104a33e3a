"""Evaluation: what a model answers, how that is scored, and whether it looks at the evidence."""
