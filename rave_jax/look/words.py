"""Attention of single words of a conversation over its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from rave_jax.batch import TokenInfo
from rave_jax.config import ConfigError, require
from rave_jax.data.collate import round_up
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Message
from rave_jax.inference.forward import attention_rows, batch_of
from rave_jax.inference.text import TokenBytes
from rave_jax.layout import Shown
from rave_jax.look.maps import Look, over_picture
from rave_jax.models.vlm import Vlm
from rave_jax.typing import Float, Int, NpArray

ROW_BUCKET = 8
"""Queries are padded to a multiple of it, so that few programs are compiled."""
BETWEEN = b"\xff"
"""Stands for a special token; no text has this byte."""


@dataclass(frozen=True)
class WordAttention:
    """Rows of attention of words over a whole conversation.

    Attributes:
        words: as they were asked for; the last token of the conversation is "".
        weights: what each word's tokens pay to every token, averaged over them; [layers, words, heads, tokens].
        tokens: ids of the conversation.
        info: token codes of the conversation.
        layers: numbers of the layers in the model: of those that attend.
        shown: what the tokens of each image number of `info` show, from 1.
    """

    words: tuple[str, ...]
    weights: Float[NpArray, "L N H S"]
    tokens: Int[NpArray, "S"]
    info: TokenInfo
    layers: tuple[int, ...] = ()
    shown: tuple[Shown, ...] = ()

    def on(self, word: str | None = None, image: int = 1) -> Look:
        """Attention of a word on the cells of a picture.

        Args:
            word: one of `words`; None is the first.
            image: number of the picture or video in the conversation, from 1.

        Raises:
            ConfigError: the word was not asked for, or there is no such picture.
        """
        if word is not None and word not in self.words:
            raise ConfigError(f"word is {word!r}, expected one that was asked for: {', '.join(map(repr, self.words))}")
        row = 0 if word is None else self.words.index(word)
        grid = over_picture(self.info, self.weights[:, row], self.shown, image)
        if grid is None:
            count = max((one.picture for one in self.shown), default=0)
            raise ConfigError(f"image is {image}, expected 1 to {count}, the pictures of the conversation")
        return Look(grid, self.layers)


def word_attention(
    model: Vlm,
    processor: Processor,
    messages: Sequence[Message],
    words: Sequence[str] = (),
    *,
    mesh: Mesh | None = None,
    add_generation_prompt: bool = False,
) -> WordAttention:
    """Attention of words, each in the last place where the conversation has it.

    The tokens of a word are those that spell a part of it. A token attends where it stands; it was chosen by the one
    before it.

    Args:
        model: on the mesh.
        processor: of the model.
        messages: the conversation.
        words: texts in it, each of at least one character; none asks for the last token, which chooses the next one.
        mesh: the devices, None for a single one.
        add_generation_prompt: end with the header of an answer to come.

    Raises:
        ConfigError: the conversation does not have a word.
        SampleError: a message or a picture that cannot be used.
    """
    if isinstance(words, str):
        raise ConfigError(f"words is {words!r}, expected a list of texts: [{words!r}]")
    example = processor.encode(messages, add_generation_prompt)
    spans = _spans(processor.tokenizer, example.tokens, words) if words else [range(len(example.tokens))[-1:]]
    queries = [token for span in spans for token in span]
    rows: Any = np.zeros((1, round_up(len(queries), ROW_BUCKET)), np.int32)
    rows[0, : len(queries)] = queries
    found = attention_rows(model, batch_of(example, processor), rows, mesh)[:, 0, :, :, : len(example.tokens)]
    ends = np.cumsum([len(span) for span in spans])
    weights = np.stack([found[:, end - len(span) : end].mean(1) for span, end in zip(spans, ends, strict=True)], axis=1)
    layers = model.config.text.attention_layers
    return WordAttention(tuple(words) or ("",), weights, example.tokens, example.info, layers, example.shown)


def _spans(tokenizer: Any, tokens: NpArray, words: Sequence[str]) -> list[range]:
    """The tokens of each word in its last place."""
    bytes_of = TokenBytes(tokenizer)
    parts = [bytes_of(int(token)) or BETWEEN for token in tokens]
    ends = np.cumsum([len(part) for part in parts])
    text = b"".join(parts)
    spans = []
    for word in words:
        at = text.rfind(word.encode()) if word else -1
        require(at >= 0, "words", word, "a text that the conversation has")
        first, last = np.searchsorted(ends, [at, at + len(word.encode()) - 1], side="right")
        spans.append(range(int(first), int(last) + 1))
    return spans
