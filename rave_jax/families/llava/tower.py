"""The vision tower of LLaVA."""

from rave_jax.models.vit import VitTower as Tower

__all__ = ["Tower"]
