"""What becomes of the toy's pictures and videos."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import ImageOps

from rave_jax.batch import Patches
from rave_jax.families.pictures import CutPicture, Frames, PictureError, PictureRules, Piece, text_positions


@dataclass(frozen=True)
class Crops(PictureRules):
    """The middle of a picture, at one size; of a video every second frame, each with its time in front."""

    def image_grid(self, height, width):
        count = self.config.vision.side // self.config.vision.patch_size
        return 1, count, count

    def cut_image(self, image):
        side, p = self.config.vision.side, self.config.vision.patch_size
        pixels = np.asarray(ImageOps.fit(image, (side, side))).reshape(side // p, p, side // p, p, 3)
        patches = pixels.transpose(0, 2, 4, 1, 3).reshape(-1, 3 * p * p)
        count = len(patches)
        place = np.indices((side // p, side // p), dtype=np.int32).reshape(2, -1).T
        ones = np.ones(count, np.int32)
        grid = self.image_grid(image.height, image.width)
        return CutPicture(Patches(patches, ones, place, ones), np.arange(count, dtype=np.int32), grid)

    def frames(self, total, fps):
        if fps is None:
            raise PictureError("the times of frames need the part's own 'fps'")
        return Frames(np.arange(0, total, 2), total, fps)

    def video_grid(self, height, width, frames):
        return len(frames.indices), *self.image_grid(height, width)[1:]

    def cut_video(self, images, frames):
        cuts = [self.cut_image(image) for image in images]
        pixels, place = (np.concatenate([getattr(cut.patches, n) for cut in cuts]) for n in ("pixels", "place"))
        number = np.repeat(np.arange(1, len(cuts) + 1, dtype=np.int32), len(cuts[0].order))
        grid = self.video_grid(images[0].height, images[0].width, frames)
        return CutPicture(Patches(pixels, number, place, number), np.arange(len(number), dtype=np.int32), grid)

    def expand(self, kind, grid, frames, encode):
        _, rows, cols = grid
        one = np.full(rows * cols, self.image_token_id if kind == "image" else self.video_token_id, np.int32)
        if kind == "image":
            return (Piece(one, grid),)
        pieces = []
        for index in frames.indices:
            pieces += [Piece(np.asarray(encode(f"<{index / frames.rate:g}s>"), np.int32)), Piece(one, (1, rows, cols))]
        return tuple(pieces)

    def positions(self, length, visuals):
        return text_positions(length)


def pictures(config, files):
    return Crops(config)
