"""Requests while answers run: submitted, polled for and cancelled, or read from a source that takes its time."""

from __future__ import annotations

import dataclasses
import itertools
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from rave_jax.data.processor import Processor
from rave_jax.data.sample import ImageError, SampleError
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.inference import Completion, Generator, Piece, Request
from rave_jax.inference.intake import intake
from rave_jax.parallel import agree
from tests.data.conftest import TEMPLATE, byte_tokenizer, tiny_settings
from tests.inference.test_generator import GOOD, THREE, V, ask, changed, idle, speaker, whole

LONG = dataclasses.replace(GOOD[0], sampling=changed(0, max_new_tokens=100))
BROKEN = ask("?", picture=b"none", name="broken")


@pytest.fixture(scope="module")
def processor() -> Processor:
    tokenizer = byte_tokenizer()
    return Processor(tokenizer, tiny_settings(tokenizer), TEMPLATE)


@pytest.fixture(scope="module")
def generator(processor: Processor) -> Generator:
    ids = {"image_token_id": processor.rules.image_token_id, "video_token_id": processor.rules.video_token_id}
    config = dataclasses.replace(tiny(vocab_size=V, tie_embeddings=False), **ids, eos_token_ids=(processor.end_id,))
    return Generator(speaker(config), processor, THREE)


@pytest.fixture(scope="module")
def alone(generator: Generator) -> list[Completion]:
    """What each of GOOD is answered when nobody else asks."""
    return [answer for request in GOOD for answer in whole(generator, [request])]


def test_a_source_that_blocks_holds_no_answer(generator: Generator, alone: list[Completion]) -> None:
    """The second request comes when the first is answered; a source that held the answers would wait for ever."""
    answered = threading.Event()

    def source() -> Iterator[Request]:
        yield GOOD[0]
        assert answered.wait(60), "the first answer waits for the second request"
        yield GOOD[1]

    ends = {}
    for piece in generator.stream(source()):
        if piece.end is not None:
            ends[piece.request] = piece.end
            answered.set()
    assert ends == {0: alone[0], 1: alone[1]}


def ends_of(pieces: list[Piece]) -> dict[int, Completion | SampleError]:
    return {piece.request: piece.end for piece in pieces if piece.end is not None}


def drained(generator: Generator) -> list[Piece]:
    """Everything that becomes known until nothing is pending."""
    pieces: list[Piece] = []
    while generator.pending:
        pieces += generator.poll()
    return pieces


def test_what_is_submitted_is_answered_as_in_a_stream(generator: Generator, alone: list[Completion]) -> None:
    assert generator.poll() == [] and generator.room == THREE.slots + THREE.prefill_rows
    numbers = [generator.submit(request) for request in (*GOOD, BROKEN)]
    assert generator.pending == 6 and generator.room == 0
    pieces = drained(generator)
    ends = ends_of(pieces)
    assert [ends[number] for number in numbers[:5]] == alone
    assert isinstance(ends[numbers[5]], ImageError) and str(ends[numbers[5]]).startswith("broken: ")
    for number, answer in zip(numbers, alone, strict=False):
        assert "".join(piece.text for piece in pieces if piece.request == number) == answer.text
    assert idle(generator) and generator.poll() == []


def test_what_is_cancelled_says_nothing_more_and_the_others_go_on(
    generator: Generator, alone: list[Completion]
) -> None:
    grows, *kept = (generator.submit(request) for request in (LONG, *GOOD))
    assert grows in {piece.request for piece in generator.poll()}
    waits = generator.submit(GOOD[0])
    refused = generator.submit(BROKEN)
    for number in (grows, waits, refused):
        generator.cancel(number)
    ends = ends_of(drained(generator))
    assert [ends.get(number) for number in (grows, *kept, waits, refused)] == [None, *alone, None, None]
    generator.cancel(kept[0])  # long gone
    assert idle(generator)


def test_other_threads_submit_while_answers_grow_and_wake_who_waits(
    generator: Generator, alone: list[Completion]
) -> None:
    """A server: a thread for each client, and one that polls."""
    got: dict[int, int] = {}

    def client(asked: int) -> None:
        time.sleep(0.02 * asked)
        got[asked] = generator.submit(GOOD[asked])

    clients = [threading.Thread(target=client, args=(asked,)) for asked in range(5)]
    for thread in clients:
        thread.start()
    pieces: list[Piece] = []
    while len(ends_of(pieces)) < 5:
        found = generator.poll(wait=60)
        assert found or generator.pending, "waited for nothing"
        pieces += found
    ends = ends_of(pieces)
    assert [ends[got[asked]] for asked in range(5)] == alone
    start = time.monotonic()
    assert generator.poll(wait=0.05) == [] and time.monotonic() - start >= 0.05


def test_streams_and_submitted_requests_do_not_mix(generator: Generator) -> None:
    number = generator.submit(GOOD[1])
    with pytest.raises(RuntimeError, match="poll until they have, or cancel them"):
        generator.answers([GOOD[0]])
    generator.cancel(number)
    stream = generator.stream([GOOD[0]])
    next(stream)
    for call in (lambda: generator.submit(GOOD[1]), generator.poll):
        with pytest.raises(RuntimeError, match="a stream of this generator is open"):
            call()
    stream.close()
    assert idle(generator) and generator.poll() == []


def test_one_thread_polls_at_a_time(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    step = generator._engine.step

    def meanwhile() -> Any:
        with pytest.raises(RuntimeError) as error:
            generator.poll()
        said.append(str(error.value))
        return step()

    monkeypatch.setattr(generator._engine, "step", meanwhile)
    generator.submit(GOOD[1])
    drained(generator)
    assert set(said) == {"another thread polls this generator: one at a time"}


def test_a_request_that_could_not_be_made_ends_with_its_error_in_its_place(
    generator: Generator, alone: list[Completion]
) -> None:
    wrong = SampleError("line 2: not JSON")
    for source in (list, iter):
        ends = ends_of(list(generator.stream(source([GOOD[0], wrong, GOOD[1]]))))
        assert ends == {0: alone[0], 1: wrong, 2: alone[1]}


def requests_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "requests"]


@pytest.mark.parametrize("blocks", [False, True], ids=["waits for room", "waits for the source"])
def test_the_thread_of_a_stream_ends_with_it(blocks: bool, generator: Generator) -> None:
    """One that waits inside of the source ends when that comes back."""
    back, read = threading.Event(), []

    def source() -> Iterator[Request]:
        for number in itertools.count():
            if blocks and number:
                back.wait(60)
            read.append(number)
            yield LONG

    stream = generator.stream(source())
    for _ in range(4):
        assert next(stream).end is None
    (thread,) = requests_threads()
    stream.close()
    assert idle(generator) and generator.pending == 0
    thread.join(0.1)
    assert thread.is_alive() == blocks
    back.set()
    thread.join(60)
    assert not requests_threads() and len(read) == (2 if blocks else THREE.slots + THREE.prefill_rows)


@pytest.fixture
def handled() -> Iterator[None]:
    """Python's own handler of Ctrl-C: workers of a test run ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting(generator: Generator, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Ctrl-C so many times within the second step from here on, before its program runs."""
    step, steps = generator._engine._step, itertools.count()

    def interrupted() -> Any:
        if next(steps) == 1:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(generator._engine, "_step", interrupted)


@pytest.mark.usefixtures("handled")
def test_an_interrupt_waits_for_the_step_and_loses_nothing(
    generator: Generator, alone: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupting(generator, monkeypatch, times=1)
    number = generator.submit(GOOD[0])
    pieces = generator.poll()
    with pytest.raises(KeyboardInterrupt):
        generator.poll()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    pieces += drained(generator)
    assert ends_of(pieces) == {number: alone[0]} and "".join(piece.text for piece in pieces) == alone[0].text


@pytest.mark.usefixtures("handled")
@pytest.mark.parametrize("leave", ["twice", "an error of the device"])
def test_a_step_that_breaks_ends_all_requests_and_the_next_ones_are_answered(
    leave: str, generator: Generator, alone: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    if leave == "twice":
        interrupting(generator, monkeypatch, times=2)
    else:
        run = generator._engine._run

        def breaks(name: str, *given: Any, **sizes: Any) -> Any:
            found = run(name, *given, **sizes)  # has consumed the cache
            if name == "decode":
                jax.tree.map(lambda x: x.delete(), generator._engine._state)
                raise KeyboardInterrupt
            return found

        monkeypatch.setattr(generator._engine, "_run", breaks)
    for request in (*GOOD, BROKEN):
        generator.submit(request)
    with pytest.raises(KeyboardInterrupt):
        drained(generator)
    assert idle(generator) and generator.pending == 0
    monkeypatch.undo()
    assert whole(generator, GOOD) == alone


def test_tokens_behind_a_stop_string_are_no_use_of_a_slot(generator: Generator, alone: list[Completion]) -> None:
    """Decoding looks at every fourth token: where the string ends between two looks, the rest was in vain."""
    for end in range(3, 12):
        before = generator.usage.used
        stop = changed(0, stop=(alone[0].text[end - 2 : end],), max_new_tokens=100)
        (answer,) = whole(generator, [dataclasses.replace(GOOD[0], sampling=stop)])
        # The first token comes with the prompt and takes no step.
        assert generator.usage.used - before == len(answer.tokens) - 1


def test_a_follower_takes_as_many_as_the_first_process_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes must call the engine alike, however quickly each reads."""
    told = iter([1, 0, 2, 1])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(agree, "from_first", lambda mine: next(told))
    reader = intake(iter("abc"), lambda given, place: f"{given}{place}", most=4)
    taken = []
    while not reader.done:
        taken.append(reader.take(room=4, wait=False))
    assert taken == [["a0"], [], ["b1", "c2"], []]
    assert next(told, None) is None, "without room, or at the end, nothing is asked"


def test_the_first_process_says_how_many_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    monkeypatch.setattr(agree, "from_first", lambda mine: said.append(mine) or mine)
    reader = intake(iter("abc"), lambda given, place: given, most=2)
    first = reader.take(room=2, wait=True)
    while len(first) < 2:
        first += reader.take(room=2, wait=True)
    assert first == ["a", "b"] and reader.take(room=0, wait=True) == []
    reader.release()
    assert reader.take(room=1, wait=True) == ["c"]
    assert sum(said) == 3
    reader.close()
