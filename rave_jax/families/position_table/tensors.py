"""Which tensor of a checkpoint is which parameter of such a tower, keys in the style of the released index files."""

from __future__ import annotations

from rave_jax.families.base import TensorRule
from rave_jax.families.grids.tensors import attention_tensors, patch_tensors
from rave_jax.families.position_table.config import TableTowerConfig
from rave_jax.families.tower_tensors import layer_norm, linear


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
