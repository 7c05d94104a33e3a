"""Conversations with pictures into numbers, as a model's own processor in transformers does it, without torch."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rave_jax.batch import Kind, Role, TokenInfo
from rave_jax.config import ConfigError
from rave_jax.data.chat import ChatTemplate, Run, SpecialTokens, read_template
from rave_jax.data.images import cut_image, image_grid
from rave_jax.data.layout import check_region_sizes, lay_out
from rave_jax.data.padding import padded
from rave_jax.data.patches import join_patches
from rave_jax.data.sample import Example, ImageError, Message, OverBudget, SampleError
from rave_jax.data.video import cut_video, used_frames, video_grid
from rave_jax.data.video_text import VideoText
from rave_jax.data.vocabulary import check_directory
from rave_jax.families.directory import picture_rules
from rave_jax.families.pictures import (
    NO_VIDEOS,
    CutPicture,
    Form,
    Frames,
    PictureError,
    PictureRules,
    Piece,
    Visual,
    VisualKind,
    grid_coordinates,
)
from rave_jax.files import check_folder
from rave_jax.layout import WHOLE, Shown, VisualLayout
from rave_jax.typing import NpArray

MOST_BYTES = 2**22
"""Of a conversation's text: about a million tokens, more than models read."""
MOST_TOKENS = 2**20
"""Of a conversation's videos, where the caller sets no budget."""
MOST_PATCHES = 2**24
"""Of a video. Its header may claim any number of frames, and tokens are counted by making them."""
SHRINKING = 4
"""Characters that a tokenizer's normaliser may make one of, as NFC does with a letter and its accents."""
TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.jinja", "*.model", "*config.json")
"""Names of the files that transformers opens for a tokenizer."""


class Size(NamedTuple):
    """What a conversation takes of a row.

    Fields:
        tokens: text and visual together.
        patches: of all its pictures and videos.
        regions: of its pictures; 0 where the visual layout has none.
        pictures: pictures and videos.
    """

    tokens: int
    patches: int
    regions: int
    pictures: int


class Processor:
    """Conversation in, `Example` out.

    Args:
        tokenizer: a fast tokenizer of transformers.
        rules: what the model makes of pictures.
        chat_template: the Jinja text of its chat template.
        layout: how the model wants its pictures laid out (`ModelOptions.layout`).
        special_tokens_in_text: what special tokens are that a message spells out: "text" like any other, or "tokens".

    Raises:
        ConfigError: the chat template cannot be used.
    """

    def __init__(
        self,
        tokenizer: Any,
        rules: PictureRules,
        chat_template: str,
        layout: VisualLayout | None = None,
        special_tokens_in_text: SpecialTokens = "text",
    ):
        self.tokenizer = tokenizer
        self.rules = rules
        self.layout = layout or VisualLayout()
        self._special_tokens_in_text: SpecialTokens = special_tokens_in_text
        self.chat = self._chat(chat_template)

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

        rules = picture_rules(directory).limited(min_pixels, max_pixels)
        try:
            check_folder(directory, TOKENIZER_FILES)
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be read: {error.strerror or error}") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(directory))
        except Exception as error:  # the libraries below raise many kinds for files that are not theirs
            raise ConfigError(f"{directory}: no tokenizer could be read: {error}") from error
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(f"{directory}: {type(tokenizer).__name__} is not a fast tokenizer (tokenizer.json)")
        check_directory(Path(directory), rules.config, tokenizer, rules.video_placeholder)
        template = read_template(directory, tokenizer)
        try:
            return cls(tokenizer, rules, template, layout, special_tokens_in_text)
        except ConfigError as error:
            raise ConfigError(f"{directory}: {error}") from error

    def _chat(self, template: str) -> ChatTemplate:
        placeholder = self.rules.video_placeholder
        videos = VideoText(placeholder, self._spelled) if placeholder else None
        return ChatTemplate(self.tokenizer, template, self._special_tokens_in_text, self.rules.has_vision, videos)

    @functools.cached_property
    def _video_chat(self) -> ChatTemplate:
        """The chat template of conversations with videos."""
        return self._chat(self.rules.video_template) if self.rules.video_template else self.chat

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
        return self.chat.end_id

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of everything that the tokens and patches of a conversation depend on, beside the conversation."""
        tokenizer = self.tokenizer
        said = (
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.special_tokens_map,
            self.chat.settings,
            type(self.rules).__qualname__,
            self.rules,
            self.rules.video_template,
            self.rules.video_placeholder,
            self.layout,
        )
        return hashlib.blake2b(repr(said).encode(errors="surrogatepass"), digest_size=16).hexdigest()

    def decode(self, tokens: Sequence[int] | NpArray) -> str:
        """The text of token ids, special tokens left out."""
        return self.tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=True)

    def count_tokens(self, height: int, width: int) -> int:
        """Number of visual and context tokens of a picture of this size (see `images.image_size` for a file's).

        Raises:
            ImageError: a size that the model does not take.
        """
        try:
            grid = self.rules.image_grid(height, width)
        except PictureError as error:
            raise ImageError(str(error)) from error
        return self._count(self._pieces("image", grid, None))

    def runs(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[Run]:
        """The conversation as runs of tokens (`ChatTemplate.runs`), in which a placeholder stands once for each picture
        and video. Of a video, its number of frames and its fps are read.

        Raises:
            SampleError: a message, a video or a placeholder that cannot be used.
        """
        if not _has_videos(messages):
            return self.chat.runs(messages, add_generation_prompt)
        if self.rules.has_vision and not self.rules.takes_videos:
            raise SampleError(NO_VIDEOS)
        try:
            chat = self._video_chat
        except ConfigError as error:
            raise SampleError(f"the tokenizer does not fit the chat template of videos: {error}") from error
        return chat.runs(messages, add_generation_prompt)

    def _spelled(self, part: Message) -> str:
        """A video part as text: one placeholder of a picture for all of its visual tokens, and the texts beside it."""
        frames = used_frames(part["video"], part.get("fps"), self.rules, part.get("name", ""))
        before, behind = self.rules.beside(frames)
        return before + self.tokenizer.convert_ids_to_tokens(self.rules.image_token_id) + behind

    def need(self, part: Message, pictures: int = 1) -> tuple[int, int]:
        """(tokens, patches) of a picture or video part in a conversation of so many pictures, from the header of the
        picture, of a video's first frame or of its file. Text beside a video that `runs` gives is not among them.

        Raises:
            ImageError: no picture, or a video without frames.
            OverBudget: a video with more patches than any row holds.
        """
        pieces, patches = self._measured(part, self.rules.among(pictures))
        return self._count(pieces), patches

    def size(self, messages: Sequence[Message], name: str = "") -> Size:
        """What `encode` makes of a conversation, counted from its texts and the headers of its pictures.

        Raises:
            SampleError: whatever `encode` raises but for what only the pixels of a picture show.
        """
        try:
            self._check_length(messages, None)
            runs, parts, _ = self._prepared(messages)
            rules = self.rules.among(count_pictures(parts))
            measured = [self._measured(part, rules) for part in parts]
            pieces = [piece for mine, _ in measured for piece in mine]
            text = sum(len(run.ids) for run in runs) - len(parts)  # a placeholder stands once for each
            self._check_longest(text + sum(len(piece.tokens) for piece in pieces))
            grids = [piece.grid for piece in pieces if piece.grid is not None]
            check_region_sizes(grids, self.layout)
            regions = sum(map(self.layout.count_regions, grids))
            patches = sum(count for _, count in measured)
            return Size(text + self._count(pieces), patches, regions, len(parts))
        except SampleError as error:
            raise (error.at(name) if name else error) from error

    def _measured(self, part: Message, rules: PictureRules) -> tuple[tuple[Piece, ...], int]:
        """What stands in a prompt for a picture or video, and its patches."""
        kind, name = part["type"], part.get("name", "")
        if kind == "video":
            grid, frames = video_grid(part["video"], part.get("fps"), rules, name)
        else:
            grid, frames = image_grid(part["image"], rules, name), None
        patches = self.rules.count_patches(grid)
        if patches > MOST_PATCHES:
            raise OverBudget(f"{name or kind}: {patches} patches, expected at most {MOST_PATCHES}", 0, patches)
        return self._pieces(kind, grid, frames), patches

    def _count(self, pieces: Sequence[Piece]) -> int:
        grids = (piece.grid for piece in pieces if piece.grid is not None)
        return sum(len(piece.tokens) for piece in pieces) + sum(map(self.layout.extra_tokens, grids))

    def _pieces(self, kind: VisualKind, grid: Form, frames: Frames | None) -> tuple[Piece, ...]:
        return self.rules.expand(kind, grid, frames, self._words)

    def _words(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

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
            add_generation_prompt: end the prompt where an answer would begin.
            name: what errors call the sample.
            most_tokens: what the caller has room for. A text that is too long for it whatever its tokens is refused
                before they are made, which takes seconds and gigabytes for a few megabytes of text; one that may fit is
                encoded, and its tokens are for the caller to count.

        Raises:
            SampleError: a message, a picture or a placeholder that cannot be used. Says which sample and file.
            OverBudget: a text or videos that are too long for `most_tokens`, or a text longer than any model reads.
        """
        try:
            self._check_length(messages, most_tokens)
            return self._encode(messages, add_generation_prompt, most_tokens)
        except SampleError as error:
            raise (error.at(name) if name else error) from error

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

    def _check_videos(self, parts: Sequence[Message], most_tokens: int | None) -> None:
        """A long video is refused before it is decoded."""
        pictures = count_pictures(parts)
        needs = [self.need(part, pictures) for part in parts if part["type"] == "video"]
        tokens, patches = (sum(need[i] for need in needs) for i in (0, 1))
        if tokens > (most_tokens := MOST_TOKENS if most_tokens is None else most_tokens):
            whose = "the video takes" if len(needs) == 1 else f"the {len(needs)} videos take"
            raise OverBudget(f"{whose} {tokens} tokens, over the budget of {most_tokens} tokens", tokens, patches)

    def _encode(
        self, messages: Sequence[Message], add_generation_prompt: bool, most_tokens: int | None = None
    ) -> Example:
        runs, parts, places = self._prepared(messages, add_generation_prompt)
        self._check_videos(parts, most_tokens)
        rules = self.rules.among(count_pictures(parts))
        cuts, pieces = [], []
        for part in parts:
            cut, frames = _cut(part, rules)
            cuts.append(cut)
            pieces.append(self._pieces(part["type"], cut.grid, frames))
        ids = np.concatenate([np.asarray(run.ids, np.int32) for run in runs])
        repeats = np.ones(len(ids), np.int32)
        repeats[places] = [sum(len(piece.tokens) for piece in mine) for mine in pieces]
        starts = (np.cumsum(repeats) - repeats)[places]
        turn = np.cumsum([run.role is Role.QUESTION for run in runs])
        lengths = [len(run.ids) for run in runs]

        def spread(values: Any) -> Any:
            return np.repeat(np.repeat(values, lengths).astype(np.int32), repeats)

        learn = np.concatenate([_span(len(run.ids), run.learn, run.weight) for run in runs])
        tokens = np.repeat(ids, repeats)
        visuals = []
        for start, mine in zip(starts.tolist(), pieces, strict=True):
            for piece in mine:
                tokens[start : start + len(piece.tokens)] = piece.tokens
                if piece.grid is not None:
                    visuals.append(Visual(start, piece.grid, piece.seconds))
                start += len(piece.tokens)
        self._check_longest(len(tokens))
        info, visual_index = _visual_codes(len(tokens), visuals, cuts)
        patches = join_patches([cut.patches for cut in cuts], self.rules.patch_sizes)
        shown = tuple(
            Shown(number, box)
            for number, (cut, mine) in enumerate(zip(cuts, pieces, strict=True), start=1)
            for box in cut.shown or [WHOLE for piece in mine if piece.grid is not None]
        )
        border: Any = padded(info, shown, visual_index, patches)
        info = info._replace(role=spread([int(run.role) for run in runs]), turn=spread(turn), padded=border)
        example = Example(
            tokens=tokens,
            loss_mask=np.repeat(learn, repeats),
            info=info,
            positions=self.rules.positions(len(tokens), visuals),
            visual_index=visual_index,
            patches=patches,
            shown=shown,
        )
        return lay_out(example, self.layout, one_axis=not self.rules.config.text.mrope_section)

    def _prepared(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> tuple[list[Run], list[Message], NpArray]:
        """The runs of a conversation, its pictures and videos, and where their placeholders stand."""
        runs = self.runs(messages, add_generation_prompt)
        parts = [part for run in runs for part in run.visuals]
        if parts and not self.rules.has_vision:
            raise SampleError("the conversation has pictures, but the model is for text only")
        return runs, parts, self._placeholders(runs, parts)

    def _check_longest(self, tokens: int) -> None:
        longest = self.rules.config.text.longest
        if longest is not None and tokens > longest:
            raise OverBudget(f"{tokens} tokens; the model's longest text is {longest} (RoPE of type 'dynamic')")

    def _placeholders(self, runs: Sequence[Run], parts: Sequence[Message]) -> NpArray:
        """Index of each picture's placeholder in the runs' tokens put end to end."""
        kinds = {self.rules.image_token_id: "image", self.rules.video_token_id: "video"}
        found = [(index, kinds[i]) for index, i in enumerate(i for run in runs for i in run.ids) if i in kinds]
        # Where videos were written as text, the placeholder of each is that of a picture.
        wanted = ["image" if self.rules.video_placeholder else part["type"] for part in parts]
        if [kind for _, kind in found] != wanted:
            raise SampleError(
                f"the rendered text has the placeholders {[kind for _, kind in found]}, but the pictures are {wanted}; "
                "does a message spell out a placeholder, with special_tokens_in_text set to 'tokens'?"
            )
        return np.array([index for index, _ in found], np.int64)


def count_pictures(parts: Sequence[Message]) -> int:
    """Pictures among the picture and video parts of a conversation."""
    return sum(part["type"] == "image" for part in parts)


def _has_videos(messages: Sequence[Message]) -> bool:
    """Has a message a video part? Messages may be of any form: what is wrong with one is said where it is read."""
    contents = [message.get("content") for message in messages if hasattr(message, "get")]
    lists = (content for content in contents if isinstance(content, Sequence) and not isinstance(content, str | bytes))
    return any(part.get("type") == "video" for parts in lists for part in parts if hasattr(part, "get"))


def _cut(part: Message, rules: PictureRules) -> tuple[CutPicture, Frames | None]:
    name = part.get("name", "")
    if part["type"] == "video":
        return cut_video(part["video"], part.get("fps"), rules, name)
    return cut_image(part["image"], rules, name), None


def _visual_codes(length: int, visuals: Sequence[Visual], cuts: Sequence[CutPicture]) -> tuple[TokenInfo, NpArray]:
    """Token codes of one document, and which merge unit each visual token holds. The visual tokens, in order, hold the
    units of the pictures, in the order of their merged grids."""
    codes: dict[str, Any] = {name: np.zeros(length, np.int32) for name in TokenInfo._fields}
    codes["document"][:] = 1
    codes["kind"][:] = Kind.TEXT
    codes["offset"][:] = np.arange(length)
    before = np.cumsum([0, *(len(cut.order) for cut in cuts)])
    units = np.concatenate([[], *(cut.order + n for cut, n in zip(cuts, before, strict=False))]).astype(np.int32)
    visual_index = np.zeros(length, np.int32)
    done = 0
    for number, visual in enumerate(visuals, start=1):
        count = math.prod(visual.grid)
        span = slice(visual.start, visual.start + count)
        values = (Kind.VISUAL, number, *grid_coordinates(visual.grid), *visual.grid)
        names = ("kind", "image", "frame", "row", "col", "grid_t", "grid_h", "grid_w")
        for code, value in zip(names, values, strict=True):
            codes[code][span] = value
        visual_index[span] = units[done : done + count]
        done += count
    assert done == len(units), "the visual tokens are not those of the pictures"
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
