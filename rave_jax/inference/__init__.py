"""Generation from a trained model."""

from rave_jax.inference.greedy import Generated, generate

__all__ = ["Generated", "generate"]
