"""An HF directory as data reads it: config.json once, and what its files say of pictures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rave_jax.config import ConfigError
from rave_jax.families import Family, family_for
from rave_jax.families.config import VlmConfig
from rave_jax.families.pictures import PictureRules, ProcessorFiles
from rave_jax.families.shared.processor_files import bare, channels, check_name, image_processor, stated
from rave_jax.files import read_text

SHARED = ("patch_size", "temporal_patch_size", "merge_size")
"""Keys of an image processor's file that repeat what the tower's config says."""


def picture_rules(directory: str | Path) -> PictureRules:
    """The rules of the model of a directory, from config.json and the files of its image and video processors.

    Raises:
        ConfigError: a file or key is missing, the model is none that we compute, or its pictures ask for processing
            that is not done here.
    """
    directory = Path(directory)
    hf = read_json(directory / "config.json")
    try:
        family = family_for(hf)
        config, files = family.parse(hf), processor_files(directory)
        if config.vision is not None and not files.image:
            raise ConfigError(f"{files.image_file}: no such file; a vision-language model needs it")
        if config.vision is not None:
            check_processors(family, files)
        return family.pictures(with_processor(config, files), files)
    except ConfigError as error:
        said = str(error)
        raise ConfigError(said if said.startswith(str(directory)) else f"{directory}: {said}") from error
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{directory}: config.json or a processor file has a value of the wrong kind: {error}"
        ) from error


def processor_files(directory: Path) -> ProcessorFiles:
    """What the directory's files say of pictures and videos.

    Raises:
        ConfigError: a file is no JSON object.
    """
    nested = directory / "processor_config.json"
    both = read_json(nested, optional=True)
    image_file, image = nested, both.get("image_processor")
    if not image:
        image_file = directory / "preprocessor_config.json"
        image = read_json(image_file, optional=True)
    video_file, video = nested, both.get("video_processor")
    if not video:
        video_file = directory / "video_preprocessor_config.json"
        video = read_json(video_file, optional=True)
    return ProcessorFiles(image_file, image, *((video_file, video) if video else (image_file, image)))


def check_processors(family: Family, files: ProcessorFiles) -> None:
    """Refuse image and video processors that the family's rules do not compute. A file may name none.

    Raises:
        ConfigError: a file names such a processor.
    """
    key = "feature_extractor_type" if files.image.get("image_processor_type") is None else "image_processor_type"
    check_name(files.image_file, key, image_processor(files.image), family.image_processors)
    if family.video_processors:
        key = "video_processor_type"
        check_name(files.video_file, key, bare(files.video.get(key)), family.video_processors)


def with_processor(config: VlmConfig, files: ProcessorFiles) -> VlmConfig:
    """The config with the mean and deviation of pixels that the image processor's file states, where there are any.

    Raises:
        ConfigError: that file cuts pictures in another way than the tower reads them.
    """
    if config.vision is None:
        return config
    for key in SHARED:
        wanted = getattr(config.vision, key, None)
        found = stated(files.image, key, wanted)
        if wanted is not None and (type(found) is not int or found != wanted):
            raise ConfigError(f"{files.image_file}: {key} is {found!r}, expected {wanted} as config.json has it")
    vision = config.vision
    pixels = {
        "pixel_mean": channels(files.image_file, files.image, "image_mean", vision.pixel_mean),
        "pixel_std": channels(files.image_file, files.image, "image_std", vision.pixel_std),
    }
    if min(pixels["pixel_std"]) <= 0:
        found = files.image.get("image_std")
        raise ConfigError(f"{files.image_file}: image_std is {found!r}, expected numbers above 0")
    return dataclasses.replace(config, vision=dataclasses.replace(vision, **pixels))


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """The object in a file; {} where it may be missing and is.

    Raises:
        ConfigError: no such file, or no JSON object in it.
    """
    if not path.exists():
        if optional:
            return {}
        raise ConfigError(f"{path}: no such file; a model directory needs it")
    try:
        data = json.loads(read_text(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected an object")
    return data
