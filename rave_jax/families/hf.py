"""Values of an HF config, each checked. Errors name the file and the key, what it is and what is expected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rave_jax.config import ConfigError
from rave_jax.families.config import MAX_HEADS, MAX_INT32, ROPE_THETA, TextConfig

HfConfig = Mapping[str, Any]
"""What a JSON file of an HF directory holds."""


def need(config: HfConfig, key: str, where: str = "config.json") -> Any:
    """A value that the HF config must state.

    Raises:
        ConfigError: it does not.
    """
    if config.get(key) is None:
        raise ConfigError(f"{where}: {key!r} is missing")
    return config[key]


def section(config: HfConfig, key: str, where: str = "config.json") -> HfConfig:
    """An object inside the HF config; {} where it states none.

    Raises:
        ConfigError: the value is something else.
    """
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {key!r} is {_short(value)}, expected an object")
    return value or {}


def needed(config: HfConfig, key: str) -> HfConfig:
    """An object that config.json must have.

    Raises:
        ConfigError: it has none.
    """
    found = section(config, key)
    if not found:
        raise ConfigError(f"config.json: {key!r} is missing")
    return found


def integer(
    config: HfConfig, key: str, most: int, *, default: int | None = None, least: int = 1, where: str = "config.json"
) -> int:
    """An integer of the HF config, from `least` to `most`.

    Raises:
        ConfigError: it is absent without a default, of another kind or out of range.
    """
    value = need(config, key, where) if default is None or config.get(key) is not None else default
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(f"{where}: {key!r} is {_short(value)}, expected an integer from {least} to {most:,}")
    return value


def integers(config: HfConfig, key: str, default: tuple[int, ...], where: str = "config.json") -> tuple[int, ...]:
    """A list of integers of the HF config.

    Raises:
        ConfigError: it is something else.
    """
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, list) or not all(type(n) is int for n in value):
        raise ConfigError(f"{where}: {key!r} is {_short(value)}, expected a list of integers")
    return tuple(value)


def number(config: HfConfig, key: str, default: float, low: float, high: float, where: str = "config.json") -> float:
    """A number of the HF config, from `low` to `high`.

    Raises:
        ConfigError: it is of another kind or out of range.
    """
    value = default if config.get(key) is None else config[key]
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or math.isnan(value) or not low <= value <= high:
        raise ConfigError(f"{where}: {key!r} is {_short(value)}, expected a number from {low:g} to {high:g}")
    return float(value)


def flag(config: HfConfig, key: str, where: str = "config.json") -> bool:
    """true or false of the HF config; false where it states none.

    Raises:
        ConfigError: it is something else.
    """
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{where}: {key!r} is {_short(value)}, expected true or false")
    return bool(value)


def norm_eps(config: HfConfig, default: float, where: str = "config.json") -> float:
    """`rms_norm_eps`."""
    return number(config, "rms_norm_eps", default, 0, 1, where)


def rope_theta(config: HfConfig, rope: HfConfig, default: float, where: str = "config.json") -> float:
    """`rope_theta`, which stands among the rope parameters or beside them."""
    holder = rope if rope.get("rope_theta") is not None else config
    return number(holder, "rope_theta", default, ROPE_THETA[0], ROPE_THETA[1], where)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def only(config: HfConfig, key: str, allowed: tuple[Any, ...], where: str = "config.json") -> None:
    """Refuse what we do not compute; the first of `allowed` is what an absent key means.

    Raises:
        ConfigError: names the key and what is allowed.
    """
    value = config.get(key, allowed[0])
    if value not in allowed:
        raise ConfigError(f"{where}: {key!r} is {value!r}, expected {' or '.join(map(repr, allowed))}")


def check_layer_types(config: HfConfig, text: TextConfig, where: str = "config.json") -> None:
    """Refuse `layer_types` that differ from what the sliding window's own keys say.

    Raises:
        ConfigError: names the first layer that does.
    """
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list):
        raise ConfigError(f"{where}: 'layer_types' is {_short(kinds)}, expected a list with a name for each layer")
    for layer, kind in enumerate(kinds):
        windowed = text.sliding_window is not None and layer >= text.window_from
        expected = "sliding_attention" if windowed else "full_attention"
        if kind != expected:
            raise ConfigError(
                f"{where}: 'layer_types' says {kind!r} of layer {layer}, expected {expected!r} from use_sliding_window "
                "and max_window_layers"
            )


def eos_ids(config: HfConfig, default: int | None = None, where: str = "config.json") -> tuple[int, ...]:
    """`eos_token_id` as a tuple, whether the config says one, several or none.

    Raises:
        ConfigError: it says something else.
    """
    value = config.get("eos_token_id", default)
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(type(i) is int and 0 <= i <= MAX_INT32 for i in ids):
        raise ConfigError(f"{where}: 'eos_token_id' is {_short(value)}, expected a token id or a list of them")
    return ids


def kv_heads(hf: HfConfig, absent: int, heads: int, where: str = "config.json") -> int:
    """`num_key_value_heads`: `absent` where a config leaves it out, as many as query heads where it is null."""
    default = heads if "num_key_value_heads" in hf else absent
    return integer(hf, "num_key_value_heads", MAX_HEADS, default=default, where=where)
