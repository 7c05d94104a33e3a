"""Conversations in, text out: the processor before the slots and text after them, request by request."""

from __future__ import annotations

import functools
import threading
from collections import abc, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jax.sharding import Mesh

from rave_jax.config import require
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Example, Message, SampleError, without_pictures
from rave_jax.data.vocabulary import check_vocabulary
from rave_jax.inference import interrupts
from rave_jax.inference.buckets import SlotConfig
from rave_jax.inference.content import content_tokens
from rave_jax.inference.intake import intake
from rave_jax.inference.programs import SlotState
from rave_jax.inference.prompted import Asking
from rave_jax.inference.sampling import Sampling
from rave_jax.inference.slots import Engine, Progress, Reason, Usage
from rave_jax.inference.text import TextStream
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.watchdog import Watchdog
from rave_jax.typing import Bool, NpArray

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
    """What came of a request: more text, and at the end the whole answer or what went wrong.

    Fields:
        request: the number that `submit` gave; of a stream, its place in the order in which requests were given, from
            0.
        text: text that follows what was given before; may be empty.
        end: None while the answer grows.
    """

    request: int
    text: str
    end: Completion | SampleError | None


class _Ready(NamedTuple):
    """A request as the slots take it."""

    called: str
    example: Example
    sampling: Sampling
    stream: TextStream
    blind: Example | None
    content: Bool[NpArray, "T"] | None


@dataclass
class _Answer:
    request: int
    prompt_tokens: int
    stream: TextStream
    tokens: list[int]


class Generator:
    """Answers requests with a model, many at once.

    `submit` puts a request in the line, `poll` lets all answers grow by a step and gives what came of it, and
    `cancel` ends a request. `stream` and `answers` do so for all requests of a source.

    `submit` and `cancel` may be called from any thread, `poll` from one at a time. In a job of several processes all
    must submit the same requests in the same order, and poll and cancel at the same places between them; so there one
    thread does all of it.

    Args:
        model: the model, on the mesh; an abstract one from `jax.eval_shape` answers nothing before `use`.
        processor: of the model.
        config: sizes of the slots.
        mesh: the devices, or None for a single one.

    Raises:
        ConfigError: more ids end an answer than `config.max_stop_ids`, regions are to lie in host memory where they
            cannot, the tokenizer is of a kind whose text cannot be put together token by token or has more ids than
            the model's embedding has rows, or the processor lays pictures out for another model.
    """

    def __init__(self, model: Vlm, processor: Processor, config: SlotConfig, mesh: Mesh | None = None):
        TextStream(processor.tokenizer)  # refuses the tokenizer now rather than every request later
        wanted = model.options.layout
        check_vocabulary(processor.tokenizer, model.config.text.vocab_size, replaced=processor.rules.video_placeholder)
        require(processor.layout == wanted, "processor.layout", processor.layout, f"{wanted}, as the model wants it")
        # As many as there are slots, and a group that waits for the next free ones.
        self._most = config.slots + config.prefill_rows
        self._engine = Engine(
            model,
            config,
            (*model.config.eos_token_ids, processor.end_id),
            mesh=mesh,
        )
        self._prepare = functools.partial(_prepared, processor, config.max_length, self._engine.asking)
        self._streaming = False
        self._polling = threading.Lock()
        self._watchdog: Watchdog | None = None
        # What follows is read and written under this lock, which is never held while a program runs.
        self._changed = threading.Condition()
        self._given = 0
        self._line: dict[int, _Ready] = {}
        self._answers: dict[int, _Answer] = {}
        """By the engine's number."""
        self._cancelled: list[int] = []
        self._pieces: deque[Piece] = deque()

    def shapes(self) -> SlotState:
        """Shapes of what the slots keep on the devices."""
        return self._engine.shapes()

    def use(self, model: Vlm) -> None:
        """Answer with these weights from here on; no program is compiled again. No request may be pending.

        Raises:
            ValueError: the model is built otherwise than the one before.
        """
        self._check_idle()
        self._engine.use(model)

    def release(self) -> None:
        """Let go of weights and of the slots' memory until `use` gives weights. No request may be pending."""
        self._check_idle()
        self._engine.release()

    @property
    def usage(self) -> Usage:
        """How well the slots were used so far."""
        return self._engine.usage

    @property
    def pending(self) -> int:
        """Requests whose end was not given out yet."""
        with self._changed:
            ended = sum(piece.end is not None for piece in self._pieces)
            return len(self._line) + len(self._answers) + ended

    @property
    def room(self) -> int:
        """Requests that can be submitted and get a slot, or are in the next group that does. More may be submitted;
        they wait in memory."""
        return max(0, self._most - self.pending)

    def submit(self, request: Request) -> int:
        """Put a request in the line; returns its number, by which pieces and `cancel` know it.

        Its pictures are read here, on the caller's thread, while answers grow. A request that cannot be answered ends
        with its error at the next `poll`.

        Raises:
            RuntimeError: a stream of this generator is open.
        """
        self._check_no_stream()
        with self._changed:
            number = self._next_number()
        self._put(number, self._prepare(request, number))
        return number

    def poll(self, wait: float | None = 0.0) -> list[Piece]:
        """What came since the last call, after at most one step of all answers. Errors of requests come without a step.

        Ctrl-C raises KeyboardInterrupt when the step is done. Nothing is lost: the next `poll` gives what it made. A
        second Ctrl-C, like an error of the device, raises at once and ends all requests.

        Args:
            wait: most seconds to wait for a request while there is none; None is no limit. While there are requests
                nothing is waited for.

        Raises:
            RuntimeError: a stream of this generator is open, or another thread polls.
        """
        self._check_no_stream()
        return self._poll(wait)

    def cancel(self, request: int) -> None:
        """End a request, wherever it is; nothing more comes of it. One that has ended is left alone."""
        with self._changed:
            self._line.pop(request, None)
            gone = [number for number, answer in self._answers.items() if answer.request == request]
            for number in gone:
                del self._answers[number]
            self._cancelled += gone  # the engine may be at work on another thread
            self._pieces = deque(piece for piece in self._pieces if piece.request != request)
            self._rest_if_idle()

    def answers(
        self, requests: Iterable[Request], check: Callable[[], None] | None = None
    ) -> list[Completion | SampleError]:
        """The whole answer to each request in order, or what was wrong with it; arguments as in `stream`."""
        ends = {piece.request: piece.end for piece in self.stream(requests, check) if piece.end is not None}
        return [ends[n] for n in range(len(ends))]

    def stream(
        self, requests: Iterable[Request | SampleError], check: Callable[[], None] | None = None
    ) -> abc.Generator[Piece]:
        """Pieces of all answers as they come. A request that cannot be answered ends with its error; others go on.

        Requests are taken when there is room for them. A sequence is read directly. Any other iterable is read on
        a thread of its own, so a source that takes its time holds no answer; what it raises is raised here, and ends
        what runs. So does closing the iterator. In a job of several processes all must give the same requests.

        Args:
            requests: what is asked. A SampleError in place of a request, which could not be made, is its end.
            check: called before each step, at the same places on all processes; what it raises ends what runs.

        Raises:
            RuntimeError: another stream of this generator is open, or submitted requests have not ended; they would
                take each other's answers.
        """
        self._check_idle()
        self._streaming = True
        first = self._given
        source = intake(requests, self._prepare, self._most)
        try:
            while True:
                for ready in source.take(self.room, wait=not self.pending):
                    with self._changed:
                        number = self._next_number()
                    self._put(number, ready)
                if source.done and not self.pending:
                    return
                if check is not None:
                    check()
                for piece in self._poll(0.0):
                    yield piece._replace(request=piece.request - first)
                    if piece.end is not None:
                        source.release()
        finally:
            source.close()
            self._cancel_all()
            self._streaming = False

    def _check_no_stream(self) -> None:
        if self._streaming:
            raise RuntimeError("a stream of this generator is open: read it to its end or close it first")

    def _check_idle(self) -> None:
        self._check_no_stream()
        if self.pending:
            raise RuntimeError("submitted requests have not ended: poll until they have, or cancel them")

    def _next_number(self) -> int:
        self._given += 1
        return self._given - 1

    def _put(self, number: int, ready: _Ready | SampleError) -> None:
        with self._changed:
            if isinstance(ready, SampleError):
                self._pieces.append(Piece(number, "", ready))
            else:
                self._line[number] = ready
            self._changed.notify()

    def _poll(self, wait: float | None) -> list[Piece]:
        if not self._polling.acquire(blocking=False):
            raise RuntimeError("another thread polls this generator: one at a time")
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._line or self._answers or self._pieces, wait)
            with interrupts.held():
                self._advance()
            with self._changed:
                pieces = list(self._pieces)
                self._pieces.clear()
                self._rest_if_idle()
            return pieces
        finally:
            self._polling.release()

    def _advance(self) -> None:
        """Take what came, and let answers grow by a step, unless there are pieces to give out before."""
        with self._changed:
            self._admit()
            if not self._answers or self._pieces:
                return
            if self._watchdog is None:
                self._watchdog = self._new_watchdog().__enter__()
            watchdog = self._watchdog
        try:
            with watchdog.during("a program of generation", advice=HANG_ADVICE):
                step = self._engine.step()
            with self._changed:
                for progress in step:
                    answer = self._answers.get(progress.request)
                    if answer is not None:  # else it was cancelled meanwhile
                        self._pieces.append(piece := self._piece(progress, answer))
                        if piece.end is not None:
                            del self._answers[progress.request]
        except BaseException:
            self._cancel_all()
            raise

    def _admit(self) -> None:
        """What was cancelled leaves the engine, and what is in the line goes there."""
        self._engine.cancel(*self._cancelled)
        self._cancelled.clear()
        for request, (called, example, sampling, stream, blind, content) in self._line.items():
            try:
                number = self._engine.submit(example, sampling, called, blind, content)
            except SampleError as error:
                self._pieces.append(Piece(request, "", error))
            else:
                self._answers[number] = _Answer(request, len(example.tokens), stream, [])
        self._line.clear()

    def _cancel_all(self) -> None:
        with self._changed:
            self._engine.cancel(*self._answers, *self._cancelled)
            for kept in (self._line, self._answers, self._cancelled, self._pieces):
                kept.clear()
            self._rest_if_idle()

    def _new_watchdog(self) -> Watchdog:
        """Ends the process where a program on the device does not come back; it cannot be ended in any other way."""
        limit = self._engine.config.request_timeout
        return Watchdog(limit and limit + GRACE, setting="request_timeout and half an hour:")

    def _rest_if_idle(self) -> None:
        """Without requests there is nothing to watch."""
        if self._watchdog is not None and not self._answers and not self._line:
            self._watchdog.__exit__()
            self._watchdog = None

    def _piece(self, progress: Progress, answer: _Answer) -> Piece:
        parts, reason = [], progress.reason
        for taken, token in enumerate(progress.tokens, start=1):
            answer.tokens.append(token)
            parts.append(answer.stream.push(token))
            if answer.stream.stopped:
                self._engine.end(progress, taken)
                break
        if progress.error is not None and not answer.stream.stopped:
            return Piece(answer.request, "", progress.error)
        if reason is not None and not answer.stream.stopped:
            parts.append(answer.stream.finish())
        if answer.stream.stopped:
            reason = "stop"
        end = None
        if reason is not None:
            end = Completion(answer.stream.text, tuple(answer.tokens), reason, answer.prompt_tokens)
        return Piece(answer.request, "".join(parts), end)


def _prepared(
    processor: Processor, most_tokens: int, asked: Asking, request: Request | SampleError, place: int
) -> _Ready | SampleError:
    """A request as the slots take it, or what is wrong with it."""
    if isinstance(request, SampleError):
        return request
    called = request.name or f"request {place}"
    try:
        example = processor.encode(request.messages, add_generation_prompt=True, name=called, most_tokens=most_tokens)
        alone = content = None
        if asked.words:
            content = content_tokens(processor.tokenizer, example.tokens)
        if asked.blind:
            messages = tuple(map(without_pictures, request.messages))
            alone = processor.encode(messages, add_generation_prompt=True, name=called, most_tokens=most_tokens)
        stream = TextStream(processor.tokenizer, request.sampling.stop)
        return _Ready(called, example, request.sampling, stream, alone, content)
    except SampleError as error:
        return error
