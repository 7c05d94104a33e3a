"""Pictures read from files and memory, as upright RGB. What becomes of them is a family's (`families/pictures.py`).

As transformers does:
- A file or its bytes are turned upright by their EXIF orientation (as its `load_image` does for a path in a chat
  message); a PIL image or an array is taken as it is.
- Transparency is laid over white (as its processor does with a PIL picture; its `load_image` would drop it), every
  other mode is converted to RGB by Pillow. Greys of more than 8 bits, which Pillow cuts off, are scaled (`grey.py`).
"""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageOps

from rave_jax.data import grey
from rave_jax.data.grey import to_eight_bits
from rave_jax.data.opening import describe, is_encoded, opened, reason
from rave_jax.data.sample import ImageError
from rave_jax.families.pictures import CutPicture, Form, PictureError, PictureRules

EXIF_ORIENTATION = 0x0112


def image_size(source: Any, name: str = "") -> tuple[int, int]:
    """Upright (height, width) of a picture; of a file, only the header is read.

    Raises:
        ImageError: not a picture.
    """
    try:
        with opened(source) as image:
            turned = is_encoded(source) and image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            width, height = image.size
            return (width, height) if turned else (height, width)
    except Exception as error:
        raise ImageError(f"{describe(source, name)}: {reason(error)}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):  # charts are often saved with a channel that hides nothing
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
    # `convert` copies a picture that is RGB already, which takes a tenth of the time of a large photo.
    return image if image.mode == "RGB" else image.convert("RGB")


def read_image(source: Any, name: str = "") -> Image.Image:
    """A picture, fully decoded, as RGB.

    Args:
        source: path, file: or data: URI, encoded bytes, PIL image, or uint8 array [H,W] or [H,W,1|3|4].
        name: what errors call it.

    Raises:
        ImageError: broken, cut off, animated, of several pages, or not a picture. Says which file.
    """
    called = describe(source, name)
    try:
        with opened(source) as image:
            _check_one(image)
            image.load()
            if is_encoded(source) and image.getexif().get(EXIF_ORIENTATION, 1) != 1:
                image = ImageOps.exif_transpose(image)
            if image is source:  # whoever gave it may go on drawing in it
                image = image.copy()
            return _to_rgb(to_eight_bits(image, called) if image.mode in grey.MODES else image)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise ImageError(f"{called}: {reason(error)}") from error


def _check_one(image: Image.Image) -> None:
    """A file of several pictures is refused: which of them is meant?"""
    # A camera's MPO file holds a second picture and no animation; its first is the picture.
    if not getattr(image, "is_animated", False) or image.format == "MPO":
        return
    count = getattr(image, "n_frames", 2)
    if image.format == "TIFF":
        raise ImageError(f"a TIFF of {count} pages; save its pages as separate pictures and give those")
    raise ImageError(f"an animation of {count} frames ({image.format}); give its frames as a video")


def cut_image(source: Any, rules: PictureRules, name: str = "") -> CutPicture:
    """Read one picture and cut it by the rules of a model.

    Raises:
        ImageError: the picture cannot be used; says which file.
    """
    image = read_image(source, name)
    try:
        return rules.cut_image(image)
    except PictureError as error:
        raise ImageError(f"{describe(source, name)}: {error}") from error


def image_grid(source: Any, rules: PictureRules, name: str = "") -> Form:
    """The merged grid that a picture has by the rules of a model; of a file, only the header is read.

    Raises:
        ImageError: not a picture, or of a size that cannot be used.
    """
    size = image_size(source, name)
    try:
        return rules.image_grid(*size)
    except PictureError as error:
        raise ImageError(f"{describe(source, name)}: {error}") from error
