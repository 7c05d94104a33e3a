"""Values in the files of image and video processors, each checked. Errors name the file and the key.

A key that is null means what an absent one means, as in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from rave_jax.config import ConfigError
from rave_jax.families.config import MAX_WIDTH

BILINEAR, BICUBIC = 2, 3
"""Pillow's numbers of filters."""


ENDS = ("Fast", "Pil")
"""What transformers adds to the name of a processor for other code of the same numbers."""


def stated(file: Mapping[str, Any], key: str, default: Any) -> Any:
    """What a file says; `default` where the key is absent or null."""
    return default if file.get(key) is None else file[key]


def image_processor(image: Mapping[str, Any]) -> Any:
    """The image processor that a file names, as transformers reads it, without `Fast` or `Pil`; None: it names none."""
    name = stated(image, "image_processor_type", image.get("feature_extractor_type"))
    return bare(name).replace("FeatureExtractor", "ImageProcessor") if isinstance(name, str) else name


def bare(name: Any) -> Any:
    """The name of a processor without `Fast` or `Pil`; what is no name is given back."""
    end = next((end for end in ENDS if isinstance(name, str) and name.endswith(end)), "")
    return name.removesuffix(end) if end else name


def check_name(file: Path, key: str, found: Any, computed: Sequence[str]) -> None:
    """Refuse a processor of another name.

    Args:
        file, key: where it is stated.
        found: its name without `Fast` or `Pil`; None: none is stated.
        computed: the names of processors that do what is done here.

    Raises:
        ConfigError: it is none of them.
    """
    if found is not None and found not in computed:
        expected = " or ".join(map(repr, computed)) or "no such key"
        raise ConfigError(f"{file}: {key} is {found!r}, expected {expected}: other processors cut pictures otherwise")


def steps(file: Path, image: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse a file that leaves out a step, or rescales by something else than 1/255.

    Raises:
        ConfigError: it does.
    """
    for name in (*names, "do_convert_rgb"):
        if stated(image, name, True) is not True:
            raise ConfigError(f"{file}: {name} is {image[name]!r}, expected True")
    factor = stated(image, "rescale_factor", 1 / 255)
    if not _is_number(factor) or not abs(factor * 255 - 1) <= 1e-6:
        raise ConfigError(f"{file}: rescale_factor is {factor!r}, expected 1/255")


def bicubic(file: Path, image: Mapping[str, Any]) -> None:
    """Refuse another filter.

    Raises:
        ConfigError: the file names one.
    """
    resampling(file, image, {BICUBIC: "bicubic"})


def bilinear_or_bicubic(file: Path, image: Mapping[str, Any]) -> int:
    """Pillow's number of the filter.

    Raises:
        ConfigError: the file names another.
    """
    return resampling(file, image, {BICUBIC: "bicubic", BILINEAR: "bilinear"})


def resampling(file: Path, image: Mapping[str, Any], allowed: Mapping[int, str]) -> int:
    """Pillow's number of the filter.

    Args:
        file, image: where it may be stated.
        allowed: numbers and names of filters; the first is that of a file that names none.

    Raises:
        ConfigError: the file names another.
    """
    found = stated(image, "resample", next(iter(allowed)))
    if type(found) is not int or found not in allowed:
        expected = " or ".join(f"{number} ({name})" for number, name in allowed.items())
        raise ConfigError(f"{file}: resample is {found!r}, expected {expected}")
    return found


def flag(file: Path, config: Mapping[str, Any], key: str, default: bool) -> bool:
    """true or false.

    Raises:
        ConfigError: it is something else.
    """
    value = stated(config, key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{file}: {key} is {value!r}, expected true or false")
    return value


def count(file: Path, config: Mapping[str, Any], key: str, default: int, of: str = "number") -> int:
    """A number of things, 1 or more.

    Raises:
        ConfigError: it is something else.
    """
    value = stated(config, key, default)
    if type(value) is not int or value < 1:
        raise ConfigError(f"{file}: {key} is {value!r}, expected a {of}, 1 or more")
    return value


def rate(file: Path, config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number above 0 in a second.

    Raises:
        ConfigError: it is something else.
    """
    value = stated(config, key, default)
    if not _is_number(value) or not 0 < value < math.inf:
        raise ConfigError(f"{file}: {key} is {value!r}, expected a number above 0")
    return float(value)


def channels(file: Path, config: Mapping[str, Any], key: str, default: Sequence[float]) -> tuple[float, ...]:
    """A number for each channel of a pixel, as many as `default` has.

    Raises:
        ConfigError: it is something else.
    """
    value = stated(config, key, list(default))
    numbers = isinstance(value, list) and all(_is_number(n) and math.isfinite(n) for n in value)
    if not numbers or len(value) != len(default):
        raise ConfigError(f"{file}: {key} is {value!r}, expected a list of {len(default)} numbers")
    return tuple(map(float, value))


def same_pixels(
    file: Path,
    video: Mapping[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
    unstated: tuple[Sequence[float], Sequence[float]] | None = None,
) -> None:
    """Refuse a file of a video processor that shifts and scales pixels otherwise than those of pictures.

    Args:
        file, video: where it may be stated.
        mean, std: of pictures.
        unstated: mean and deviation of a file that states none; None: those of pictures.

    Raises:
        ConfigError: it does.
    """
    own = unstated or (mean, std)
    for key, default, ours in zip(("image_mean", "image_std"), own, (mean, std), strict=True):
        if channels(file, video, key, default) != tuple(ours):
            raise ConfigError(f"{file}: {key} is {video.get(key)}, expected {list(ours)}, as pictures have it")


def number_or_none(file: Path, key: str, size: Any, name: str) -> int | None:
    """An entry of a size, such as `shortest_edge`; None where it has none. A bare number is that entry.

    Raises:
        ConfigError: it is no number of pixels.
    """
    value = size.get(name) if isinstance(size, Mapping) else size
    if value is not None and not _is_side(value):
        expected = f"{{{name!r}: a number of pixels from 1 to {MAX_WIDTH:,}}}"
        raise ConfigError(f"{file}: {key} is {size!r}, expected {expected}")
    return value


def sides(file: Path, key: str, size: Any) -> tuple[int, int]:
    """Height and width of a size; a bare number is both.

    Raises:
        ConfigError: it has not both.
    """
    given = size if isinstance(size, Mapping) else {"height": size, "width": size}
    height, width = (given.get(name) for name in ("height", "width"))
    if not (_is_side(height) and _is_side(width)):
        raise ConfigError(f"{file}: {key} is {size!r}, expected {{'height': pixels, 'width': pixels}}")
    return height, width


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_side(value: Any) -> TypeGuard[int]:
    return type(value) is int and 1 <= value <= MAX_WIDTH
