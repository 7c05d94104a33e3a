"""Gaze Attention: per query, the few regions of pictures that it needs."""

from rave_jax.attention.gaze.config import Gaze, TopKSchedule

__all__ = ["Gaze", "TopKSchedule"]
