"""Conversations with pictures into numbers, as transformers' Qwen2.5-VL processor does it, without torch."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rave_jax.batch import Kind, Role, TokenInfo
from rave_jax.config import ConfigError, require
from rave_jax.data.chat import ChatTemplate, Run, SpecialTokens, read_template
from rave_jax.data.images import CutPicture, PatchGrid, count_tokens, image_patches
from rave_jax.data.layout import lay_out
from rave_jax.data.patches import join_patches
from rave_jax.data.positions import Visual, grid_coordinates, mrope_positions
from rave_jax.data.sample import Example, Message, OverBudget, SampleError
from rave_jax.data.video import VideoLimits, video_patches
from rave_jax.data.vocabulary import check_directory
from rave_jax.files import check_folder, read_text
from rave_jax.layout import VisualLayout
from rave_jax.typing import NpArray

BICUBIC = 3
MOST_BYTES = 2**22
"""Of a conversation's text: about a million tokens, more than models read."""
SHRINKING = 4
"""Characters that a tokenizer's normaliser may make one of, as NFC does with a letter and its accents."""
TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.jinja", "*.model", "*config.json")
"""Names of the files that transformers opens for a tokenizer."""


@dataclass(frozen=True)
class ProcessorSettings:
    """What a model wants of its pictures, from its HF directory."""

    has_vision: bool = True
    """Whether the model takes pictures at all."""
    patch_size: int = 14
    """Pixels along the side of a patch."""
    temporal_patch_size: int = 2
    """Pictures in a patch."""
    merge_size: int = 2
    """Patches along the side of a merge unit, which becomes one token."""
    window_size: int = 112
    """Pixels along the side of an attention window of the tower."""
    min_pixels: int = 56 * 56
    """Least pixels of a resized picture."""
    max_pixels: int = 28 * 28 * 1280
    """Most pixels of a resized picture."""
    image_token_id: int = 151655
    """Placeholder of a picture's tokens."""
    video_token_id: int = 151656
    """Placeholder of a video's tokens."""
    tokens_per_second: float = 4
    """Temporal positions per second of video."""
    video: VideoLimits = field(default_factory=VideoLimits)
    """Limits of a video's frames and pixels."""

    def __post_init__(self) -> None:
        unit = self.patch_size * self.merge_size
        require(self.window_size >= unit, "window_size", self.window_size, f"at least one merge unit of {unit} pixels")
        require(
            0 < self.min_pixels <= self.max_pixels, "min_pixels", self.min_pixels, f"1 to max_pixels {self.max_pixels}"
        )

    @property
    def grid(self) -> PatchGrid:
        """The tower's geometry."""
        window = self.window_size // self.merge_size // self.patch_size
        return PatchGrid(self.patch_size, self.temporal_patch_size, self.merge_size, window)

    @property
    def patch_numbers(self) -> int:
        """C: numbers in a flattened patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_patches(self) -> int:
        """Patches in a merge unit."""
        return self.merge_size**2

    @property
    def window_patches(self) -> int:
        """Patches in a full attention window; patch budgets are multiples of it."""
        return (self.grid.window * self.merge_size) ** 2

    @classmethod
    def from_hf(cls, directory: str | Path) -> ProcessorSettings:
        """Read config.json and the image (and video) processor's file of an HF directory.

        Raises:
            ConfigError: a file or key is missing, or asks for processing that is not done here.
        """
        directory = Path(directory)
        config = _read_json(directory / "config.json")
        vision = config.get("vision_config")
        if vision is None:
            return cls(has_vision=False, image_token_id=-1, video_token_id=-1)
        nested = directory / "processor_config.json"
        image_file, image = image_settings(directory)
        if not image:
            raise ConfigError(f"{image_file}: no such file; a model directory of a vision-language model needs it")
        video_file = directory / "video_preprocessor_config.json"
        video_file, video = next(
            (file, found)
            for file, found in (
                (nested, _read_json(nested, optional=True).get("video_processor")),
                (video_file, _read_json(video_file, optional=True)),
                (image_file, image),
            )
            if found
        )
        for key, wanted in (
            ("do_resize", True),
            ("do_rescale", True),
            ("do_normalize", True),
            ("do_convert_rgb", True),
        ):
            if image.get(key, wanted) is not wanted:
                raise ConfigError(f"{image_file}: {key} is {image[key]!r}, expected {wanted}")
        if image.get("resample", BICUBIC) != BICUBIC:
            raise ConfigError(f"{image_file}: resample is {image['resample']!r}, expected {BICUBIC} (bicubic)")
        if abs(image.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise ConfigError(f"{image_file}: rescale_factor is {image['rescale_factor']!r}, expected 1/255")
        for key in ("image_token_id", "video_token_id"):
            if key not in config:
                raise ConfigError(f"{directory / 'config.json'}: the key {key!r} is missing")
        default = cls()
        shared = ("patch_size", "temporal_patch_size", "merge_size")
        low, high = _pixel_limits(image_file, image, default.min_pixels, default.max_pixels)
        video_low, video_high = _pixel_limits(video_file, video, VideoLimits.min_pixels, VideoLimits.max_pixels)
        sampled = {key: video[key] for key in ("min_frames", "max_frames") if video.get(key) is not None}
        return cls(
            **{key: image.get(key, getattr(default, key)) for key in shared},
            window_size=vision.get("window_size", default.window_size),
            min_pixels=low,
            max_pixels=high,
            image_token_id=config["image_token_id"],
            video_token_id=config["video_token_id"],
            tokens_per_second=vision.get("tokens_per_second", default.tokens_per_second),
            video=VideoLimits(
                min_pixels=video_low,
                max_pixels=video_high,
                fps=video.get("fps") if video.get("do_sample_frames") else None,
                cap_total=bool(video.get("cap_pixels_per_frame")),
                max_tokens=video.get("max_video_tokens", VideoLimits.max_tokens),
                **sampled,
            ),
        )


def image_settings(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The file of an HF directory that says how pictures are processed, and what it says; {} where there is none."""
    nested = directory / "processor_config.json"
    image = _read_json(nested, optional=True).get("image_processor")
    if image:
        return nested, image
    file = directory / "preprocessor_config.json"
    return file, _read_json(file, optional=True)


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    if not path.exists():
        if optional:
            return {}
        raise ConfigError(f"{path}: no such file; a model directory of a vision-language model needs it")
    try:
        data = json.loads(read_text(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected an object")
    return data


def _pixel_limits(file: Path, config: dict[str, Any], low: int, high: int) -> tuple[int, int]:
    """Least and most pixels of a resized picture: `min_pixels` and `max_pixels`, or else the entries of `size`.

    Entries of `size` may also have these names, as older versions of transformers wrote them. Where `size` is stated,
    it has to give what the other two do not, as in transformers.
    """
    size = config.get("size")
    size = {"shortest_edge": low, "longest_edge": high} if size is None else size
    given = size if isinstance(size, dict) else {}
    limits = []
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        value = next((v for v in (config.get(key), given.get(edge), given.get(key)) if v is not None), None)
        if value is None:
            raise ConfigError(
                f"{file}: size is {size!r}, expected {{'shortest_edge': least pixels, 'longest_edge': most pixels}} or "
                f"the keys min_pixels and max_pixels: pictures keep their shape, and {key} is not stated"
            )
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{file}: {key} is {value!r}, expected a number of pixels, 1 or more")
        limits.append(value)
    if limits[0] > limits[1]:
        raise ConfigError(f"{file}: min_pixels is {limits[0]}, above max_pixels {limits[1]}")
    return limits[0], limits[1]


class Processor:
    """Conversation in, `Example` out.

    Args:
        tokenizer: a fast tokenizer of transformers.
        settings: what the model wants of its pictures.
        chat_template: the Jinja text of its chat template.
        layout: how the model wants its pictures laid out (`ModelOptions.layout`).
        special_tokens_in_text: what special tokens are that a message spells out: "text" like any other, or "tokens".

    Raises:
        ConfigError: the chat template cannot be used.
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: ProcessorSettings,
        chat_template: str,
        layout: VisualLayout | None = None,
        special_tokens_in_text: SpecialTokens = "text",
    ):
        self.tokenizer = tokenizer
        self.settings = settings
        self.layout = layout or VisualLayout()
        self.chat = ChatTemplate(tokenizer, chat_template, special_tokens_in_text)

    @classmethod
    def from_hf(
        cls,
        directory: str | Path,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        layout: VisualLayout | None = None,
        special_tokens_in_text: SpecialTokens = "text",
    ) -> Processor:
        """The processor of an HF directory, with other pixel limits for pictures where given, and the layout that the
        model wants of them.

        Raises:
            ConfigError: a file or key is missing.
        """
        # transformers would otherwise advise to install torch, at every start of a program that needs none.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer

        try:
            settings = ProcessorSettings.from_hf(directory)
        except ConfigError:
            raise
        except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise ConfigError(
                f"{directory}: config.json or a processor file has a value of the wrong kind: {error}"
            ) from error
        low = settings.min_pixels if min_pixels is None else min_pixels
        high = settings.max_pixels if max_pixels is None else max_pixels
        try:
            check_folder(directory, TOKENIZER_FILES)
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be read: {error.strerror or error}") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(directory))
        except Exception as error:  # the libraries below raise many kinds for files that are not theirs
            raise ConfigError(f"{directory}: no tokenizer could be read: {error}") from error
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(f"{directory}: {type(tokenizer).__name__} is no fast tokenizer")
        check_directory(Path(directory), _read_json(Path(directory) / "config.json"), tokenizer)
        settings = replace(settings, min_pixels=low, max_pixels=high)
        template = read_template(directory, tokenizer)
        try:
            return cls(tokenizer, settings, template, layout, special_tokens_in_text)
        except ConfigError as error:
            raise ConfigError(f"{directory}: {error}") from error

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
        return self.chat.end_id

    def decode(self, tokens: Sequence[int] | NpArray) -> str:
        """The text of token ids, special tokens left out."""
        return self.tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=True)

    def count_tokens(self, height: int, width: int) -> int:
        """Number of visual and context tokens of a picture of this size (see `images.image_size` for a file's)."""
        s = self.settings
        return count_tokens(height, width, s.grid, s.min_pixels, s.max_pixels) + self.layout.extra_tokens((1, 0, 0))

    def encode(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        name: str = "",
        most_tokens: int | None = None,
    ) -> Example:
        """One conversation in numbers.

        Args:
            messages: the conversation.
            add_generation_prompt: end with the header of an answer to come.
            name: what errors call the sample.
            most_tokens: what the caller has room for. A text that is too long for it whatever its tokens is refused
                before they are made, which takes seconds and gigabytes for a few megabytes of text; one that may fit is
                encoded, and its tokens are for the caller to count.

        Raises:
            SampleError: a message, a picture or a placeholder that cannot be used. Says which sample and file.
            OverBudget: a text that is too long for `most_tokens`, or longer than any model reads.
        """
        try:
            self._check_length(messages, most_tokens)
            return self._encode(messages, add_generation_prompt)
        except SampleError as error:
            raise (type(error)(f"{name}: {error}") if name else error) from error

    def _check_length(self, messages: Sequence[Message], most_tokens: int | None) -> None:
        texts = [text for message in messages for text in _texts(message)]
        length = sum(map(len, texts))
        size = length if 4 * length <= MOST_BYTES else sum(len(text.encode(errors="surrogatepass")) for text in texts)
        if size > MOST_BYTES:
            raise OverBudget(f"the text has {size} bytes, expected at most {MOST_BYTES}")
        # No token is made of less than one character, so a short text needs no look at the vocabulary.
        if most_tokens is not None and length > most_tokens:
            most = most_tokens * self._longest_token * SHRINKING
            if length > most:
                raise OverBudget(
                    f"the text has {length} characters; the budget of tokens {most_tokens} holds at most {most}"
                )

    @functools.cached_property
    def _longest_token(self) -> int:
        """Characters of the longest token of the vocabulary. Where tokens are written in bytes, these are no fewer."""
        return max(map(len, self.tokenizer.get_vocab()))

    def _encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> Example:
        runs = self.chat.runs(messages, add_generation_prompt)
        parts = [part for run in runs for part in run.visuals]
        if parts and not self.settings.has_vision:
            raise SampleError("the conversation has pictures and the model takes none")
        places = self._placeholders(runs, parts)
        cuts = [self._cut(part) for part in parts]
        ids = np.concatenate([np.asarray(run.ids, np.int32) for run in runs])
        repeats = np.ones(len(ids), np.int32)
        repeats[places] = [len(cut.order) for cut, _ in cuts]
        starts = (np.cumsum(repeats) - repeats)[places]
        turn = np.cumsum([run.role is Role.QUESTION for run in runs])
        lengths = [len(run.ids) for run in runs]

        def spread(values: Any) -> Any:
            return np.repeat(np.repeat(values, lengths).astype(np.int32), repeats)

        learn = np.concatenate([_span(len(run.ids), run.learn, run.weight) for run in runs])
        tokens = np.repeat(ids, repeats)
        visuals = [Visual(int(start), cut.grid, seconds) for start, (cut, seconds) in zip(starts, cuts, strict=True)]
        info, visual_index = self._visual_codes(len(tokens), visuals, [cut for cut, _ in cuts])
        info = info._replace(role=spread([int(run.role) for run in runs]), turn=spread(turn))
        example = Example(
            tokens=tokens,
            loss_mask=np.repeat(learn, repeats),
            info=info,
            positions=mrope_positions(len(tokens), visuals, self.settings.tokens_per_second),
            visual_index=visual_index,
            patches=join_patches([cut.patches for cut, _ in cuts], self.settings.patch_numbers),
        )
        return lay_out(example, self.layout)

    def _cut(self, part: Message) -> tuple[CutPicture, float | None]:
        s = self.settings
        name = part.get("name", "")
        if part["type"] == "video":
            return video_patches(part["video"], part.get("fps"), s.grid, s.video, name)
        return image_patches(part["image"], s.grid, s.min_pixels, s.max_pixels, name), None

    def _placeholders(self, runs: Sequence[Run], parts: Sequence[Message]) -> NpArray:
        """Index of each picture's placeholder in the runs' tokens put end to end."""
        kinds = {self.settings.image_token_id: "image", self.settings.video_token_id: "video"}
        found = [(index, kinds[i]) for index, i in enumerate(i for run in runs for i in run.ids) if i in kinds]
        wanted = [part["type"] for part in parts]
        if [kind for _, kind in found] != wanted:
            raise SampleError(
                f"the rendered text holds the placeholders {[kind for _, kind in found]} for the pictures {wanted}; "
                "does a message spell out a placeholder, with special_tokens_in_text set to 'tokens'?"
            )
        return np.array([index for index, _ in found], np.int64)

    def _visual_codes(self, length: int, visuals: list[Visual], cuts: list[CutPicture]) -> tuple[TokenInfo, NpArray]:
        codes: dict[str, Any] = {name: np.zeros(length, np.int32) for name in TokenInfo._fields}
        codes["document"][:] = 1
        codes["kind"][:] = Kind.TEXT
        codes["offset"][:] = np.arange(length)
        visual_index = np.zeros(length, np.int32)
        units = 0
        for number, (visual, cut) in enumerate(zip(visuals, cuts, strict=True), start=1):
            span = slice(visual.start, visual.start + len(cut.order))
            values = (Kind.VISUAL, number, *grid_coordinates(cut.grid), *cut.grid)
            names = ("kind", "image", "frame", "row", "col", "grid_t", "grid_h", "grid_w")
            for code, value in zip(names, values, strict=True):
                codes[code][span] = value
            visual_index[span] = cut.order + units
            units += len(cut.order)
        return TokenInfo(**codes), visual_index


def _texts(message: Any) -> list[str]:
    """The texts of a message. It may be of any kind: what is wrong with it is said where it is read."""
    content = message.get("content") if isinstance(message, Mapping) else None
    parts = [{"text": content}] if isinstance(content, str) else content if isinstance(content, Sequence) else ()
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    return [text for text in texts if isinstance(text, str)]


def _span(length: int, bounds: tuple[int, int], weight: float) -> NpArray:
    span = np.zeros(length, np.float32)
    span[slice(*bounds)] = weight
    return span
