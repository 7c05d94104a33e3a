"""FLOPs of a train step, by formula from the shapes of the model.

A multiply-add is 2 FLOPs. A matrix costs 2 FLOPs for each of its numbers and each token it reads, forward; the same
again for the gradient of what it reads, where something below it is trained, and again for its own gradient, where it
is trained. Scores and values of attention cost 4 H h for each query and key that it may see, H query heads of width h:
causal over whole rows in the decoder, so that packed rows take less; inside windows, or inside pictures as large as the
config allows, in the tower. Norms, softmax and the optimizer count nothing, and regions that a mechanism skips count.

What rematerialisation computes again is no part of the model's FLOPs; the chip does it all the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from rave_jax.families.config import VlmConfig
from rave_jax.models.config import Remat
from rave_jax.plan.program import largest_row
from rave_jax.training.config import TrainConfig
from rave_jax.training.state import ModelGraph

_LOOKUPS = ("embed.weight", "context.weight", "vision.table.weight")
_CONNECTORS = ("merger", "connector", "projector")


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step over all chips.

    Args:
        model: forward and backward, each once.
        mechanisms: the part of them that the mechanisms add.
        again: what rematerialisation computes again.
    """

    model: float
    mechanisms: float
    again: float

    @property
    def executed(self) -> float:
        """What the chips compute."""
        return self.model + self.again


def step_flops(config: TrainConfig, vlm: VlmConfig, graph: ModelGraph, trained: Mapping[str, bool]) -> StepFlops:
    """FLOPs of one step with full rows.

    Args:
        config: of the run.
        vlm: its model.
        graph: parameters of the model by name.
        trained: parameter -> has it a gradient?
    """
    tokens, patches = largest_row(config)
    rows, text = config.data.rows, vlm.text
    tower = [name for name in graph.names if name.startswith("vision.")]
    below = any(trained[name] for name in tower)
    in_blocks = any(trained[name] for name in tower if not _is_connector(name))
    unit = vlm.vision.merge_unit if vlm.vision is not None else 1
    forward = {"decoder": 0.0, "tower": 0.0, "head": 0.0}
    total = mechanisms = 0.0
    for name in graph.names:
        if name in _LOOKUPS and not (name == "embed.weight" and text.tie_embeddings):
            continue
        part = "tower" if name.startswith("vision.") else "decoder" if name.startswith("decoder.") else "head"
        read = patches / (unit if _is_connector(name) else 1) if part == "tower" else tokens
        share = text.experts.chosen / text.experts.count if text.experts and "experts" in graph.axes[name] else 1.0
        is_gate = ".mechanisms." in name
        if sum(axis != "layers" for axis in graph.axes[name]) < 2 or (name.endswith(".bias") and not is_gate):
            continue
        flops = 2.0 * math.prod(graph.shapes[name].shape) * share * read * rows
        forward[part] += flops
        flows = part != "tower" or (below if _is_connector(name) else in_blocks)
        total += flops * (1 + flows + trained[name])
        mechanisms += flops * (1 + flows + trained[name]) if is_gate else 0.0

    pairs = rows * tokens * (tokens + 1) / 2
    attending = text.num_layers - (0 if text.delta is None else len(text.delta.layers))
    attention = 4.0 * text.num_heads * text.head_dim * pairs * attending
    attention += 0.0 if text.delta is None else _delta(vlm) * rows * tokens
    gates = sum(
        2.0 * graph.shapes[name].shape[0] * text.num_heads * graph.shapes[name].shape[-1] * pairs
        for name in graph.names
        if ".mechanisms." in name and name.endswith("query_proj")
    )
    of_tower = 0.0 if vlm.vision is None else _tower_pairs(config, vlm, patches) * 4.0 * vlm.vision.hidden_size * rows
    total += 3 * (attention + gates) + of_tower * (3 if in_blocks else 1)
    mechanisms += 3 * gates

    again = _again(config.model.remat, forward["decoder"], attention + gates)
    if in_blocks:
        again += _again(config.model.tower_remat, forward["tower"], of_tower)
    return StepFlops(total, mechanisms, again)


def _again(remat: Remat, matmuls: float, attention: float) -> float:
    """What layers compute again: all that `POLICIES` of `models/stack.py` do not keep. The loss computes no logits
    twice."""
    kept_matmuls = remat in ("none", "dots", "dots_and_attention", "all_dots")
    kept_attention = remat in ("none", "attention", "dots_and_attention", "all_dots")
    return (0.0 if kept_matmuls else matmuls) + (0.0 if kept_attention else attention)


def _is_connector(name: str) -> bool:
    return any(word in name for word in _CONNECTORS)


def _delta(vlm: VlmConfig) -> float:
    """Of a token in all layers of the gated delta rule: the state is decayed, corrected, written to and read."""
    delta = vlm.text.delta
    assert delta is not None
    return 8.0 * delta.value_heads * delta.key_dim * delta.value_dim * len(delta.layers)


def _tower_pairs(config: TrainConfig, vlm: VlmConfig, patches: int) -> float:
    """Pairs of patches of a row that attend to each other, summed over the tower's blocks."""
    tower = vlm.vision
    assert tower is not None
    side, limit = getattr(tower, "patch_size", None), config.data.max_pixels
    picture = patches if side is None or limit is None else min(patches, limit // side**2)
    full = getattr(tower, "full_attention_blocks", None)
    if full is None:
        return float(tower.depth) * patches * picture
    window = min(tower.window_patches, picture)
    return float(patches) * (len(full) * picture + (tower.depth - len(full)) * window)
