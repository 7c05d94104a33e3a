"""The rules of Qwen2-VL's pictures and videos: those of `grids`, with positions that know no seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rave_jax.families.config import VlmConfig
from rave_jax.families.pictures import ProcessorFiles, Visual
from rave_jax.families.shared.grids.pictures import Pictures, pictures_as
from rave_jax.families.shared.grids.positions import mrope_positions
from rave_jax.typing import Int, NpArray


@dataclass(frozen=True)
class CountedPictures(Pictures):
    """The temporal position of a video's frame is its number."""

    def positions(self, length: int, visuals: Sequence[Visual]) -> Int[NpArray, "3 T"]:
        """M-RoPE in which frames are one apart, however far apart in time."""
        return mrope_positions(length, [visual._replace(seconds=None) for visual in visuals], 1.0)


def pictures(config: VlmConfig, files: ProcessorFiles) -> CountedPictures:
    """The rules of a model, with the limits that its processor files state.

    Raises:
        ConfigError: they ask for processing that is not done here.
    """
    return pictures_as(CountedPictures, config, files)
