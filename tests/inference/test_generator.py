"""Text from conversations: what ends it, what comes when, and what one request may do to another (nothing)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from rave_jax.attention import Rave
from rave_jax.config import ConfigError
from rave_jax.data.collate import BatchShape, collate
from rave_jax.data.processor import Processor
from rave_jax.data.sample import ImageError, OverBudget, SampleError
from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.families.shared.grids.video import VideoLimits
from rave_jax.inference import Completion, Generator, Request, Sampling, SlotConfig, generate
from rave_jax.layout import ContextTokens, VisualLayout
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import with_values
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.watchdog import Watchdog
from tests.data.conftest import TEMPLATE, TEXT_ALONE, byte_tokenizer, tiny_settings
from tests.data.pictures import noise
from tests.models.made import model

V = 270
LETTERS = 94
"""The first ids of the tokenizer are the characters from ! to ~, a byte and a letter each."""
NEW = 24
# One reach: few programs. Three slots of which none waits for another prompt, and two that are read together.
THREE = SlotConfig(slots=3, max_length=160, chunk=160, smallest=160, patches=64, decode_steps=4, max_stop_ids=4)
TWO = dataclasses.replace(THREE, slots=2, prefill_rows=2, decode_steps=1)
# The penalty keeps a random model from saying one letter again and again.
COLD = Sampling(NEW, repetition_penalty=2)
WARM = Sampling(NEW, temperature=1.5, seed=5)


def speaker(config: VlmConfig, mechanisms: tuple[Any, ...] = ()) -> Vlm:
    """A model whose most likely token is a letter at every step; warm, it says anything."""
    vlm = model(config, ModelOptions(mechanisms=mechanisms), seed=1)
    assert vlm.lm_head is not None
    letters = jnp.arange(V)[:, None] < LETTERS
    return with_values(vlm, {"lm_head.weight": jnp.where(letters, vlm.lm_head.weight[...], 0)})


@pytest.fixture(scope="module")
def processor() -> Processor:
    tokenizer = byte_tokenizer()
    return Processor(tokenizer, tiny_settings(tokenizer), TEMPLATE)


@pytest.fixture(scope="module")
def vlm(processor: Processor) -> Vlm:
    ids = {"image_token_id": processor.rules.image_token_id, "video_token_id": processor.rules.video_token_id}
    small = tiny(vocab_size=V, tie_embeddings=False, vision_depth=1, full_attention_blocks=())
    config = dataclasses.replace(small, **ids, eos_token_ids=(processor.end_id,))
    return speaker(config, (Rave(rank=2),))


@pytest.fixture(scope="module")
def three(vlm: Vlm, processor: Processor) -> Generator:
    return Generator(vlm, processor, THREE)


@pytest.fixture(scope="module")
def two(vlm: Vlm, processor: Processor) -> Generator:
    return Generator(vlm, processor, TWO)


def ask(question: str, sampling: Sampling = COLD, picture: Any = None, name: str = "") -> Request:
    shown = [] if picture is None else [{"type": "image", "image": picture}]
    return Request([{"role": "user", "content": [*shown, {"type": "text", "text": question}]}], sampling, name)


PICTURE = noise(24, 16)
GOOD = (
    ask("What?", picture=PICTURE),
    ask("Why?", dataclasses.replace(COLD, max_new_tokens=3)),
    ask("How many are there?", WARM, noise(16, 24, seed=1)),
    ask("Who?", dataclasses.replace(COLD, max_new_tokens=11)),
    ask("Where?", dataclasses.replace(WARM, max_new_tokens=17, seed=6)),
)


def changed(asked: int, **changes: Any) -> Sampling:
    return dataclasses.replace(GOOD[asked].sampling, **changes)


def whole(generator: Generator, requests: Sequence[Request]) -> list[Completion]:
    """The answers to requests that can be answered."""
    ends = generator.answers(requests)
    assert [type(end) for end in ends] == [Completion] * len(requests), ends
    return [end for end in ends if isinstance(end, Completion)]


@pytest.fixture(scope="module")
def alone(three: Generator) -> list[Completion]:
    """What each of GOOD is answered when nobody else asks."""
    return [answer for request in GOOD for answer in whole(three, [request])]


def idle(generator: Generator) -> bool:
    return generator._engine.running == generator._engine.waiting == 0


def test_a_completion_is_the_text_of_its_tokens(alone: list[Completion], processor: Processor) -> None:
    for request, answer in zip(GOOD, alone, strict=True):
        assert answer.text == processor.decode(answer.tokens)
        assert answer.prompt_tokens == len(processor.encode(request.messages, add_generation_prompt=True).tokens)
        assert answer.reason == ("stop" if len(answer.tokens) < request.sampling.max_new_tokens else "length")
    assert len(set(alone[0].text)) > 8 and alone[0].text.isascii(), "the greedy speaker says letters"
    assert any(not answer.text.isascii() for answer in alone), "a warm one says anything"


VIDEOS = {"short": (2, 2.0), "as long as wide": (4, 2.0), "long": (16, 2.0), "long and slow": (16, 0.25)}


def test_an_answer_about_a_video_is_what_training_would_learn(vlm: Vlm, processor: Processor) -> None:
    """Each greedy token is the argmax of one whole pass over the record that training makes of the same answer."""
    settings = dataclasses.replace(processor.rules, video=VideoLimits(min_pixels=64, max_pixels=1024))
    films = Processor(processor.tokenizer, settings, TEMPLATE)
    asked = []
    for frames, fps in VIDEOS.values():
        shown = [noise(8, 8 if frames > 8 else 16, seed=n) for n in range(frames)]
        parts = [{"type": "text", "text": "See"}, {"type": "video", "video": shown, "fps": fps}]
        asked.append([{"role": "user", "content": [*parts, {"type": "text", "text": "What moves?"}]}])
    answers = whole(Generator(vlm, films, THREE), [Request(messages, Sampling(NEW)) for messages in asked])
    logits_of = jax.jit(lambda batch: vlm.logits(vlm.forward(batch).hidden))
    for name, messages, answer in zip(VIDEOS, asked, answers, strict=True):
        record = films.encode([*messages, {"role": "assistant", "content": answer.text}])
        assert tuple(record.tokens[record.loss_mask > 0][: len(answer.tokens)]) == answer.tokens
        batch = collate([[record]], BatchShape(1, 160, 64), settings.patch_sizes)
        start = int(np.argmax(record.loss_mask > 0))
        found = np.asarray(logits_of(batch))[0, start - 1 : start - 1 + len(answer.tokens)]
        np.testing.assert_array_equal(np.argmax(found, -1), answer.tokens, err_msg=name)


def test_answers_come_in_the_order_of_the_requests_whoever_else_asks(
    three: Generator, two: Generator, alone: list[Completion]
) -> None:
    orders = [list(range(5)), [4, 3, 2, 1, 0], [2, 2, 0, 4, 1, 3, 2]]
    for generator, order in itertools.product((three, two), orders):
        assert whole(generator, [GOOD[n] for n in order]) == [alone[n] for n in order]


def test_another_seed_says_something_else_and_the_same_seed_the_same(three: Generator) -> None:
    seeds = [1, 2, 3, 1, 2, 3, 1]
    said = [a.tokens for a in whole(three, [ask("?", dataclasses.replace(WARM, seed=seed)) for seed in seeds])]
    assert len(set(said)) == 3
    assert all(tokens == said[seeds.index(seed)] for seed, tokens in zip(seeds, said, strict=True))


def test_one_token_is_an_answer(three: Generator, alone: list[Completion]) -> None:
    one, *_ = whole(three, [dataclasses.replace(GOOD[0], sampling=changed(0, max_new_tokens=1)), *GOOD[1:4]])
    assert (one.tokens, one.text, one.reason) == (alone[0].tokens[:1], alone[0].text[:1], "length")


def test_an_answer_ends_where_its_slot_does(three: Generator, alone: list[Completion]) -> None:
    [full] = whole(three, [dataclasses.replace(GOOD[0], sampling=changed(0, max_new_tokens=1000))])
    assert full.reason == "full" and full.text.startswith(alone[0].text)
    assert len(full.tokens) == THREE.max_length - full.prompt_tokens + 1


def test_stop_ids_end_an_answer_and_are_no_part_of_it(three: Generator, alone: list[Completion]) -> None:
    tokens = alone[0].tokens
    for place in (0, 3, 4, 5, NEW - 1):
        [answer] = whole(three, [dataclasses.replace(GOOD[0], sampling=changed(0, stop_ids=(tokens[place], 269)))])
        first = tokens.index(tokens[place])
        assert (answer.tokens, answer.text) == (tokens[:first], alone[0].text[:first])
        assert answer.reason == "stop" and idle(three)


@pytest.mark.parametrize(
    ("sizes", "asked"),
    [
        pytest.param("three", 0, id="three-letters", marks=pytest.mark.slow),
        pytest.param("three", 2, id="three-any bytes"),
        pytest.param("two", 0, id="two-letters"),
        pytest.param("two", 2, id="two-any bytes", marks=pytest.mark.slow),
    ],
)
def test_a_stop_string_ends_the_text_before_it_wherever_tokens_split_it(
    asked: int, sizes: str, alone: list[Completion], request: pytest.FixtureRequest
) -> None:
    """One token per byte, looked at after every fourth or every token: a string begins and ends at all of them."""
    free = alone[asked]
    spans = [(at, n) for n in (1, 2, 5) for at in range(len(free.text) - n + 1)]
    strings = [free.text[at : at + n] for at, n in spans]
    requests = [dataclasses.replace(GOOD[asked], sampling=changed(asked, stop=(string,))) for string in strings]
    for string, answer in zip(strings, whole(request.getfixturevalue(sizes), requests), strict=True):
        assert answer.text == free.text[: free.text.index(string)]
        assert answer.reason == "stop"
        assert answer.tokens == free.tokens[: len(answer.tokens)]
        if free.text.isascii():
            assert len(answer.tokens) == len(answer.text) + len(string)


def test_of_several_stop_strings_the_first_in_the_text_counts(three: Generator, alone: list[Completion]) -> None:
    text = alone[0].text
    stop = (text[14:16], text[7:12], text[8:9], "never said")
    [answer] = whole(three, [dataclasses.replace(GOOD[0], sampling=changed(0, stop=stop))])
    assert answer.text == text[: min(text.index(string) for string in stop[:3])]


def test_a_stop_string_frees_the_slot_at_once(three: Generator, alone: list[Completion]) -> None:
    long = changed(0, stop=(alone[0].text[4:7],), max_new_tokens=100)
    steps = three.usage.slot_steps
    for piece in three.stream([dataclasses.replace(GOOD[0], sampling=long)]):
        assert (piece.end is not None) == idle(three)
    # The first token came with the prompt; the seventh was in the second look at four.
    assert three.usage.slot_steps - steps == THREE.slots * 2 * THREE.decode_steps


@pytest.mark.parametrize("sizes", ["three", "two"])
def test_pieces_put_end_to_end_are_the_text(
    sizes: str, alone: list[Completion], request: pytest.FixtureRequest
) -> None:
    stopped = dataclasses.replace(GOOD[2], sampling=changed(2, stop=(alone[2].text[9:12],)))
    broken = ask("?", picture=b"none")
    texts: dict[int, str] = {}
    ends: dict[int, Completion | SampleError] = {}
    grew = 0
    generator: Generator = request.getfixturevalue(sizes)
    for piece in generator.stream([*GOOD, stopped, broken]):
        assert piece.request not in ends, "nothing follows the end"
        texts[piece.request] = texts.get(piece.request, "") + piece.text
        grew += bool(piece.text) and piece.request == 0
        if piece.end is not None:
            ends[piece.request] = piece.end
    assert sorted(ends) == list(range(7)) and isinstance(ends[6], ImageError)
    for number in range(6):
        end = ends[number]
        assert isinstance(end, Completion) and end.text == texts[number]
    assert [ends[n] for n in range(5)] == alone
    assert texts[5] == alone[2].text[: alone[2].text.index(alone[2].text[9:12])] and texts[6] == ""
    decode_steps = generator._engine.config.decode_steps
    assert grew >= NEW / decode_steps, "text comes while the answer grows"


BAD: tuple[tuple[Request, type[SampleError], str], ...] = (
    (ask("What?", picture=b"not a picture", name="broken"), ImageError, "^broken: "),
    (ask("word " * 40, name="long"), OverBudget, "^long: .*160"),
    (ask("What?", Sampling(stop_ids=(1, 2, 3, 4)), name="ends"), SampleError, "^ends: 5 ids end it"),
    (Request([{"role": "nobody", "content": "?"}], name="role"), SampleError, "^role: .*nobody"),
    (Request([{"role": "user", "content": "\ud800"}]), SampleError, "^request 4: .*not valid Unicode"),
)


def test_what_cannot_be_answered_ends_with_its_own_error_and_the_others_are_answered(
    three: Generator, alone: list[Completion]
) -> None:
    mixed = [bad for bad, _, _ in BAD] + [
        r for pair in zip(GOOD, (bad for bad, _, _ in BAD), strict=True) for r in pair
    ]
    ends = three.answers(mixed)
    assert ends[5::2] == alone
    for end, (_, kind, message) in zip(ends[:5], BAD, strict=True):
        assert type(end) is kind
        with pytest.raises(SampleError, match=message):
            raise end
    assert [type(end) for end in ends[6::2]] == [kind for _, kind, _ in BAD]
    assert three.answers([bad for bad, _, _ in BAD][:1] * 9 + [GOOD[0]])[9] == alone[0], "errors take no slot"
    assert three.answers([]) == []


def test_a_text_model_answers_text_and_refuses_pictures(processor: Processor) -> None:
    text = TextConfig(vocab_size=V, tie_embeddings=False)
    settings = TEXT_ALONE
    config = VlmConfig(text=text, vision=None, eos_token_ids=(), family="qwen3")
    generator = Generator(speaker(config), Processor(processor.tokenizer, settings, TEMPLATE), THREE)
    first, refused, last = generator.answers([ask("What?"), ask("What?", picture=PICTURE, name="seen"), ask("Why?")])
    assert isinstance(first, Completion) and isinstance(last, Completion)
    assert len(first.tokens) == len(last.tokens) == NEW and first.text != last.text
    assert type(refused) is SampleError and str(refused) == (
        "seen: the conversation has pictures, but the model is for text only"
    )


@pytest.mark.parametrize("sizes", ["three", "two"])
def test_requests_are_taken_when_there_is_room_and_no_sooner(
    sizes: str, alone: list[Completion], request: pytest.FixtureRequest
) -> None:
    generator: Generator = request.getfixturevalue(sizes)
    config = generator._engine.config
    taken, ended = 0, 0

    def source() -> Iterator[Request]:
        nonlocal taken
        for number in itertools.count():
            taken += 1
            yield GOOD[number % 5]

    stream = generator.stream(source())
    for piece in itertools.islice(stream, 150):
        # An answer that has just ended was in a slot when the next ones were taken.
        assert taken - ended <= config.slots + config.prefill_rows
        ended += piece.end is not None
    assert ended > 4
    stream.close()
    assert idle(generator)
    assert whole(generator, GOOD) == alone


@pytest.mark.parametrize("sizes", [THREE, TWO], ids=["three", "two"])
def test_slots_are_busy_while_requests_are_left(sizes: SlotConfig, vlm: Vlm, processor: Processor) -> None:
    generator = Generator(vlm, processor, sizes)
    whole(generator, [ask("?" * (1 + n % 5), Sampling(13)) for n in range(6 * sizes.slots)])
    assert generator.usage.occupancy > 0.95


def test_one_stream_at_a_time(three: Generator, alone: list[Completion]) -> None:
    first = three.stream([ask("one"), ask("two")])
    next(first)
    with pytest.raises(RuntimeError, match="a stream of this generator is open"):
        three.answers([ask("three")])
    first.close()
    assert idle(three) and len(whole(three, [ask("three")])) == 1


def test_a_tokenizer_whose_text_cannot_be_put_together_is_refused(vlm: Vlm, processor: Processor) -> None:
    class Other:
        backend_tokenizer = Tokenizer(models.WordPiece(unk_token="?"))

    Other.backend_tokenizer.decoder = decoders.WordPiece()
    other = Processor.__new__(Processor)
    other.rules, other.tokenizer = processor.rules, Other()
    with pytest.raises(ConfigError, match="WordPiece, expected ByteLevel"):
        Generator(vlm, other, SlotConfig())


def test_a_tokenizer_with_ids_that_the_embedding_has_no_rows_for_is_refused(vlm: Vlm, processor: Processor) -> None:
    text = dataclasses.replace(vlm.config.text, vocab_size=262)
    small = model(dataclasses.replace(vlm.config, text=text, image_token_id=261, video_token_id=260))
    with pytest.raises(ConfigError, match=r"embedding of 262 rows .* the token '<\|video_pad\|>' the id 262"):
        Generator(small, processor, SlotConfig())


def test_a_processor_that_lays_pictures_out_for_another_model_is_refused(vlm: Vlm, processor: Processor) -> None:
    other = Processor(processor.tokenizer, processor.rules, TEMPLATE, VisualLayout(context=ContextTokens(3)))
    with pytest.raises(ConfigError, match=r"processor\.layout is .*count=3.* as the model wants it"):
        Generator(vlm, other, SlotConfig())


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "user", "content": [{"type": "text"}]}], "the text of a text part is None"),
        (["hello"], "a message is str"),
        ([{"role": "user", "content": [{"type": "video", "video": 5}]}], "a video is int"),
        ([{"role": "user", "content": [{"type": "video", "video": [noise(8, 8)], "fps": 10**400}]}], "fps is 1"),
        ([{"role": "user", "content": [{"type": "video", "video": [noise(8, 8)], "fps": 1e-300}]}], "fps is 1e-300"),
    ],
)
def test_messages_of_the_wrong_kind_spoil_no_other_request(messages: Any, said: str, three: Generator) -> None:
    bad, good = three.answers([Request(messages, COLD, "odd"), ask("one")])
    assert isinstance(bad, SampleError) and str(bad).startswith("odd: ") and said in str(bad)
    assert isinstance(good, Completion)


def until_closed(stream: Any) -> None:
    stream.close()


def until_an_error(stream: Any) -> None:
    with pytest.raises(RuntimeError, match="no more"):
        list(stream)


@pytest.mark.parametrize("leave", [until_closed, until_an_error])
def test_a_stream_that_is_left_leaves_nobody_in_the_slots(
    leave: Callable[[Any], None], three: Generator, alone: list[Completion]
) -> None:
    def source() -> Iterator[Request]:
        yield from [dataclasses.replace(GOOD[0], sampling=changed(0, max_new_tokens=100))] * 7
        raise RuntimeError("no more")

    stream = three.stream(source())
    for _ in range(5):
        assert next(stream).end is None
    assert not idle(three)
    leave(stream)
    assert idle(three)
    assert whole(three, GOOD) == alone


def test_a_program_that_does_not_come_back_ends_the_process(
    vlm: Vlm, processor: Processor, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The bound is that of a request and a time in which the program may be compiled; a reader may take its time."""
    ended: list[int] = []
    monkeypatch.setattr(generate, "GRACE", 0.1)
    monkeypatch.setattr(generate, "Watchdog", functools.partial(Watchdog, poll=0.02))
    monkeypatch.setattr(os, "_exit", ended.append)
    generator = Generator(vlm, processor, dataclasses.replace(THREE, request_timeout=0.2))

    def hangs(*_: object) -> Any:
        time.sleep(0.6)
        raise KeyError("awake")

    with pytest.raises(KeyError, match="awake"):
        generator.answers(map(hangs, "?"))
    assert not ended
    monkeypatch.setattr(generator._engine, "step", hangs)
    with pytest.raises(KeyError, match="awake"):
        generator.answers([GOOD[0]])
    assert set(ended) == {Watchdog.EXIT_CODE} and idle(generator)
    assert "s for a program of generation, so the watchdog ends the job (request_timeout" in capfd.readouterr().err
