"""Decoders of gated delta layers and gated attention: their part of an HF config, both ways, and small ones.

Defaults of absent keys are those of transformers' config classes.
"""

from __future__ import annotations

from typing import Any

from rave_jax.config import ConfigError
from rave_jax.families.config import (
    MAX_HEADS,
    MAX_INT32,
    MAX_LAYERS,
    MAX_SIDE,
    MAX_VOCAB,
    MAX_WIDTH,
    DeltaConfig,
    TextConfig,
)
from rave_jax.families.hf import HfConfig, integer, integers, norm_eps, number, only, rope_theta, section
from rave_jax.families.small import SmallSizes

MIXERS = {"linear_attention": "delta", "full_attention": "attention"}
"""`layer_types` of an HF config, and our kinds of layers."""
MROPE_SECTION = (11, 11, 10)
ROTARY_PART = 0.25
UNREAD = ("mtp.",)
"""Keys of a checkpoint that predict several tokens at once. transformers leaves them unread too."""


def parse_text(hf: HfConfig, tied: bool, where: str = "config.json") -> TextConfig:
    """The decoder of an HF config.

    Args:
        hf: what it says of the decoder.
        tied: is the embedding table the output head?
        where: what errors call it.

    Raises:
        ConfigError: a key is missing or asks for what we do not compute.
    """
    only(hf, "hidden_act", ("silu",), where)
    only(hf, "attention_bias", (False,), where)
    only(hf, "attn_output_gate", (True,), where)
    only(hf, "mlp_only_layers", ([], None), where)
    only(hf, "mamba_ssm_dtype", ("float32", None), where)
    # As in transformers: where both are stated, `rope_scaling` counts.
    rope = section(hf, "rope_scaling", where) or section(hf, "rope_parameters", where)
    only({"rope_type": rope.get("rope_type", rope.get("type", "default"))}, "rope_type", ("default", "mrope"), where)
    only(rope, "mrope_interleaved", (True,), where)
    head_dim = integer(hf, "head_dim", MAX_WIDTH, default=256, where=where)
    holder = rope if rope.get("partial_rotary_factor") is not None else hf
    part = number(holder, "partial_rotary_factor", ROTARY_PART, 0, 1, where)
    layers = integer(hf, "num_hidden_layers", MAX_LAYERS, where=where)
    return TextConfig(
        vocab_size=integer(hf, "vocab_size", MAX_VOCAB, where=where),
        hidden_size=integer(hf, "hidden_size", MAX_WIDTH, where=where),
        num_layers=layers,
        num_heads=integer(hf, "num_attention_heads", MAX_HEADS, where=where),
        num_kv_heads=integer(hf, "num_key_value_heads", MAX_HEADS, where=where),
        head_dim=head_dim,
        mlp_size=integer(hf, "intermediate_size", MAX_WIDTH, where=where),
        rms_norm_eps=norm_eps(hf, 1e-6, where),
        rope_theta=rope_theta(hf, rope, 1e4, where),
        mrope_section=integers(rope, "mrope_section", MROPE_SECTION, where),
        mrope_interleaved=True,
        rotary_part=int(head_dim * part),
        qkv_bias=False,
        qk_norm=True,
        output_gate=True,
        norm_plus_one=True,
        tie_embeddings=tied,
        max_position=integer(hf, "max_position_embeddings", MAX_INT32, default=32768, where=where),
        delta=_parse_delta(hf, layers, where),
    )


def _parse_delta(hf: HfConfig, layers: int, where: str) -> DeltaConfig | None:
    """The layers with the gated delta rule; None where every layer attends."""
    interval = integer(hf, "full_attention_interval", MAX_INT32, default=4, where=where)
    kinds = hf.get("layer_types")
    if kinds is None:
        kinds = ["full_attention" if (n + 1) % interval == 0 else "linear_attention" for n in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        found = f"a list of {len(kinds)}" if isinstance(kinds, list) else repr(kinds)
        raise ConfigError(f"{where}: 'layer_types' is {found}, expected a list with a name for each of {layers} layers")
    unknown = next(((n, kind) for n, kind in enumerate(kinds) if kind not in MIXERS), None)
    if unknown is not None:
        names = " or ".join(map(repr, MIXERS))
        raise ConfigError(f"{where}: 'layer_types' says {unknown[1]!r} of layer {unknown[0]}, expected {names}")
    chosen = tuple(n for n, kind in enumerate(kinds) if MIXERS[kind] == "delta")
    if len(chosen) == layers:
        raise ConfigError(f"{where}: 'layer_types' has no 'full_attention', expected at least one layer that attends")
    if not chosen:
        return None
    return DeltaConfig(
        layers=chosen,
        key_heads=integer(hf, "linear_num_key_heads", MAX_HEADS, default=16, where=where),
        value_heads=integer(hf, "linear_num_value_heads", MAX_HEADS, default=32, where=where),
        key_dim=integer(hf, "linear_key_head_dim", MAX_WIDTH, default=128, where=where),
        value_dim=integer(hf, "linear_value_head_dim", MAX_WIDTH, default=128, where=where),
        conv_width=integer(hf, "linear_conv_kernel_dim", MAX_SIDE, default=4, least=2, where=where),
    )


def render_text(text: TextConfig) -> dict[str, Any]:
    """What an HF config says of the decoder."""
    names = {kind: name for name, kind in MIXERS.items()}
    stated = {
        "hidden_act": "silu",
        "attention_bias": False,
        "attn_output_gate": True,
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.mlp_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "max_position_embeddings": text.max_position,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": text.rope_theta,
            "partial_rotary_factor": text.rotary_dim / text.head_dim,
            "mrope_section": list(text.mrope_section),
            "mrope_interleaved": True,
        },
        "layer_types": [names[kind.mixer] for kind in text.layer_kinds],
        "tie_word_embeddings": text.tie_embeddings,
    }
    if (delta := text.delta) is not None:
        stated |= {
            "linear_num_key_heads": delta.key_heads,
            "linear_num_value_heads": delta.value_heads,
            "linear_key_head_dim": delta.key_dim,
            "linear_value_head_dim": delta.value_dim,
            "linear_conv_kernel_dim": delta.conv_width,
        }
    return stated


def small_text(sizes: SmallSizes, vocab_size: int) -> TextConfig:
    """The decoder of a small model: every fourth layer attends, or the last where there are fewer. As in released
    models, heads are twice as wide together as the model; half of their numbers turn."""
    width = sizes.hidden_size // sizes.num_heads
    interval = min(4, sizes.num_layers)
    layers = tuple(n for n in range(sizes.num_layers) if (n + 1) % interval)
    half = width // 2
    side = half // 4
    return TextConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.hidden_size,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=2 * width,
        mlp_size=sizes.mlp_size,
        rope_theta=1e7,
        mrope_section=(half - 2 * side, side, side),
        mrope_interleaved=True,
        rotary_part=width,
        qkv_bias=False,
        qk_norm=True,
        output_gate=True,
        norm_plus_one=True,
        tie_embeddings=False,
        delta=DeltaConfig(layers, sizes.num_kv_heads, sizes.num_heads, width, width) if layers else None,
    )
