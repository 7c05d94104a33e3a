"""Which tensor of a checkpoint is which parameter."""

from __future__ import annotations

from rave_jax.families.base import TensorRule
from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.decoder import decoder_tensors
from rave_jax.families.position_table.config import TableTowerConfig
from rave_jax.families.position_table.tensors import tower_tensors

DECODER = ("model.", "model.language_model.")
"""Beginning of the decoder's keys, as text models and as these models have it."""


def tensors(config: VlmConfig) -> tuple[TensorRule, ...]:
    """Every tensor, keys in the style of the released index files."""
    text, ours = DECODER
    decoder = [
        rule._replace(hf_key=ours + rule.hf_key.removeprefix(text)) if rule.hf_key.startswith(text) else rule
        for rule in decoder_tensors(config.text)
    ]
    return (*tower_tensors(tower_of(config, TableTowerConfig)), *decoder)
