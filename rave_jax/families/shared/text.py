"""Configs of Llama-shaped text decoders: the keys that families read and write alike.

`where` names the object in messages: `config.json`, or `config.json: text_config` where a family with pictures holds
the decoder's config inside its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from rave_jax.config import ConfigError
from rave_jax.families.config import MAX_HEADS, MAX_INT32, MAX_LAYERS, MAX_VOCAB, MAX_WIDTH, DynamicRope, TextConfig
from rave_jax.families.hf import HfConfig, flag, integer, need, norm_eps, number, only, rope_theta, section


class TextDefaults(NamedTuple):
    """What transformers' config class of a family takes for keys that a config leaves out; None: they have to be there.

    Fields:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: as in HF configs.
        num_key_value_heads: None: as many as query heads.
        head_dim: None: hidden_size / num_attention_heads.
        rms_norm_eps, rope_theta, max_position_embeddings: as in HF configs.
    """

    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4
    max_position_embeddings: int = 32768


def rope_section(hf: HfConfig, where: str = "config.json") -> HfConfig:
    """What a config says of RoPE: `rope_scaling` as released, `rope_parameters` as transformers 5 saves it; {} where
    it says nothing."""
    return section(hf, "rope_scaling", where) or section(hf, "rope_parameters", where)


def rope_type(rope: HfConfig, allowed: tuple[str, ...] = ("default",), where: str = "config.json") -> str:
    """The type of RoPE scaling, `default` where none is stated.

    Raises:
        ConfigError: it is none of `allowed`, or only a part of each head turns.
    """
    stated = rope.get("rope_type", rope.get("type", "default"))
    only({"rope_type": stated}, "rope_type", allowed, where)
    only(rope, "partial_rotary_factor", (1, 1.0), where)
    return stated


def dynamic_rope(rope: HfConfig, max_position: int, where: str = "config.json") -> DynamicRope | None:
    """RoPE of type `dynamic`, or None where it is not scaled.

    Args:
        rope: `rope_scaling` or `rope_parameters`.
        max_position: `max_position_embeddings`, the longest text whose frequencies are not divided.
        where: names the config in messages.

    Raises:
        ConfigError: another type of scaling, or its factor is missing or out of range.
    """
    if rope_type(rope, ("default", "dynamic"), where) == "default":
        return None
    where = f"{where}: RoPE of type 'dynamic'"
    need(rope, "factor", where)
    return DynamicRope(number(rope, "factor", 0, 1e-6, 1e6, where), max_position)


def render_dynamic(text: TextConfig) -> dict[str, Any]:
    """`rope_scaling` of an HF config that `dynamic_rope` reads; nothing without."""
    scaling = text.rope_scaling
    if not isinstance(scaling, DynamicRope):
        return {}
    return {"rope_scaling": {"rope_type": "dynamic", "factor": scaling.factor}}


def text_fields(hf: HfConfig, defaults: TextDefaults, where: str = "config.json") -> dict[str, Any]:
    """Fields of a `TextConfig` that every such decoder states.

    Args:
        hf: the decoder's config.
        defaults: for keys that it leaves out.
        where: names the config in messages.

    Raises:
        ConfigError: a key is missing, of the wrong kind or out of range, or asks for what is not computed.
    """
    only(hf, "hidden_act", ("silu",), where)
    width = integer(hf, "hidden_size", MAX_WIDTH, default=defaults.hidden_size, where=where)
    heads = integer(hf, "num_attention_heads", MAX_HEADS, default=defaults.num_attention_heads, where=where)
    # In transformers null means as many as query heads, and an absent key the default of the config's class.
    kv_heads = defaults.num_key_value_heads if "num_key_value_heads" not in hf else None
    head_dim = defaults.head_dim
    if head_dim is None and hf.get("head_dim") is None:
        if width % heads:
            raise ConfigError(f"{where}: 'hidden_size' is {width}, expected a multiple of num_attention_heads {heads}")
        head_dim = width // heads
    return {
        "vocab_size": integer(hf, "vocab_size", MAX_VOCAB, default=defaults.vocab_size, where=where),
        "hidden_size": width,
        "num_layers": integer(hf, "num_hidden_layers", MAX_LAYERS, default=defaults.num_hidden_layers, where=where),
        "num_heads": heads,
        "num_kv_heads": integer(hf, "num_key_value_heads", MAX_HEADS, default=kv_heads or heads, where=where),
        "head_dim": integer(hf, "head_dim", MAX_WIDTH, default=head_dim, where=where),
        "mlp_size": integer(hf, "intermediate_size", MAX_WIDTH, default=defaults.intermediate_size, where=where),
        "rms_norm_eps": norm_eps(hf, defaults.rms_norm_eps, where),
        "rope_theta": rope_theta(hf, rope_section(hf, where), defaults.rope_theta, where),
        "tie_embeddings": flag(hf, "tie_word_embeddings", where),
        "max_position": integer(
            hf, "max_position_embeddings", MAX_INT32, default=defaults.max_position_embeddings, where=where
        ),
    }


def window_fields(hf: HfConfig, where: str = "config.json", *, window_from: int = 28) -> dict[str, Any]:
    """Fields of a `TextConfig` for the sliding window, as Qwen's decoders state it.

    Args:
        hf: the decoder's config.
        where: names the config in messages.
        window_from: `max_window_layers` of a config that leaves it out.

    Raises:
        ConfigError: a key is of the wrong kind or out of range.
    """
    windowed = flag(hf, "use_sliding_window", where)
    window = integer(hf, "sliding_window", MAX_INT32, default=4096, where=where)
    first = integer(hf, "max_window_layers", MAX_INT32, default=window_from, least=0, where=where)
    return {
        "sliding_window": window if windowed and hf.get("sliding_window", 4096) is not None else None,
        "window_from": first if windowed else 0,
    }


def render_text(text: TextConfig) -> dict[str, Any]:
    """Keys of an HF config that `text_fields` reads."""
    return {
        "hidden_act": "silu",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.mlp_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "max_position_embeddings": text.max_position,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "tie_word_embeddings": text.tie_embeddings,
    }


def render_window(text: TextConfig) -> dict[str, Any]:
    """Keys of an HF config that `window_fields` reads."""
    windowed = text.sliding_window is not None
    return {
        "use_sliding_window": windowed,
        "sliding_window": text.sliding_window,
        "max_window_layers": text.window_from if windowed else text.num_layers,
    }


def render_eos(ids: tuple[int, ...]) -> int | list[int] | None:
    """`eos_token_id` of an HF config."""
    return (ids[0] if len(ids) == 1 else list(ids)) if ids else None
