"""The rules of LLaVA's pictures: one size, cropped or stretched, as transformers' processors have them, without torch.

The pixels are those of transformers' `CLIPImageProcessorPil`, `LlavaImageProcessorPil` and `SiglipImageProcessorPil`
(5.23.0), bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from rave_jax.config import ConfigError
from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.pictures import (
    CutPicture,
    Encode,
    Frames,
    PictureRules,
    Piece,
    ProcessorFiles,
    VisualKind,
)
from rave_jax.families.shared.processor_files import (
    BICUBIC,
    bilinear_or_bicubic,
    flag,
    image_processor,
    number_or_none,
    sides,
    stated,
    steps,
)
from rave_jax.families.shared.squares import check_aspect, middle, middle_of, square_of, squared
from rave_jax.families.shared.vit import VitConfig, cut_pictures
from rave_jax.layout import WHOLE, Box, Grid, inside
from rave_jax.typing import NpArray, UInt8

CLIP, LLAVA, SIGLIP = (f"{kind}ImageProcessor" for kind in ("CLIP", "Llava", "Siglip"))
"""Classes in transformers; a file that names none means the first."""


@dataclass(frozen=True)
class Pictures(PictureRules):
    """Pictures that all become one size."""

    shortest_edge: int | None = None
    """What the shorter side is resized to before the middle is cut out; None: the picture is stretched to a square."""
    squared: bool = False
    """Is a picture first made a square, with stripes of the mean colour at its longer sides?"""
    resample: int = BICUBIC
    """Pillow's number of the filter that resizes pictures."""

    @property
    def vision(self) -> VitConfig:
        """The tower, which sets the sizes of patches."""
        return tower_of(self.config, VitConfig)

    def image_grid(self, height: int, width: int) -> Grid:
        """Merged grid, the same for every size."""
        check_aspect(height, width)
        return 1, self.vision.side, self.vision.side

    def count_patches(self, grid: Grid) -> int:
        """Patches of a picture, its class token among them."""
        return self.vision.places

    def cut_image(self, image: Image.Image) -> CutPicture:
        """Patches of a picture, in front of them the class token."""
        tower, grid = self.vision, self.image_grid(image.height, image.width)
        patches = cut_pictures([self.resized(image)], tower)
        count = tower.places - tower.mixed
        if tower.mixed:
            source: Any = np.arange(tower.places - count, tower.places, dtype=np.int32)[:, None]
            weight: Any = np.ones(source.shape, np.float32)
            patches = patches._replace(source=source, weight=weight)
        shown = (*[None] * tower.class_feature, self.shown(image.height, image.width))
        return CutPicture(patches, np.arange(count, dtype=np.int32), grid, shown)

    def expand(self, kind: VisualKind, grid: Grid, frames: Frames | None, encode: Encode) -> tuple[Piece, ...]:
        """The placeholder once for each visual token; the class token, where it is one, counts as a picture of its
        own, since it has no place in the grid."""
        one = np.full(1, self.image_token_id, np.int32)
        own = (Piece(one, (1, 1, 1)),) if self.vision.class_feature else ()
        return (*own, Piece(one.repeat(math.prod(grid)), grid))

    def shown(self, height: int, width: int) -> Box:
        """The part of a picture of this size that the grid of its tokens stands for."""
        square = square_of(height, width) if self.squared else WHOLE
        if self.shortest_edge is None:
            return inside(square, self.vision.seen)
        sides = (max(height, width),) * 2 if self.squared else (height, width)
        cut = middle_of(*self._shortened(*sides), self.vision.image_size)
        return inside(inside(square, cut), self.vision.seen)

    def _shortened(self, height: int, width: int) -> tuple[int, int]:
        """Size of a picture whose shorter side is `shortest_edge`."""
        assert self.shortest_edge is not None
        short, long = self.shortest_edge, int(self.shortest_edge * max(width, height) / min(width, height))
        return (long, short) if width <= height else (short, long)

    def resized(self, image: Image.Image) -> UInt8[NpArray, "H W 3"]:
        """The pixels of a picture in the size of the tower."""
        side = self.vision.image_size
        if self.squared:
            image = squared(image, self.vision.pixel_mean)
        if self.shortest_edge is None:
            return np.asarray(image.resize((side, side), Image.Resampling(self.resample)))
        height, width = self._shortened(image.height, image.width)
        return middle(np.asarray(image.resize((width, height), Image.Resampling(self.resample))), side)


def pictures(config: VlmConfig, files: ProcessorFiles) -> Pictures:
    """The rules of a model, from the file of its image processor.

    Raises:
        ConfigError: it asks for processing that is not done here.
    """
    file, image = files.image_file, files.image
    kind = image_processor(image) or CLIP
    steps(file, image, ("do_resize", "do_rescale", "do_normalize"))
    resample = bilinear_or_bicubic(file, image)
    size, crop = image.get("size"), image.get("crop_size")
    tower = tower_of(config, VitConfig)
    default = None if kind == SIGLIP else {"shortest_edge": 224}
    edge = number_or_none(file, "size", default if size is None else size, "shortest_edge")
    crops = flag(file, image, "do_center_crop", kind != SIGLIP)
    if edge is not None and not crops:
        raise ConfigError(f"{file}: do_center_crop is {crops!r}, expected True where size is the shortest edge alone")
    name = "crop_size" if crops else "size"
    made = sides(file, name, stated(image, name, 224))
    if edge is None and sides(file, "size", stated(image, "size", 224)) != made:
        raise ConfigError(f"{file}: size is {size!r}, expected that of crop_size {crop!r}: pictures are not cut twice")
    if made != (tower.image_size, tower.image_size):
        raise ConfigError(
            f"{file}: {name} is {image.get(name)!r}, expected {tower.image_size} x {tower.image_size}, the "
            "image_size of vision_config"
        )
    pads = flag(file, image, "do_pad", False)
    return Pictures(config, edge, kind == LLAVA and pads, resample)
