"""A sample as a source gives it, the example a processor makes of it, and what can be wrong with either."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from rave_jax.batch import Patches, TokenInfo
from rave_jax.layout import Shown
from rave_jax.typing import Float, Int, NpArray

Message = Mapping[str, Any]
"""A chat message in HF form: `{"role": "system" | "user" | "assistant", "content": text or list of parts}`.

A part is `{"type": "text", "text": str}`, `{"type": "image", "image": path | bytes | PIL image | uint8 array}` or
`{"type": "video", "video": [frames, each as an image], "fps": frames per second}`, or a video file's path or bytes in
place of the list. An image or video part may carry a `name` that errors then say in place of a path. An answer may
carry a `weight`, which its tokens have in the loss: 1 where there is none, 0 for an answer that is not learned.
"""

METRICS = ("exact_match", "relaxed_accuracy", "anls")
"""Names that a sample's `metric` may have; `evaluation/metrics.py` computes them."""


class SampleError(ValueError):
    """A sample that cannot be used. `reason` is the short name it is counted under; the message names the file."""

    reason = "bad record"

    def at(self, where: str) -> SampleError:
        """The same error, `where` in front of what it says."""
        return type(self)(f"{where}: {self}")


class UnreadKey(SampleError):
    """A record that holds something under a name that is not read, and that would be dropped."""

    reason = "unread key"


class ImageError(SampleError):
    """A picture that cannot be read: broken, cut off, animated, too thin, or not a picture."""

    reason = "broken image"


class VideoError(ImageError):
    """A video file that cannot be read: broken, cut off, without frames, or no video."""

    reason = "broken video"


class EmptyAnswer(SampleError):
    """A conversation with nothing to learn: an answer is missing or blank."""

    reason = "empty answer"


class OverBudget(SampleError):
    """A sample with more tokens or patches than its row holds. Nothing is ever cut to make it fit."""

    reason = "over budget"

    def __init__(self, message: str, tokens: int = 0, patches: int = 0):
        """`tokens` and `patches` are what the sample needs; 0 where that is not known."""
        super().__init__(message)
        self.tokens, self.patches = tokens, patches

    def at(self, where: str) -> OverBudget:
        """The same error, `where` in front of what it says."""
        return type(self)(f"{where}: {self}", self.tokens, self.patches)


@dataclass(frozen=True)
class Sample:
    """One conversation about zero or more pictures."""

    id: str
    """Name of the sample in its source, unique there."""
    messages: tuple[Message, ...]
    """The whole conversation; the last message is the assistant's answer, as it is trained."""
    answers: tuple[str, ...]
    """Accepted answers of the last question, the trained one first."""
    metric: str = "exact_match"
    """How a prediction is scored: exact_match, relaxed_accuracy or anls."""
    source: str = ""
    """Name of the source."""
    evidence: tuple[float, float, float, float] | None = None
    """Pixel box x1, y1, x2, y2 of the answer's evidence in the picture `evidence_image`, if known."""
    template: str = ""
    """The question with its contents left out: samples of one template ask the same kind of thing."""
    task: str = ""
    """The task the sample belongs to, for tables."""
    evidence_image: int = 0
    """Number of the picture with the evidence, from 0."""

    @property
    def called(self) -> str:
        """What errors call it: its source and its name there."""
        return f"{self.source}/{self.id}" if self.source else self.id

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The conversation up to its last question: what generation starts from."""
        return self.messages[:-1] if self.messages and self.messages[-1]["role"] == "assistant" else self.messages

    @property
    def question(self) -> str:
        """Text of the last question, its pictures left out."""
        for message in reversed(self.messages):
            if message["role"] == "user":
                return message_text(message)
        return ""

    @property
    def images(self) -> tuple[Any, ...]:
        """The pictures of the conversation in order, as they stand in its messages."""
        parts = (part for m in self.messages if not isinstance(m["content"], str) for part in m["content"])
        return tuple(part["image"] for part in parts if part["type"] == "image")

    @property
    def evidence_picture(self) -> Any:
        """The picture with the evidence, as it stands in the messages; the first where none is known."""
        return self.images[self.evidence_image]

    @property
    def has_visuals(self) -> bool:
        """Has the conversation pictures or videos?"""
        parts = (part for m in self.messages if not isinstance(m["content"], str) for part in m["content"])
        return any(part["type"] != "text" for part in parts)


def message_text(message: Message) -> str:
    """The text of a message, its pictures left out."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def without_pictures(message: Message) -> Message:
    """A message with its text alone."""
    content = message["content"]
    if isinstance(content, str):
        return message
    return {**message, "content": [part for part in content if part["type"] == "text"]}


class Part(NamedTuple):
    """Samples of a source that lie together, such as those of a file.

    Fields:
        length: how many.
        fingerprint: of what they hold, in their order.
        data: the file or folder that holds them; what is made from them once lies beside it. Empty: nowhere.
    """

    length: int
    fingerprint: str
    data: str = ""


class Source(Protocol):
    """Samples by index: random access, the same sample for the same index whoever asks."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """Of what the source holds, in its order; empty where its config says it all."""
        ...

    @property
    def parts(self) -> tuple[Part, ...]:
        """The samples in their order, in parts that change apart from each other."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class Example(NamedTuple):
    """One conversation in numbers, before padding. The fields are those of `Batch` for one document.

    Fields:
        tokens: token ids, placeholders of pictures repeated once per merged patch.
        loss_mask: the answer's weight (1 unless it has one) on tokens of answers (with the end-of-message token,
            without the header), 0 elsewhere.
        info: token codes of one document (document 1; images counted from 1).
        positions: rotary positions: temporal, height, width.
        visual_index: which merged patch of the document a visual token is; 0 for text.
        patches: patches of the document's pictures.
        shown: for each number of `info.image`, from 1, what its tokens show; empty: each is a whole picture.
    """

    tokens: Int[NpArray, "T"]
    loss_mask: Float[NpArray, "T"]
    info: TokenInfo
    positions: Int[NpArray, "3 T"]
    visual_index: Int[NpArray, "T"]
    patches: Patches
    shown: tuple[Shown, ...] = ()
