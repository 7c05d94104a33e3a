"""The tensors of a Llama-shaped decoder, which families share."""

from __future__ import annotations

from rave_jax.families.base import TensorRule
from rave_jax.families.config import TextConfig


def decoder_tensors(text: TextConfig) -> list[TensorRule]:
    """Every tensor of the decoder, its embedding and its head, under the keys of Llama's checkpoints."""
    D, F, h = text.hidden_size, text.mlp_size, text.head_dim
    widths = {"query": text.num_heads * h, "key": text.num_kv_heads * h, "value": text.num_kv_heads * h}
    rules = [TensorRule("model.embed_tokens.weight", "embed.weight", None, None, (text.vocab_size, D))]
    for n in range(text.num_layers):
        layer: list[tuple[str, str, tuple[int, ...]]] = []
        for name, width in widths.items():
            layer.append((f"self_attn.{name[0]}_proj.weight", f"attention.{name}.weight", (width, D)))
            if text.qkv_bias:
                layer.append((f"self_attn.{name[0]}_proj.bias", f"attention.{name}.bias", (width,)))
        if text.qk_norm:
            layer += [
                (f"self_attn.{name[0]}_norm.weight", f"attention.{name}_norm.weight", (h,)) for name in ("query", "key")
            ]
        layer += [
            ("self_attn.o_proj.weight", "attention.output.weight", (D, widths["query"])),
            ("mlp.gate_proj.weight", "mlp.gate.weight", (F, D)),
            ("mlp.up_proj.weight", "mlp.up.weight", (F, D)),
            ("mlp.down_proj.weight", "mlp.down.weight", (D, F)),
            ("input_layernorm.weight", "attention_norm.weight", (D,)),
            ("post_attention_layernorm.weight", "mlp_norm.weight", (D,)),
        ]
        rules += [TensorRule(f"model.layers.{n}.{key}", path, n, "decoder", shape) for key, path, shape in layer]
    rules.append(TensorRule("model.norm.weight", "decoder.norm.weight", None, None, (D,)))
    if not text.tie_embeddings:
        rules.append(TensorRule("lm_head.weight", "lm_head.weight", None, None, (text.vocab_size, D)))
    return rules
