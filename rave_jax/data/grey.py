"""Greys of more than 8 bits, and float greys, as 8 bits: scaled by the range that their values stand in.

Pillow cuts such values off at 255, so that a 16-bit picture comes out white and a float picture of 0 to 1 black. The
range is the least of these that holds all values of the picture; its end becomes white (255), 0 black:

    0 to 1        floats only
    0 to 255      8 bits: as Pillow converts them (and transformers with it)
    0 to 4095     12 bits, as cameras and scanners give
    0 to 65535    16 bits

A picture with a value below 0 or above 65535 (a height map, say) has the range of its own values, from its least
(black) to its largest (white).
"""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image

from rave_jax.data.sample import ImageError

MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
"""Modes of Pillow with one channel that holds more than 8 bits."""
EIGHT = 255
FULL = (EIGHT, 4095, 65535)


def to_eight_bits(image: Image.Image, name: str = "") -> Image.Image:
    """A picture of one of `MODES` as mode L. A picture whose values are 8 bits is given back as it is.

    Args:
        image: decoded.
        name: what a remark on stderr calls it. Each kind of scaling is remarked on once.

    Raises:
        ImageError: a value is NaN or infinite.
    """
    values = np.asarray(image)
    if not values.size:
        return image
    if not np.isfinite(values).all():
        raise ImageError(f"{np.sum(~np.isfinite(values))} of its pixels are NaN or infinite")
    low, high = float(values.min()), float(values.max())
    ranges = (1, *FULL) if image.mode == "F" else FULL
    top = next((top for top in ranges if high <= top), None)
    if low < 0 or top is None:
        bottom, span, kind = low, high - low, "its own least and largest value, which become black and white"
    elif top == EIGHT:
        return image
    else:
        bottom, span, kind = 0.0, float(top), f"the range 0 to {top}, the least of {', '.join(map(str, ranges))}"
    _remark(name, image.mode, kind)
    # A picture of one value that has no range is black.
    scaled = (values.astype(np.float64) - bottom) * (EIGHT / span if span else 0.0)
    grey = Image.fromarray(np.rint(scaled).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        # The one value that the file calls transparent: white, as whatever is transparent.
        grey.paste(EIGHT, mask=Image.fromarray(values == clear))
    return grey


_remarked: set[tuple[str, str]] = set()


def _remark(name: str, mode: str, kind: str) -> None:
    """Say once of each kind how it is scaled."""
    if (mode, kind) not in _remarked:
        _remarked.add((mode, kind))
        text = f"{name}: a grey picture of mode {mode} is scaled to 8 bits by {kind}; so are others of this kind"
        print(text, file=sys.stderr)
