"""A run of equal layers as one stacked module and one `lax.scan`, under a named rematerialisation policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from rave_jax.kernels.saved import ATTENTION, GROUPED, LAYER_INPUT
from rave_jax.models.config import Remat

_policies = jax.checkpoint_policies
POLICIES: Mapping[Remat, Callable[..., Any] | None] = {
    "full": None,
    "attention": _policies.save_only_these_names(ATTENTION),
    # Grouped matmuls are matmuls of weights too.
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(GROUPED)
    ),
    "dots_and_attention": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(GROUPED, ATTENTION)
    ),
    "all_dots": _policies.save_from_both_policies(
        _policies.dots_saveable, _policies.save_only_these_names(GROUPED, ATTENTION)
    ),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""What `jax.checkpoint` keeps under each name of `ModelOptions.remat`; "none" does not come there."""


class LayerRun[Layer: nnx.Module](nnx.Module):
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
        self, body: Callable[[Layer, Any, Any, Any], tuple[Any, Any]], carry: Any, xs: Any, shared: Any, remat: Remat
    ) -> tuple[Any, Any]:
        """Fold `body(layer, carry, x, shared) -> (carry, y)` over the layers.

        Args:
            body: one layer. It must return no parameters: whatever it returns is stacked over layers and kept. It must
                close over no arrays: they go into `shared`.
            carry: what goes through the layers.
            xs: pytree with the layer axis in front, or None.
            shared: pytree that all layers read.
            remat: what is kept for the backward pass.
        """

        def of_layer(carry: Any, scanned: tuple[Any, Any], shared: Any) -> tuple[Any, Any]:
            return body(scanned[0], carry, scanned[1], shared)

        step = rematerialised(of_layer, remat)
        if self.stop - self.start == 1:
            step = backward_in_turn(step)
        return jax.lax.scan(lambda carry, scanned: step(carry, scanned, shared), carry, (self.layers, xs))


def equal_runs(depth: int, join: bool) -> list[tuple[int, int]]:
    """(start, stop) of the runs of a stack whose layers are all alike: one run, or without `join` one for each."""
    return [(0, depth)] if join else [(n, n + 1) for n in range(depth)]


def rematerialised(step: Callable, remat: Remat) -> Callable:
    """`step` under a policy of `ModelOptions.remat`. The loop, or `backward_in_turn`, keeps the compiler from
    undoing it.

    Args:
        step: its first argument is what enters the layer.
        remat: name of the policy.
    """
    if remat == "none":
        return step

    def named(carry: Any, *rest: Any) -> Any:
        return step(jax.tree.map(lambda x: checkpoint_name(x, LAYER_INPUT), carry), *rest)

    return jax.checkpoint(named if remat == "offload" else step, policy=POLICIES[remat], prevent_cse=False)


def backward_in_turn[**P, R](step: Callable[P, R]) -> Callable[P, R]:
    """`step`, whose backward pass starts when the gradient of its result is there, as in a loop.

    The compiler unrolls a loop of one layer. It would then take what the backward pass computes again from the
    forward pass, or compute it long before it is needed: either way all layers' intermediates would be kept at once.
    """

    def backward(pull: Callable, gradient: Any) -> Any:
        pull, gradient = jax.lax.optimization_barrier((pull, gradient))
        return pull(gradient)

    run = jax.custom_vjp(step)
    run.defvjp(lambda *args: jax.vjp(step, *args), backward)
    return run
