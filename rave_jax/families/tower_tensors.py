"""Rules for the tensors that most towers have."""

from __future__ import annotations

from rave_jax.families.base import TensorRule


def linear(key: str, path: str, out: int, into: int, layer: int | None = None) -> list[TensorRule]:
    """Weight and bias of a linear; of block `layer`, or outside the stack."""
    return [
        _rule(f"{key}.weight", f"{path}.weight", (out, into), layer),
        _rule(f"{key}.bias", f"{path}.bias", (out,), layer),
    ]


def layer_norm(key: str, path: str, width: int, layer: int | None = None) -> list[TensorRule]:
    """Weight and bias of a LayerNorm."""
    return [_rule(f"{key}.{name}", f"{path}.{name}", (width,), layer) for name in ("weight", "bias")]


def rms_norm(key: str, path: str, width: int, layer: int | None = None) -> list[TensorRule]:
    """Weight of an RMSNorm."""
    return [_rule(f"{key}.weight", f"{path}.weight", (width,), layer)]


def _rule(key: str, path: str, shape: tuple[int, ...], layer: int | None) -> TensorRule:
    return TensorRule(key, path, layer, None if layer is None else "vision", shape)
