"""The tensors of decoders, which families share."""

from __future__ import annotations

from rave_jax.families.base import TensorRule
from rave_jax.families.config import DeltaConfig, TextConfig

Tensors = list[tuple[str, str, tuple[int, ...]]]
"""(key, path, shape) inside a layer."""


def decoder_tensors(text: TextConfig) -> list[TensorRule]:
    """Every tensor of the decoder, its embedding and its head, under the keys of Llama's checkpoints. Layers with the
    gated delta rule have those of Qwen3-Next's."""
    D = text.hidden_size
    rules = [TensorRule("model.embed_tokens.weight", "embed.weight", None, None, (text.vocab_size, D))]
    for n, kind in enumerate(text.layer_kinds):
        mixer = _attention(text) if text.delta is None or kind.mixer == "attention" else _delta(text.delta, D)
        layer = [
            *mixer,
            *_mlp(text),
            ("input_layernorm.weight", f"{kind.mixer}_norm.weight", (D,)),
            ("post_attention_layernorm.weight", "mlp_norm.weight", (D,)),
        ]
        rules += [TensorRule(f"model.layers.{n}.{key}", path, n, "decoder", shape) for key, path, shape in layer]
    rules.append(TensorRule("model.norm.weight", "decoder.norm.weight", None, None, (D,)))
    if not text.tie_embeddings:
        rules.append(TensorRule("lm_head.weight", "lm_head.weight", None, None, (text.vocab_size, D)))
    return rules


def _attention(text: TextConfig) -> Tensors:
    D, h = text.hidden_size, text.head_dim
    out = text.num_heads * h
    widths = {"query": 2 * out if text.output_gate else out}
    widths |= dict.fromkeys(("key", "value"), text.num_kv_heads * h)
    tensors: Tensors = []
    for name, width in widths.items():
        tensors.append((f"self_attn.{name[0]}_proj.weight", f"attention.{name}.weight", (width, D)))
        if text.qkv_bias:
            tensors.append((f"self_attn.{name[0]}_proj.bias", f"attention.{name}.bias", (width,)))
    if text.qk_norm:
        tensors += [
            (f"self_attn.{name[0]}_norm.weight", f"attention.{name}_norm.weight", (h,)) for name in ("query", "key")
        ]
    return [*tensors, ("self_attn.o_proj.weight", "attention.output.weight", (D, out))]


def _delta(delta: DeltaConfig, D: int) -> Tensors:
    C, H, out = delta.channels, delta.value_heads, delta.value_heads * delta.value_dim
    inside: Tensors = [
        ("in_proj_qkv.weight", "qkv.weight", (C, D)),
        ("in_proj_z.weight", "gate.weight", (out, D)),
        ("in_proj_b.weight", "strength.weight", (H, D)),
        ("in_proj_a.weight", "decay.weight", (H, D)),
        ("conv1d.weight", "conv", (C, 1, delta.conv_width)),
        ("dt_bias", "decay_bias", (H,)),
        ("A_log", "decay_log", (H,)),
        ("norm.weight", "norm.weight", (delta.value_dim,)),
        ("out_proj.weight", "output.weight", (D, out)),
    ]
    return [(f"linear_attn.{key}", f"delta.{path}", shape) for key, path, shape in inside]


def _mlp(text: TextConfig) -> Tensors:
    D, F = text.hidden_size, text.mlp_size
    return [
        ("mlp.gate_proj.weight", "mlp.gate.weight", (F, D)),
        ("mlp.up_proj.weight", "mlp.up.weight", (F, D)),
        ("mlp.down_proj.weight", "mlp.down.weight", (D, F)),
    ]
