"""Values in the file of an image processor, each checked. Errors name the file and the key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from rave_jax.config import ConfigError
from rave_jax.families.config import MAX_WIDTH, TowerConfig

Pixel = tuple[float, ...]
"""A number for each channel."""
BILINEAR, BICUBIC = 2, 3
"""Pillow's numbers of filters."""


def steps(file: Path, image: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse a file that leaves out a step, or rescales by something else than 1/255.

    Raises:
        ConfigError: it does.
    """
    for name in names:
        if image.get(name, True) is not True:
            raise ConfigError(f"{file}: {name} is {image[name]!r}, expected True")
    if image.get("do_convert_rgb", True) not in (True, None):
        raise ConfigError(f"{file}: do_convert_rgb is {image['do_convert_rgb']!r}, expected True")
    factor = image.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or abs(factor * 255 - 1) > 1e-6:
        raise ConfigError(f"{file}: rescale_factor is {factor!r}, expected 1/255")


def bicubic(file: Path, image: Mapping[str, Any]) -> None:
    """Refuse another filter.

    Raises:
        ConfigError: the file names one.
    """
    if image.get("resample", BICUBIC) != BICUBIC:
        raise ConfigError(f"{file}: resample is {image['resample']!r}, expected {BICUBIC} (bicubic)")


def bilinear_or_bicubic(file: Path, image: Mapping[str, Any]) -> int:
    """Pillow's number of the filter.

    Raises:
        ConfigError: the file names another.
    """
    stated = image.get("resample", BICUBIC)
    if stated not in (BILINEAR, BICUBIC):
        expected = f"{BICUBIC} (bicubic) or {BILINEAR} (bilinear)"
        raise ConfigError(f"{file}: resample is {stated!r}, expected {expected}")
    return stated


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


def _is_side(value: Any) -> TypeGuard[int]:
    return type(value) is int and 1 <= value <= MAX_WIDTH


def flag_or(file: Path, stated: Mapping[str, Any], key: str, default: bool) -> bool:
    """A flag, or the default where none is stated.

    Raises:
        ConfigError: it is no flag.
    """
    value = stated.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{file}: {key} is {value!r}, expected true or false")
    return value


def positive_or_none(file: Path, stated: Mapping[str, Any], key: str) -> int | float | None:
    """A number above 0, such as of frames in a second; None where none is stated.

    Raises:
        ConfigError: it is no such number.
    """
    value = stated.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9):
        raise ConfigError(f"{file}: {key} is {value!r}, expected a number above 0")
    return value


def same_normalisation(
    file: Path,
    video: Mapping[str, Any],
    vision: TowerConfig,
    mean: Pixel = TowerConfig.pixel_mean,
    std: Pixel = TowerConfig.pixel_std,
) -> None:
    """Refuse frames of videos that are normalised in another way than pictures: a tower has one.

    Args:
        file: of the video processor.
        video: what it says.
        vision: with the mean and deviation of pictures.
        mean, std: of a file that states none; if not given, those of CLIP.

    Raises:
        ConfigError: they are.
    """
    for key, default, ours in (("image_mean", mean, vision.pixel_mean), ("image_std", std, vision.pixel_std)):
        stated = video.get(key)
        if tuple(map(float, default if stated is None else stated)) != ours:
            raise ConfigError(f"{file}: {key} is {stated}, expected {list(ours)}, as pictures have it")
