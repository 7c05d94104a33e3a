"""A model for scripts and notebooks: `rave_jax.load(path)` and what can be asked of it (docs/api.md)."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jax.sharding import AbstractMesh, Mesh

from rave_jax.batch import Batch
from rave_jax.config import ConfigError, local_path, require
from rave_jax.data.chat import SpecialTokens
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Message, SampleError
from rave_jax.families.config import VlmConfig
from rave_jax.inference import Completion, Generator, Request, Sampling, SlotConfig
from rave_jax.inference.forward import Forward, forward
from rave_jax.look.words import WordAttention, word_attention
from rave_jax.models.parameters import named_parameters
from rave_jax.models.vlm import Vlm
from rave_jax.tools import source

GREEDY, ONE = Sampling(), SlotConfig(slots=1)
DTYPES = ("float32", "bfloat16")
Conversation = str | Sequence[Message]
"""Messages in HF chat format, or the text of a single question. Pictures are paths, bytes, arrays or PIL images; videos
are files or lists of pictures."""


@dataclass(frozen=True)
class LoadedModel:
    """A model, what prepares its input, and where it lies.

    Attributes:
        model: the model.
        processor: makes numbers of conversations.
        directory: with the model's config and tokenizer files.
        mesh: the devices; None for a single one, abstract for a model without numbers.
        slots: sizes of `generator`.
    """

    model: Vlm
    processor: Processor
    directory: Path
    mesh: Mesh | AbstractMesh | None
    slots: SlotConfig

    @property
    def config(self) -> VlmConfig:
        """What the model is."""
        return self.model.config

    @functools.cached_property
    def generator(self) -> Generator:
        """Answers many requests at once, by submit, poll and cancel, or from a source. Made at its first use, when the
        cache takes its memory."""
        return source.generator_of(self.model, self.processor, self.slots, self._devices())

    def generate(self, messages: Conversation, sampling: Sampling = GREEDY) -> Completion:
        """The answer to a conversation.

        Args:
            messages: the conversation; the last message asks.
            sampling: how the answer is chosen and when it ends.

        Raises:
            SampleError: the conversation cannot be answered; says why.
        """
        (end,) = self.generator.answers([Request(_messages(messages), sampling, "messages")])
        if isinstance(end, SampleError):
            raise end
        return end

    def stream(self, messages: Conversation, sampling: Sampling = GREEDY) -> Iterator[str]:
        """The text of an answer as it comes; put end to end it is that of `generate`. Closing it ends the answer.

        Args:
            messages: the conversation; the last message asks.
            sampling: how the answer is chosen and when it ends.

        Raises:
            SampleError: the conversation cannot be answered; says why.
        """
        with contextlib.closing(self.generator.stream([Request(_messages(messages), sampling, "messages")])) as pieces:
            for piece in pieces:
                if isinstance(piece.end, SampleError):
                    raise piece.end
                if piece.text:
                    yield piece.text

    def forward(
        self, given: Conversation | Batch, *, add_generation_prompt: bool = False, logits: bool = True
    ) -> Forward:
        """Hidden states and logits of every token, in one pass.

        Args:
            given: a conversation, of which the arrays have the shape [T, ...] without padding, or a batch, [B,T, ...].
            add_generation_prompt: a conversation ends with the header of an answer to come.
            logits: whether they are wanted; they are the largest of the arrays.

        Raises:
            SampleError: a message or a picture that cannot be used.
        """
        asked = given if isinstance(given, Batch) else _messages(given)
        return forward(
            self.model,
            self.processor,
            asked,
            mesh=self._devices(),
            add_generation_prompt=add_generation_prompt,
            logits=logits,
        )

    def attention(
        self, messages: Conversation, words: Sequence[str] = (), *, add_generation_prompt: bool = False
    ) -> WordAttention:
        """Attention of words of a conversation, in every layer and head; `.on(word)` is that on a picture's cells.

        Args:
            messages: the conversation.
            words: texts in it; each counts in the last place where it stands. None asks for the last token.
            add_generation_prompt: end with the header of an answer to come; its last token chooses the answer's first.

        Raises:
            ConfigError: the conversation does not have a word.
            SampleError: a message or a picture that cannot be used.
        """
        return word_attention(
            self.model,
            self.processor,
            _messages(messages),
            words,
            mesh=self._devices(),
            add_generation_prompt=add_generation_prompt,
        )

    def parameter_bytes(self) -> tuple[int, int]:
        """Bytes of all parameters, and of those that one device holds."""
        params = [param.get_value() for param in named_parameters(self.model).values()]
        whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in params)
        here = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in params)
        return whole, here

    def _devices(self) -> Mesh | None:
        if isinstance(self.mesh, AbstractMesh):
            raise ConfigError(
                "the model was loaded on an abstract mesh, so it has no numbers to compute with: load it without `mesh`"
            )
        return self.mesh


def load(
    path: str | Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    slots: SlotConfig = ONE,
    special_tokens_in_text: SpecialTokens | None = None,
) -> LoadedModel:
    """Open a model: the directory of a training run, a model in HuggingFace format, or a native checkpoint.

    Args:
        path: the directory.
        step: of a run; None is its newest checkpoint.
        dtype: number type of parameters and activations, float32 or bfloat16; None is as it was trained or written.
        mesh: where the model goes; None is all devices. On an abstract mesh (`parallel.mesh.abstract_mesh`) the model
            has shapes and shardings alone: no weights are read, and its memory is known without devices.
        slots: how many answers grow at once, and how long they and their prompts may be.
        special_tokens_in_text: what a special token spelt in a message is, "text" or "tokens"; None is as in the run's
            training, or else text.

    Raises:
        ConfigError: says what the directory is, and which file or key cannot be used.
        StoreError: a checkpoint of the run cannot be read.
    """
    require(dtype is None or dtype in DTYPES, "dtype", dtype, " or ".join(DTYPES))
    directory = local_path(path, "path").expanduser()
    # Before the weights, which may take minutes.
    processor = source.processor_of(directory, special_tokens_in_text)
    changes = source.for_generation(directory, dtype)
    if isinstance(mesh, AbstractMesh):
        changes.pop("scan_layers", None)  # as the devices have it that are planned for
    loaded = source.load(directory, step, changes, mesh=mesh)
    return LoadedModel(loaded.model, processor, loaded.directory, loaded.mesh, slots)


def _messages(given: Conversation) -> Sequence[Message]:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given
