"""Procedures that run a model to find a mechanism's settings; they are handed a callable and never see the model."""
