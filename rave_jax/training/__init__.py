"""Training: its config, state, objective, pure step, and the loop that owns effects."""
