"""Experts in HF configs and checkpoints: what families with such layers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rave_jax.config import ConfigError
from rave_jax.families.base import Cut, LayerTensor
from rave_jax.families.config import MAX_EXPERTS, MAX_LAYERS, MAX_WIDTH, ExpertsConfig
from rave_jax.families.hf import HfConfig, flag, integer, integers, number

ExpertFormat = Callable[[ExpertsConfig, int], list[LayerTensor]]
"""(experts, width D) to the tensors of a layer's experts, without the router."""


def parse_experts(
    hf: HfConfig,
    where: str = "config.json",
    *,
    count: int | None,
    chosen: int = 8,
    mlp_size: int = 768,
    normalise: bool | None = None,
) -> ExpertsConfig:
    """The experts of a config in the style of Qwen's.

    Args:
        hf: the decoder's config.
        where: names it in messages.
        count: experts of a config that does not say it; None: it has to.
        chosen, mlp_size: experts of a token, and the width of each, of a config that does not say it.
        normalise: what the model does with probabilities of chosen experts, whatever the config says; None: what
            `norm_topk_prob` says.

    Raises:
        ConfigError: a key is of the wrong kind or out of range.
    """
    # transformers 5 writes the number under another name than the releases have.
    both = [integer(hf, key, MAX_EXPERTS, where=where) for key in ("num_experts", "num_local_experts") if hf.get(key)]
    if len(set(both)) > 1:
        raise ConfigError(f"{where}: 'num_experts' is {both[0]}, expected num_local_experts {both[1]}")
    experts = both[0] if both else integer(hf, "num_experts", MAX_EXPERTS, default=count, where=where)
    return ExpertsConfig(
        count=experts,
        chosen=integer(hf, "num_experts_per_tok", experts, default=chosen, where=where),
        mlp_size=integer(hf, "moe_intermediate_size", MAX_WIDTH, default=mlp_size, where=where),
        normalise=flag(hf, "norm_topk_prob", where) if normalise is None else normalise,
        balance=number(hf, "router_aux_loss_coef", 0.001, 0, 1e6, where),
        every=integer(hf, "decoder_sparse_step", MAX_LAYERS, default=1, where=where),
        dense_layers=integers(hf, "mlp_only_layers", (), where),
    )


def render_experts(experts: ExpertsConfig) -> dict[str, Any]:
    """Keys of an HF config that `parse_experts` reads."""
    return {
        "num_experts": experts.count,
        "num_experts_per_tok": experts.chosen,
        "moe_intermediate_size": experts.mlp_size,
        "norm_topk_prob": experts.normalise,
        "router_aux_loss_coef": experts.balance,
        "decoder_sparse_step": experts.every,
        "mlp_only_layers": list(experts.dense_layers),
    }


def separate(experts: ExpertsConfig, width: int) -> list[LayerTensor]:
    """Three tensors for each expert, as Qwen3-MoE is released."""
    shapes = {"gate": (experts.mlp_size, width), "up": (experts.mlp_size, width), "down": (width, experts.mlp_size)}
    return [
        LayerTensor(f"mlp.experts.{e}.{name}_proj.weight", f"mlp.{name}.weight", shape, entry=e)
        for e in range(experts.count)
        for name, shape in shapes.items()
    ]


def fused(experts: ExpertsConfig, width: int) -> list[LayerTensor]:
    """Two tensors for all experts, gate and up side by side, [out, in], as transformers 5 keeps them."""
    E, F = experts.count, experts.mlp_size
    both, key = (E, 2 * F, width), "mlp.experts.gate_up_proj"
    return [
        LayerTensor(key, "mlp.gate.weight", both, cut=Cut(1, 0, 2)),
        LayerTensor(key, "mlp.up.weight", both, cut=Cut(1, 1, 2)),
        LayerTensor("mlp.experts.down_proj", "mlp.down.weight", (E, width, F)),
    ]


def fused_swapped(experts: ExpertsConfig, width: int) -> list[LayerTensor]:
    """The same two tensors, [in, out], as Qwen3-VL-MoE is released."""
    E, F = experts.count, experts.mlp_size
    both, key = (E, width, 2 * F), "mlp.experts.gate_up_proj"
    return [
        LayerTensor(key, "mlp.gate.weight", both, cut=Cut(2, 0, 2), swapped=True),
        LayerTensor(key, "mlp.up.weight", both, cut=Cut(2, 1, 2), swapped=True),
        LayerTensor("mlp.experts.down_proj", "mlp.down.weight", (E, F, width), swapped=True),
    ]
