"""Models of these families that run in milliseconds, for tests."""

from __future__ import annotations

from typing import Any

from rave_jax.families.config import TextConfig, TowerConfig, VlmConfig


def mrope_thirds(half: int, side: int) -> tuple[int, int, int]:
    """Frequencies of time, and of height and width, which have `side` each; `half` in all."""
    return half - 2 * side, side, side


def tiny_model(family: str, vision: TowerConfig, *, vocab_size: int, **text: Any) -> VlmConfig:
    """A model around a tower. Placeholder and marker ids are the last five of the vocabulary; `text` has the decoder's
    fields beside its width, which is that of the tower's tokens, and its mlp, which is twice as wide."""
    width = vision.out_size
    decoder = TextConfig(vocab_size=vocab_size, hidden_size=width, mlp_size=2 * width, **text)
    names = ("image", "video", "vision_start", "vision_end")
    ids = {f"{name}_token_id": vocab_size - 1 - n for n, name in enumerate(names)}
    return VlmConfig(text=decoder, vision=vision, **ids, eos_token_ids=(vocab_size - 5,), family=family)
