"""Conversations in, text out: the processor before the slots and text after them, request by request."""

from __future__ import annotations

from collections import abc, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jax.sharding import Mesh

from rave_jax.config import require
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Message, SampleError
from rave_jax.data.vocabulary import check_vocabulary
from rave_jax.inference.buckets import SlotConfig
from rave_jax.inference.sampling import Sampling
from rave_jax.inference.slots import Engine, Progress, Reason, Usage
from rave_jax.inference.text import TextStream
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.watchdog import Watchdog

GRACE = 1800.0
"""Seconds beyond the time of a request after which a program is taken for hung; it may have to be compiled first."""
HANG_ADVICE = "start the command again, and look at the device if it hangs there once more"


@dataclass(frozen=True)
class Request:
    """A conversation that waits for an answer."""

    messages: Sequence[Message]
    """The conversation in HF chat format, pictures by path, bytes, array or PIL image; the last message asks."""
    sampling: Sampling = field(default_factory=Sampling)
    """How the answer is chosen and when it ends."""
    name: str = ""
    """Its name in errors."""


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    """The text, without special tokens; it ends before the stop string, if one was met."""
    tokens: tuple[int, ...]
    """Token ids, without the stop token but with those of a stop string."""
    reason: Reason
    """Why it ended."""
    prompt_tokens: int
    """Length of the prompt, visual tokens counted."""


class Piece(NamedTuple):
    """Something that became known of a request: more text, and at the end the whole answer or what went wrong.

    Fields:
        request: its place in the order in which requests were given, from 0.
        text: text that follows what was given before; may be empty.
        end: None while the answer grows.
    """

    request: int
    text: str
    end: Completion | SampleError | None


@dataclass
class _Answer:
    request: int
    prompt_tokens: int
    stream: TextStream
    tokens: list[int]


class Generator:
    """Answers requests with a model, many at once.

    Args:
        model: the model, on the mesh.
        processor: of the model.
        config: sizes of the slots.
        mesh: the devices, or None for a single one.

    Raises:
        ConfigError: more ids end an answer than `config.max_stop_ids`, regions are to lie in host memory where they
            cannot, the tokenizer is of a kind whose text cannot
            be put together token by token or has more ids than the model's embedding has rows, or the processor lays
            pictures out for another model.
    """

    def __init__(self, model: Vlm, processor: Processor, config: SlotConfig, mesh: Mesh | None = None):
        settings = processor.settings
        TextStream(processor.tokenizer)  # refuses the tokenizer now rather than every request later
        wanted = model.options.layout
        check_vocabulary(processor.tokenizer, model.config.text.vocab_size)
        require(processor.layout == wanted, "processor.layout", processor.layout, f"{wanted}, as the model wants it")
        self._streaming = False
        self._processor = processor
        # As many as there are slots, and a group that waits for the next free ones.
        self._most = config.slots + config.prefill_rows
        self._engine = Engine(
            model,
            config,
            (*model.config.eos_token_ids, processor.end_id),
            window_patches=settings.window_patches,
            merge_patches=settings.merge_patches,
            patch_numbers=settings.patch_numbers,
            mesh=mesh,
        )

    @property
    def usage(self) -> Usage:
        """How well the slots were used so far."""
        return self._engine.usage

    def answers(self, requests: Iterable[Request]) -> list[Completion | SampleError]:
        """The whole answer to each request in order, or what was wrong with it."""
        ends = {piece.request: piece.end for piece in self.stream(requests) if piece.end is not None}
        return [ends[n] for n in range(len(ends))]

    def stream(self, requests: Iterable[Request]) -> abc.Generator[Piece]:
        """Pieces of all answers as they come. A request that cannot be answered ends with its error; others go on.

        Requests are taken from the iterable when there is room for them. Closing the iterator ends what runs.

        Raises:
            RuntimeError: another stream of this generator is open; they would take each other's answers.
        """
        if self._streaming:
            raise RuntimeError("a stream of this generator is open: read it to its end or close it first")
        self._streaming = True
        source = enumerate(requests)
        running: dict[int, _Answer] = {}
        refused: deque[Piece] = deque()
        more = True
        try:
            with self._watchdog() as watchdog:
                while more or running:
                    while more and not refused and self._engine.running + self._engine.waiting < self._most:
                        following = next(source, None)
                        more = following is not None
                        if following is not None:
                            self._submit(*following, running, refused)
                    yield from refused
                    refused.clear()
                    with watchdog.during("a program of generation", advice=HANG_ADVICE):
                        step = self._engine.step() if running else []
                    for progress in step:
                        piece = self._piece(progress, running[progress.request])
                        yield piece
                        if piece.end is not None:
                            del running[progress.request]
        finally:
            self._streaming = False
            for number in running:
                self._engine.cancel(number)

    def _watchdog(self) -> Watchdog:
        """Ends the process where a program on the device does not come back; it cannot be ended in any other way."""
        limit = self._engine.config.request_timeout
        return Watchdog(limit and limit + GRACE, setting="request_timeout and half an hour:")

    def _submit(self, place: int, request: Request, running: dict[int, _Answer], refused: deque[Piece]) -> None:
        called = request.name or f"request {place}"
        try:
            example = self._processor.encode(
                request.messages, add_generation_prompt=True, name=called, most_tokens=self._engine.config.max_length
            )
            stream = TextStream(self._processor.tokenizer, request.sampling.stop)
            number = self._engine.submit(example, request.sampling, called)
        except SampleError as error:
            refused.append(Piece(place, "", error))
        else:
            running[number] = _Answer(place, len(example.tokens), stream, [])

    def _piece(self, progress: Progress, answer: _Answer) -> Piece:
        parts, reason = [], progress.reason
        for token in progress.tokens:
            answer.tokens.append(token)
            parts.append(answer.stream.push(token))
            if answer.stream.stopped:
                break
        if progress.error is not None and not answer.stream.stopped:
            return Piece(answer.request, "", progress.error)
        if reason is not None and not answer.stream.stopped:
            parts.append(answer.stream.finish())
        if answer.stream.stopped:
            if reason is None:
                self._engine.cancel(progress.request)
            reason = "stop"
        end = None
        if reason is not None:
            end = Completion(answer.stream.text, tuple(answer.tokens), reason, answer.prompt_tokens)
        return Piece(answer.request, "".join(parts), end)
