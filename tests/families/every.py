"""A small model of each family, with its processor and conversations: what generic tests run over.

A family is in here as soon as it says how small models of it are made (`Family.small`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rave_jax.checkpoint.tiny import Tiny, tiny_config, write_tiny_files
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Example, Message
from rave_jax.families import FAMILIES
from rave_jax.families.config import VlmConfig
from rave_jax.models.config import ModelOptions
from rave_jax.models.vlm import Vlm
from tests.data.pictures import noise
from tests.models import made

EVERY = tuple(name for name, family in FAMILIES.items() if family.small is not None)
WITH_PICTURES = tuple(name for name in EVERY if FAMILIES[name].tower)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "mlp_size": 48,
    "vision_hidden_size": 32,
    "vision_layers": 2,
    "vision_heads": 2,
    "vision_mlp_size": 64,
    "window_size": 28,
    "patch_size": 7,
}
OTHER: dict[str, dict[str, Any]] = {}
"""Where a family needs other sizes than these."""
WITHOUT_CONTEXT = ("qwen3_5",)
"""Families that refuse context tokens: some of their layers show a token all that stands before it."""
WITHOUT_VIDEOS = ("llava",)
"""Families that refuse videos."""
Visual = tuple[int, int] | tuple[int, int, int, float]
"""(height, width) of a picture; (frames, height, width, frames per second) of a video."""


class Small(NamedTuple):
    """A small model."""

    config: VlmConfig
    processor: Processor

    def model(self, options: ModelOptions, seed: int = 0) -> Vlm:
        """The model with random numbers in every parameter."""
        return made.model(self.config, options, seed)

    def encode(self, *messages: Message, generation: bool = False) -> Example:
        """A conversation in numbers."""
        return self.processor.encode(messages, add_generation_prompt=generation)


def small(family: str, options: ModelOptions, **other: Any) -> Small:
    """The small model of a family, as it is used with these options; `other` are sizes in place of those above."""
    sizes = Tiny(**{**SIZES, **OTHER.get(family, {}), **other, "family": family})
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_files(Path(folder), sizes)
        processor = Processor.from_hf(folder, layout=options.layout)
    return Small(tiny_config(sizes), processor)


def question(text: str, *visuals: Visual, seed: int = 0) -> Message:
    """A question of a user behind pictures and videos of these sizes, from noise."""
    parts = [visual(size, seed + n) for n, size in enumerate(visuals)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def visual(size: Visual, seed: int) -> dict[str, Any]:
    """A picture or a video from noise, as a part of a message."""
    if len(size) == 2:
        return {"type": "image", "image": noise(*size, seed=seed)}
    frames, height, width, fps = size
    video = [noise(height, width, seed=100 * (seed + 1) + n) for n in range(frames)]
    return {"type": "video", "video": video, "fps": fps}


def answer(text: str) -> Message:
    """The answer to it."""
    return {"role": "assistant", "content": text}


def with_pictures(family: str) -> tuple[Visual, ...]:
    """Sizes of two odd pictures, and of a video between them where the family takes videos; none for a text family."""
    if family not in WITH_PICTURES:
        return ()
    return ((30, 44), (21, 64)) if family in WITHOUT_VIDEOS else ((30, 44), (4, 22, 31, 2.0), (21, 64))


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """As a part of the largest in size."""
    return float(np.abs(a - b).max() / np.abs(b).max())
