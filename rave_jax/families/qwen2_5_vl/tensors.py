"""Which tensor of a checkpoint is which parameter."""

from __future__ import annotations

from rave_jax.families.base import TensorRule
from rave_jax.families.config import VlmConfig
from rave_jax.families.decoder import decoder_tensors
from rave_jax.families.qwen2_5_vl.config import VisionConfig, tower_of


def tensors(config: VlmConfig) -> tuple[TensorRule, ...]:
    """Every tensor, keys in the style of the released index files."""
    return (*_vision_tensors(tower_of(config)), *decoder_tensors(config.text))


def _vision_tensors(vision: VisionConfig) -> list[TensorRule]:
    D, F, joined, p = vision.hidden_size, vision.mlp_size, vision.hidden_size * vision.merge_unit, vision.patch_size
    patch = (D, vision.in_channels, vision.temporal_patch_size, p, p)
    rules = [TensorRule("visual.patch_embed.proj.weight", "vision.patch.weight", None, None, patch)]
    for n in range(vision.depth):
        linears = {
            "attn.qkv": ("attention.qkv", 3 * D, D),
            "attn.proj": ("attention.output", D, D),
            "mlp.gate_proj": ("mlp.gate", F, D),
            "mlp.up_proj": ("mlp.up", F, D),
            "mlp.down_proj": ("mlp.down", D, F),
        }
        for key, (path, out, into) in linears.items():
            key = f"visual.blocks.{n}.{key}"
            rules.append(TensorRule(f"{key}.weight", f"{path}.weight", n, "vision", (out, into)))
            rules.append(TensorRule(f"{key}.bias", f"{path}.bias", n, "vision", (out,)))
        for key, path in (("norm1", "attention_norm"), ("norm2", "mlp_norm")):
            rules.append(TensorRule(f"visual.blocks.{n}.{key}.weight", f"{path}.weight", n, "vision", (D,)))
    rules.append(TensorRule("visual.merger.ln_q.weight", "vision.merger.norm.weight", None, None, (D,)))
    for key, path, out in (("mlp.0", "first", joined), ("mlp.2", "second", vision.out_size)):
        key, path = f"visual.merger.{key}", f"vision.merger.{path}"
        rules.append(TensorRule(f"{key}.weight", f"{path}.weight", None, None, (out, joined)))
        rules.append(TensorRule(f"{key}.bias", f"{path}.bias", None, None, (out,)))
    return rules
