"""The tensors of a Llama-shaped decoder, which families share."""

from __future__ import annotations

from rave_jax.families.base import LayerTensor, TensorRule
from rave_jax.families.config import TextConfig
from rave_jax.families.experts import ExpertLayout, separate


def decoder_tensors(text: TextConfig, experts: ExpertLayout = separate) -> list[TensorRule]:
    """Every tensor of the decoder, its embedding and its head, under the keys of Llama's checkpoints.

    Args:
        text: the decoder.
        experts: how checkpoints hold the experts of a layer.
    """
    D, F, h = text.hidden_size, text.mlp_size, text.head_dim
    widths = {"query": text.num_heads * h, "key": text.num_kv_heads * h, "value": text.num_kv_heads * h}
    rules = [TensorRule("model.embed_tokens.weight", "embed.weight", None, None, (text.vocab_size, D))]
    for n, kind in enumerate(text.layer_kinds):
        layer: list[LayerTensor] = []
        for name, width in widths.items():
            layer.append(LayerTensor(f"self_attn.{name[0]}_proj.weight", f"attention.{name}.weight", (width, D)))
            if text.qkv_bias:
                layer.append(LayerTensor(f"self_attn.{name[0]}_proj.bias", f"attention.{name}.bias", (width,)))
        if text.qk_norm:
            layer += [
                LayerTensor(f"self_attn.{name[0]}_norm.weight", f"attention.{name}_norm.weight", (h,))
                for name in ("query", "key")
            ]
        layer.append(LayerTensor("self_attn.o_proj.weight", "attention.output.weight", (D, widths["query"])))
        if kind.mlp == "experts" and text.experts is not None:
            layer.append(LayerTensor("mlp.gate.weight", "mlp.router.weight", (text.experts.count, D)))
            layer += experts(text.experts, D)
        else:
            layer += [
                LayerTensor("mlp.gate_proj.weight", "mlp.gate.weight", (F, D)),
                LayerTensor("mlp.up_proj.weight", "mlp.up.weight", (F, D)),
                LayerTensor("mlp.down_proj.weight", "mlp.down.weight", (D, F)),
            ]
        layer += [
            LayerTensor("input_layernorm.weight", "attention_norm.weight", (D,)),
            LayerTensor("post_attention_layernorm.weight", "mlp_norm.weight", (D,)),
        ]
        rules += [tensor.rule(f"model.layers.{n}.", n, "decoder") for tensor in layer]
    rules.append(TensorRule("model.norm.weight", "decoder.norm.weight", None, None, (D,)))
    if not text.tie_embeddings:
        rules.append(TensorRule("lm_head.weight", "lm_head.weight", None, None, (text.vocab_size, D)))
    return rules
