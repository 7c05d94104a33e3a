"""The tensors of decoders, which families share."""

from __future__ import annotations

from rave_jax.families.base import LayerTensor, TensorRule
from rave_jax.families.config import DeltaConfig, LayerKind, TextConfig
from rave_jax.families.shared.experts import ExpertFormat, separate


def decoder_tensors(text: TextConfig, experts: ExpertFormat = separate) -> list[TensorRule]:
    """Every tensor of the decoder, its embedding and its head, under the keys of Llama's checkpoints. Layers with the
    gated delta rule have those of Qwen3-Next's.

    Args:
        text: the decoder.
        experts: how checkpoints hold the experts of a layer.
    """
    D = text.hidden_size
    rules = [TensorRule("model.embed_tokens.weight", "embed.weight", None, None, (text.vocab_size, D))]
    for n, kind in enumerate(text.layer_kinds):
        layer = [
            *(_attention(text) if text.delta is None or kind.mixer == "attention" else _delta(text.delta, D)),
            *_mlp(text, kind, experts),
            LayerTensor("input_layernorm.weight", f"{kind.mixer}_norm.weight", (D,)),
            LayerTensor("post_attention_layernorm.weight", "mlp_norm.weight", (D,)),
        ]
        rules += [tensor.rule(f"model.layers.{n}.", n, "decoder") for tensor in layer]
    rules.append(TensorRule("model.norm.weight", "decoder.norm.weight", None, None, (D,)))
    if not text.tie_embeddings:
        rules.append(TensorRule("lm_head.weight", "lm_head.weight", None, None, (text.vocab_size, D)))
    return rules


def _attention(text: TextConfig) -> list[LayerTensor]:
    D, h = text.hidden_size, text.head_dim
    out = text.num_heads * h
    widths = {"query": 2 * out if text.output_gate else out}
    widths |= dict.fromkeys(("key", "value"), text.num_kv_heads * h)
    tensors: list[LayerTensor] = []
    for name, width in widths.items():
        tensors.append(LayerTensor(f"self_attn.{name[0]}_proj.weight", f"attention.{name}.weight", (width, D)))
        if text.qkv_bias:
            tensors.append(LayerTensor(f"self_attn.{name[0]}_proj.bias", f"attention.{name}.bias", (width,)))
    if text.qk_norm:
        tensors += [
            LayerTensor(f"self_attn.{name[0]}_norm.weight", f"attention.{name}_norm.weight", (h,))
            for name in ("query", "key")
        ]
    return [*tensors, LayerTensor("self_attn.o_proj.weight", "attention.output.weight", (D, out))]


def _delta(delta: DeltaConfig, D: int) -> list[LayerTensor]:
    C, H, out = delta.channels, delta.value_heads, delta.value_heads * delta.value_dim
    inside: list[tuple[str, str, tuple[int, ...]]] = [
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
    return [LayerTensor(f"linear_attn.{key}", f"delta.{path}", shape) for key, path, shape in inside]


def _mlp(text: TextConfig, kind: LayerKind, experts: ExpertFormat) -> list[LayerTensor]:
    D, F = text.hidden_size, text.mlp_size
    if kind.mlp == "experts" and text.experts is not None:
        router = LayerTensor("mlp.gate.weight", "mlp.router.weight", (text.experts.count, D))
        return [router, *experts(text.experts, D)]
    return [
        LayerTensor("mlp.gate_proj.weight", "mlp.gate.weight", (F, D)),
        LayerTensor("mlp.up_proj.weight", "mlp.up.weight", (F, D)),
        LayerTensor("mlp.down_proj.weight", "mlp.down.weight", (D, F)),
    ]
