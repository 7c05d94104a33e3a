"""What a family makes of pictures and videos: their sizes, patches, tokens and positions.

It is the loading half of a family: numpy in and out. No file is read here, no jax is imported, and `data` knows nothing
of these matters but this contract.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from PIL import Image

from rave_jax.batch import Patches
from rave_jax.config import require
from rave_jax.families.config import PatchSizes, VlmConfig
from rave_jax.layout import Box, Grid
from rave_jax.typing import Int, NpArray

VisualKind = Literal["image", "video"]
Encode = Callable[[str], list[int]]
"""Token ids of a text."""


Form = Any
"""What a family says of a size of pictures or videos: the merged grid (t, h, w), or what else its `expand` and
`count_patches` take."""


class PictureError(ValueError):
    """A picture or video that the family's rules cannot take: its shape, its number of frames, a missing rate."""


class ProcessorFiles(NamedTuple):
    """What an HF directory says of pictures and videos.

    Fields:
        image_file, image: the file that says how pictures are processed, and what it says; {} where there is none.
        video_file, video: the same of videos; that of pictures where nothing is said of videos alone.
    """

    image_file: Path
    image: Mapping[str, Any]
    video_file: Path
    video: Mapping[str, Any]


class CutPicture(NamedTuple):
    """A picture (one frame) or a video (t frames), cut.

    Fields:
        patches: its patches, frame after frame.
        order: merge unit, counted from 0 over the whole, of each unit of the merged grid read frame, row, column. Where
            units are mixed, which of `patches.source` each visual token is.
        grid: size of the merged grid (t, h, w), or what else the family says of the size.
        shown: for each grid of its pieces, the part of the picture that it stands for, as `layout.Shown.box` is; empty:
            each of them shows the whole picture.
    """

    patches: Patches
    order: Int[NpArray, "N"]
    grid: Form
    shown: tuple[Box | None, ...] = ()


class Frames(NamedTuple):
    """Which frames of a video are used.

    Fields:
        indices: of the frames, ascending.
        total: frames that the video has.
        rate: how many of those a second holds; the family's guess where it is not known.
        guessed: is the rate a guess?
    """

    indices: Int[NpArray, "N"]
    total: int
    rate: float
    guessed: bool = False

    @property
    def used_rate(self) -> float:
        """How many of the used frames a second holds."""
        return len(self.indices) / self.total * self.rate


class Piece(NamedTuple):
    """Tokens side by side in what a placeholder becomes: text, or all visual tokens of a grid.

    Fields:
        tokens: their ids.
        grid: (t, h, w) of the visual tokens, which hold the merge units of the picture or video in the order of its
            merged grid, those of one piece after those of the one before; None for text.
        seconds: time between the frames of the grid; None for a picture.
    """

    tokens: Int[NpArray, "N"]
    grid: Grid | None = None
    seconds: float | None = None


class Visual(NamedTuple):
    """Visual tokens of a document, those of one `Piece`.

    Fields:
        start: index of the first one.
        grid: size of the merged grid (t, h, w); there are t * h * w tokens.
        seconds: time between its frames; None for a picture.
    """

    start: int
    grid: Grid
    seconds: float | None = None


NO_PICTURES = "the model is for text only and takes no pictures"
NO_VIDEOS = "the model takes no videos"


@dataclass(frozen=True)
class PictureRules:
    """The rules of one model; as they stand here, of one that reads text alone.

    A family with a tower has a subclass, which adds the limits that its files state and says what becomes of pictures,
    and of videos if it takes them. Sizes are (height, width) in pixels, of pictures that stand upright.
    """

    config: VlmConfig
    """What the model is."""

    @property
    def has_vision(self) -> bool:
        """Does the model take pictures at all?"""
        return self.config.vision is not None

    @property
    def image_token_id(self) -> int:
        """Placeholder that the chat template writes for a picture; -1: none."""
        return self.config.image_token_id

    @property
    def video_token_id(self) -> int:
        """Placeholder that the chat template writes for a video; -1: none."""
        return self.config.video_token_id

    @property
    def takes_videos(self) -> bool:
        """Does the model take videos?"""
        return self.video_token_id >= 0 or bool(self.video_placeholder)

    @property
    def video_placeholder(self) -> str:
        """What the chat template writes for a video where that is no token of config.json, such as `<video>`. It is
        replaced by the token `image_token_id` and the texts of `beside` before the prompt becomes tokens."""
        return ""

    @property
    def video_template(self) -> str:
        """The chat template of conversations with videos; empty: that of the model's files."""
        return ""

    @property
    def patch_sizes(self) -> PatchSizes:
        """What arrays of patches have to be like."""
        return self.config.patch_sizes

    def limited(self, min_pixels: int | None, max_pixels: int | None) -> Self:
        """The rules with other limits of a resized picture's pixels, where they are given.

        Raises:
            ConfigError: limits that cannot be kept, or a family whose pictures have sizes of their own.
        """
        for name, given in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
            own = f"null: the sizes of pictures are those of {self.config.family}"
            require(given is None or not self.has_vision, name, given, own)
        return self

    def among(self, pictures: int) -> Self:
        """The rules for a conversation of so many pictures, where they differ."""
        return self

    def image_grid(self, height: int, width: int) -> Form:
        """Merged grid (1, h, w) of a picture of this size.

        Raises:
            PictureError: a size that is not taken.
        """
        raise PictureError(NO_PICTURES)

    def count_patches(self, grid: Form) -> int:
        """Patches of a picture or video of this merged grid, with all that the tower reads beside those of the grid."""
        return math.prod(grid) * self.patch_sizes.merge

    def cut_image(self, image: Image.Image) -> CutPicture:
        """Patches of an RGB picture, as `image_grid` counts them.

        Raises:
            PictureError: a size that is not taken.
        """
        raise PictureError(NO_PICTURES)

    def frames(self, total: int, fps: float | None) -> Frames:
        """Which frames are used of a video.

        Args:
            total: frames that it has.
            fps: how many of them a second holds; None if not known.

        Raises:
            PictureError: too few frames, or a rate that is needed and not known.
        """
        raise PictureError(NO_VIDEOS)

    def video_grid(self, height: int, width: int, frames: Frames) -> Form:
        """Merged grid (t, h, w) of a video of these frames, each of this size.

        Raises:
            PictureError: a size that is not taken.
        """
        raise PictureError(NO_VIDEOS)

    def cut_video(self, images: Sequence[Image.Image], frames: Frames) -> CutPicture:
        """Patches of the used frames, RGB pictures of one size, as `video_grid` counts them.

        Raises:
            PictureError: a size that is not taken.
        """
        raise PictureError(NO_VIDEOS)

    def beside(self, frames: Frames) -> tuple[str, str]:
        """Text before and behind all that `expand` gives for a video, where the template writes `video_placeholder`.

        It becomes tokens together with the text around the video, since a tokenizer may join the two. What `expand`
        gives begins and ends with special tokens there.
        """
        return "", ""

    def expand(self, kind: VisualKind, grid: Form, frames: Frames | None, encode: Encode) -> tuple[Piece, ...]:
        """What stands in a prompt in place of a placeholder.

        Args:
            kind: what it holds the place of.
            grid: merged grid of the picture or video. The grids of the pieces add up to as many tokens.
            frames: of a video; None for a picture.
            encode: for families that write text between frames.
        """
        raise PictureError(NO_PICTURES)

    def positions(self, length: int, visuals: Sequence[Visual]) -> Int[NpArray, "3 T"]:
        """Rotary positions (temporal, height, width) of a document of `length` tokens.

        Args:
            length: T.
            visuals: its visual tokens in order, not overlapping.
        """
        return text_positions(length)


def text_positions(length: int, start: int = 0) -> Int[NpArray, "3 T"]:
    """Positions that count on from `start` in all three axes: those of text, and of all tokens with 1-D RoPE."""
    return np.tile(np.arange(start, start + length, dtype=np.int32), (3, 1))


def grid_coordinates(grid: Grid) -> Int[NpArray, "3 N"]:
    """Frame, row and column of each token of a merged grid, in the order the tokens stand."""
    return np.indices(grid, dtype=np.int32).reshape(3, -1)
