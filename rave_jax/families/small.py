"""Small random models as whole HF directories: what a family adds to `checkpoint/tiny.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from rave_jax.families.config import VlmConfig


class SmallSizes(Protocol):
    """Sizes of a small random model (`checkpoint.tiny.Tiny`)."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def mlp_size(self) -> int: ...
    @property
    def vision_hidden_size(self) -> int: ...
    @property
    def vision_layers(self) -> int: ...
    @property
    def vision_heads(self) -> int: ...
    @property
    def vision_mlp_size(self) -> int: ...
    @property
    def window_size(self) -> int: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def merge_size(self) -> int: ...


class SmallModels(NamedTuple):
    """How small random models of a family become whole HF directories.

    Fields:
        special_tokens: of its chat format.
        config: (sizes, rows of the embedding, ids of the special tokens) to the model's config.
        files: (config, ids of the special tokens) to what its JSON files hold, by name.
    """

    special_tokens: tuple[str, ...]
    config: Callable[[SmallSizes, int, Mapping[str, int]], VlmConfig]
    files: Callable[[VlmConfig, Mapping[str, int]], dict[str, dict[str, Any]]]
