"""The tensors of a plain vision transformer, a projector and a text decoder behind it, as HuggingFace names them."""

from __future__ import annotations

from rave_jax.families.base import TensorRule
from rave_jax.families.config import TextConfig
from rave_jax.families.shared.decoder import decoder_tensors
from rave_jax.families.shared.vit import VitConfig, projector_tensors, vit_tensors

DECODER, VISION, PROJECTOR = "language_model.", "vision_tower.vision_model.", "multi_modal_projector."
NEWLINE = "image_newline"
PARTS = ("embeddings", "encoder", "pre_layrnorm", "post_layernorm")
BARE = tuple((f"vision_tower.{part}.", f"{VISION}{part}.") for part in PARTS)
INSIDE = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    (f"model.{PROJECTOR}", PROJECTOR),
    (f"model.{NEWLINE}", NEWLINE),
)
STYLES = (
    # As transformers 5 has its modules, and as it saves them; and as some releases of 4 saved them.
    (*INSIDE, *((f"model.{other}", canonical) for other, canonical in BARE)),
    BARE,
    (*INSIDE, (f"model.{VISION}", VISION)),
)
"""Styles of keys beside the released one (`Family.prefixes`)."""


def vit_and_decoder(vit: VitConfig, text: TextConfig) -> tuple[TensorRule, ...]:
    """Every tensor of the three, keys in the style of the released checkpoints."""
    decoder = [rule._replace(hf_key=f"{DECODER}{rule.hf_key}") for rule in decoder_tensors(text)]
    return (*vit_tensors(vit, VISION), *projector_tensors(vit, PROJECTOR), *decoder)
