"""What a family adds to `checkpoint/join.py`: how a vision tower and a text model become one model of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rave_jax.families.hf import HfConfig


class Join(NamedTuple):
    """How two checkpoints become one.

    Fields:
        config: (config of the checkpoint with the tower, config of the text model, ids of `tokens`) to the HF config of
            the joined model; ConfigError for a tower that the family does not read.
        tower: beginning of the keys of the joined checkpoint that the tower's one has without it.
        text: the same of the text model's.
        left_out: beginnings of keys of the tower's checkpoint that the joined model has no use for.
        tokens: special tokens that the text model's tokenizer must have.
        template: the chat template of the joined model.
        files: (HF config of the joined model) to what further JSON files hold, by name.
    """

    config: Callable[[HfConfig, HfConfig, Mapping[str, int]], dict[str, Any]]
    tower: str
    text: str
    left_out: tuple[str, ...]
    tokens: tuple[str, ...]
    template: str
    files: Callable[[HfConfig], dict[str, dict[str, Any]]]
