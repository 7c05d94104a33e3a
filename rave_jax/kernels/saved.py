"""Names of values that a rematerialisation policy may keep (`models.stack.POLICIES`).

A kernel with a backward pass of its own needs its output there. Under a policy that keeps these values, the backward
pass does not run the kernel's forward pass again.
"""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name

ATTENTION = "attention"
"""Output and log-sum-exp of attention."""
GROUPED = "grouped_product"
"""Results of grouped matmuls."""
LAYER_INPUT = "layer_input"
"""What enters a layer."""


def of_attention(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same values, by their name."""
    return checkpoint_name(out, ATTENTION), checkpoint_name(lse, ATTENTION)
