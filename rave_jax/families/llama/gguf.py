"""Llama's GGUF files, as llama.cpp writes them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from rave_jax.config import ConfigError
from rave_jax.families.config import MAX_HEADS, MAX_INT32, MAX_LAYERS, MAX_VOCAB, MAX_WIDTH, VlmConfig
from rave_jax.families.gguf import WHERE, GgufModels, GgufTensor, Metadata, Split
from rave_jax.families.hf import integer, need, number, only
from rave_jax.families.llama.config import ARCHITECTURE, MODEL_TYPE

NAME = "llama"
KNOWN = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_used_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.type",
    "vocab_size",
)
"""Keys behind the name of the architecture."""
LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
HEAD = "output.weight"


def config(metadata: Metadata, names: Collection[str]) -> dict[str, Any]:
    """The HF config of a file.

    Raises:
        ConfigError: a key is missing, out of range, or asks for what is not computed.
    """
    unknown = [k for k in metadata if k.startswith(f"{NAME}.") and k.removeprefix(f"{NAME}.") not in KNOWN]
    if unknown:
        raise ConfigError(f"{WHERE}: {', '.join(unknown)}: not known, so it may ask for what is not computed")

    def read(key: str, most: int, default: int | None = None) -> int:
        return integer(metadata, f"{NAME}.{key}", most, default=default, where=WHERE)

    for key in ("expert_count", "expert_used_count"):
        only(metadata, f"{NAME}.{key}", (0,), WHERE)
    scaling = f"{NAME}.rope.scaling.type"
    only(metadata, scaling, ("none", "linear"), WHERE)
    eps = f"{NAME}.attention.layer_norm_rms_epsilon"
    need(metadata, eps, WHERE)
    heads, width = read("attention.head_count", MAX_HEADS), read("embedding_length", MAX_WIDTH)
    head_dim = read("attention.key_length", MAX_WIDTH, default=max(width // heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        only(metadata, f"{NAME}.{key}", (head_dim,), WHERE)
    tokens = metadata.get("tokenizer.ggml.tokens")
    stated = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": read("vocab_size", MAX_VOCAB, default=len(tokens) if isinstance(tokens, list) else None),
        "hidden_size": width,
        "intermediate_size": read("feed_forward_length", MAX_WIDTH),
        "num_hidden_layers": read("block_count", MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": read("attention.head_count_kv", MAX_HEADS, default=heads),
        "head_dim": head_dim,
        "max_position_embeddings": read("context_length", MAX_INT32),
        "rms_norm_eps": _shortest(number(metadata, eps, 0, 0, 1, WHERE)),
        "rope_theta": _shortest(number(metadata, f"{NAME}.rope.freq_base", 1e4, 1e-30, 1e30, WHERE)),
        "tie_word_embeddings": HEAD not in names,
    }
    if metadata.get(scaling) == "linear":
        factor = f"{NAME}.rope.scaling.factor"
        need(metadata, factor, WHERE)
        stated["rope_scaling"] = {
            "rope_type": "linear",
            "factor": _shortest(number(metadata, factor, 1, 1e-6, 1e6, WHERE)),
        }
    return stated


def _shortest(value: float) -> float:
    """The shortest number that is the same in float32, in which files hold it: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def tensors(config: VlmConfig) -> dict[str, GgufTensor]:
    """The tensor of a file for each key of a HuggingFace checkpoint."""
    text = config.text
    heads = {"attn_q.weight": text.num_heads, "attn_k.weight": text.num_kv_heads}
    found = {
        "model.embed_tokens.weight": GgufTensor("token_embd.weight"),
        "model.norm.weight": GgufTensor("output_norm.weight"),
    }
    found |= {} if text.tie_embeddings else {"lm_head.weight": GgufTensor(HEAD)}
    for n in range(text.num_layers):
        for name, key in LAYER.items():
            found[f"model.layers.{n}.{key}"] = GgufTensor(f"blk.{n}.{name}", heads.get(name, 0))
    return found


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {"gpt-2": Split(), "smollm": Split(digits=True), "llama-bpe": Split(LLAMA_3)}

GGUF = GgufModels(NAME, config, tensors, SPLITS, sentencepiece=NAME)
