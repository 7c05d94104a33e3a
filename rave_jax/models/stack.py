"""A run of equal layers as one stacked module and one `lax.scan`, under a named rematerialisation policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from rave_jax.models.config import Remat


class Segment[Layer: nnx.Module](nnx.Module):
    """Layers start .. stop - 1 (global numbers): every parameter has a layer axis in front.

    Args:
        start, stop: global numbers of the layers.
        make: one layer from its key.
        keys: one key per layer of the *whole* stack, so that a layer starts equal however the stack is cut.
    """

    def __init__(self, start: int, stop: int, make: Callable[[jax.Array], Layer], keys: jax.Array):
        self.start = start
        self.stop = stop
        self.layers: Layer = jax.vmap(make)(keys[start:stop])

    def scan(
        self, body: Callable[[Layer, Any, Any], tuple[Any, Any]], carry: Any, xs: Any, remat: Remat
    ) -> tuple[Any, Any]:
        """Fold `body(layer, carry, x) -> (carry, y)` over the layers.

        Args:
            body: one layer. It must return no parameters: whatever it returns is stacked over layers and kept.
            carry: what goes through the layers.
            xs: pytree with the layer axis in front, or None.
            remat: what is kept for the backward pass.
        """

        def step(carry: Any, scanned: tuple[Any, Any]) -> tuple[Any, Any]:
            return body(scanned[0], carry, scanned[1])

        return jax.lax.scan(rematerialised(step, remat), carry, (self.layers, xs))


def rematerialised(step: Callable, remat: Remat) -> Callable:
    """`step` under a policy of `ModelOptions.remat`. The loop already keeps the compiler from undoing it."""
    if remat == "none":
        return step
    policy = None if remat == "full" else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(step, policy=policy, prevent_cse=False)
