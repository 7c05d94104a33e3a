"""Model families: one record each, found by the `model_type` of a checkpoint's config."""

from rave_jax.models.families.base import Family, TensorRule
from rave_jax.models.families.registry import FAMILIES, family_for, family_named

__all__ = ["FAMILIES", "Family", "TensorRule", "family_for", "family_named"]
