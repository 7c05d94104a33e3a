"""Which tensor of a checkpoint is which parameter, keys in the style of the released index files."""

from __future__ import annotations

from rave_jax.families.base import TensorRule
from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.shared.decoder import decoder_tensors
from rave_jax.families.shared.experts import ExpertFormat, separate
from rave_jax.families.shared.grids.tensors import attention_tensors, patch_tensors
from rave_jax.families.shared.position_table.config import TableTowerConfig
from rave_jax.families.shared.tower_tensors import layer_norm, linear

TEXT, INSIDE = "model.", "model.language_model."
"""Beginning of the decoder's keys, as text models and as these models have it."""


def model_tensors(config: VlmConfig, experts: ExpertFormat = separate) -> tuple[TensorRule, ...]:
    """Every tensor of a model with such a tower.

    Args:
        config: of the model.
        experts: how checkpoints hold the experts of a layer.
    """
    decoder = [
        rule._replace(hf_key=INSIDE + rule.hf_key.removeprefix(TEXT)) if rule.hf_key.startswith(TEXT) else rule
        for rule in decoder_tensors(config.text, experts)
    ]
    return (*tower_tensors(tower_of(config, TableTowerConfig)), *decoder)


def tower_tensors(vision: TableTowerConfig) -> list[TensorRule]:
    """Every tensor of the tower and its mergers."""
    D, F, joined = vision.hidden_size, vision.mlp_size, vision.hidden_size * vision.merge_unit
    rules = [
        *patch_tensors(vision),
        TensorRule("visual.patch_embed.proj.bias", "vision.patch.bias", None, None, (D,)),
        TensorRule("visual.pos_embed.weight", "vision.table.weight", None, None, (vision.table_side**2, D)),
    ]
    for n in range(vision.depth):
        key = f"visual.blocks.{n}"
        rules += attention_tensors(vision, n)
        rules += linear(f"{key}.mlp.linear_fc1", "mlp.first", F, D, n)
        rules += linear(f"{key}.mlp.linear_fc2", "mlp.second", D, F, n)
        rules += layer_norm(f"{key}.norm1", "attention_norm", D, n) + layer_norm(f"{key}.norm2", "mlp_norm", D, n)
    mergers = [("visual.merger", "vision.merger", D)]
    for n in range(len(vision.deep_blocks)):
        mergers.append((f"visual.deepstack_merger_list.{n}", f"vision.deep_mergers.{n}", joined))
    for key, path, width in mergers:
        rules += layer_norm(f"{key}.norm", f"{path}.norm", width)
        rules += linear(f"{key}.linear_fc1", f"{path}.first", joined, joined)
        rules += linear(f"{key}.linear_fc2", f"{path}.second", vision.out_size, joined)
    return [rule._replace(hf_key=f"model.{rule.hf_key}") for rule in rules]
