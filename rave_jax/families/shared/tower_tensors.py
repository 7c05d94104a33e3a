"""Rules for the tensors that most towers have. With `layer`, a tensor is one of that block; else it stands outside."""

from __future__ import annotations

from rave_jax.families.base import TensorRule


def plain(key: str, path: str, shape: tuple[int, ...], layer: int | None = None) -> TensorRule:
    """One tensor."""
    return TensorRule(key, path, layer, None if layer is None else "vision", shape)


def linear(key: str, path: str, out: int, into: int, layer: int | None = None) -> list[TensorRule]:
    """Weight and bias of a linear."""
    return [*weight(key, path, out, into, layer), plain(f"{key}.bias", f"{path}.bias", (out,), layer)]


def weight(key: str, path: str, out: int, into: int, layer: int | None = None) -> list[TensorRule]:
    """The weight of a linear without a bias."""
    return [plain(f"{key}.weight", f"{path}.weight", (out, into), layer)]


def layer_norm(key: str, path: str, width: int, layer: int | None = None) -> list[TensorRule]:
    """Weight and bias of a LayerNorm."""
    return [plain(f"{key}.{name}", f"{path}.{name}", (width,), layer) for name in ("weight", "bias")]


def rms_norm(key: str, path: str, width: int, layer: int | None = None) -> list[TensorRule]:
    """Weight of an RMSNorm."""
    return [plain(f"{key}.weight", f"{path}.weight", (width,), layer)]
