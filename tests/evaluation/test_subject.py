"""A model as the subject: prompts, answers and looks through the real processor."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.attention import Gaze, Gift, Mma, Rave, Steer, Vhr, ZeroTuning
from rave_jax.batch import Batch, Kind, Role, TokenInfo
from rave_jax.data.collate import BatchShape, collate
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Sample, SampleError, without_pictures
from rave_jax.evaluation.again import AskedAgain
from rave_jax.evaluation.answered import QUESTION_ROWS, prompt_numbers, question_rows, with_answer
from rave_jax.evaluation.spans import answer_spans
from rave_jax.evaluation.subject import Answer, ModelSubject, PromptOverBudget
from rave_jax.evaluation.task import Task
from rave_jax.evaluation.vas import with_vas
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.families.shared.grids.video import VideoLimits
from rave_jax.inference import Completion, Generator, Request, Sampling
from rave_jax.inference.content import content_tokens
from rave_jax.inference.prompted import with_numbers
from rave_jax.inference.slots import compilations
from rave_jax.layout import WHOLE, FixedRegions, Shown
from rave_jax.look.carve import Carve
from rave_jax.look.funnel import VisualFunnel
from rave_jax.look.knockout import with_hidden
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import Want
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.typing import Array
from tests.data.conftest import TEMPLATE, byte_tokenizer, tiny_settings
from tests.data.pictures import noise
from tests.models.made import model

NEW = 4
SHAPE = BatchShape(rows=2, tokens=96, patches=64)

SMALL = tiny(vocab_size=270, num_layers=2, tie_embeddings=False, vision_depth=1, full_attention_blocks=())


@pytest.fixture(scope="module")
def processor() -> Processor:
    tokenizer = byte_tokenizer()
    video = VideoLimits(min_pixels=64, max_pixels=1024)
    return Processor(tokenizer, dataclasses.replace(tiny_settings(tokenizer), video=video), TEMPLATE)


@pytest.fixture(scope="module")
def vlm(processor: Processor) -> Vlm:
    ids = {"image_token_id": processor.rules.image_token_id, "video_token_id": processor.rules.video_token_id}
    config = dataclasses.replace(SMALL, **ids)
    return model(config, ModelOptions(mechanisms=(Rave(rank=2),)), seed=1)


def ask(question: str, size: tuple[int, int] | None, seed: int = 0) -> Sample:
    picture = [] if size is None else [{"type": "image", "image": noise(*size, seed=seed)}]
    content = [*picture, {"type": "text", "text": question}]
    return Sample(
        id=question,
        messages=({"role": "user", "content": content}, {"role": "assistant", "content": "yes"}),
        answers=("yes",),
    )


OTHERS = (
    Gaze(FixedRegions(2, 2), max_regions=8, top_k=1, layers=(0,)),
    Steer(image=1.5, layers=(1,)),
    ZeroTuning(gamma=2.0, layers=(1,)),
)
"""Regions that are chosen, a function of the score, and a term of each key."""
SAMPLES = (ask("What?", (24, 16)), ask("No picture", None), ask("How many are there?", (16, 32), 1))


def on(devices: int, vlm: Vlm, processor: Processor) -> ModelSubject:
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    return ModelSubject(vlm, processor, mesh, SHAPE, NEW)


@pytest.fixture(scope="module")
def subject(vlm: Vlm, processor: Processor) -> ModelSubject:
    return on(1, vlm, processor)


def test_answers_are_what_generation_gives(subject: ModelSubject, vlm: Vlm, processor: Processor) -> None:
    answers = subject.answer(SAMPLES)
    alone = Generator(vlm, processor, subject._generator._engine.config)
    for sample, answer in zip(SAMPLES, answers, strict=True):
        (made,) = alone.answers([Request(sample.prompt, Sampling(NEW))])
        assert isinstance(made, Completion)
        assert answer == Answer(made.text.strip(), made.tokens)


@pytest.mark.slow
def test_answers_and_looks_do_not_depend_on_the_mesh(subject: ModelSubject, vlm: Vlm, processor: Processor) -> None:
    one, two = subject, on(2, vlm, processor)
    answers = [a for a in one.answer(SAMPLES) if isinstance(a, Answer)]
    assert two.answer(SAMPLES) == answers
    for a, b in zip(one.look(SAMPLES, answers), two.look(SAMPLES, answers), strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            np.testing.assert_allclose(a.weights, b.weights, atol=1e-5)
    read, other = (who.per_sample(answer_spans, SAMPLES, answers) for who in (one, two))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), read, other)


def test_a_prompt_over_budget_is_an_answer_of_its_own(subject: ModelSubject, processor: Processor) -> None:
    long = ask("word " * 40, (24, 16))
    broken = dataclasses.replace(
        SAMPLES[0], messages=({"role": "user", "content": [{"type": "image", "image": b"no"}]},)
    )
    results = subject.answer([long, SAMPLES[0], broken])
    assert [type(result).__name__ for result in results] == ["PromptOverBudget", "Answer", "ImageError"]
    assert "word" in str(results[0]) and "over the budget of tokens 96" in str(results[0])
    needs = processor.encode(long.prompt, add_generation_prompt=True)
    assert isinstance(results[0], PromptOverBudget)
    assert (results[0].tokens, results[0].patches) == (len(needs.tokens), needs.patches.length)


def test_a_long_prompt_is_read_whole_where_tokens_see_later_ones(vlm: Vlm, processor: Processor) -> None:
    ahead = model(vlm.config, ModelOptions(mechanisms=(Mma(),)), seed=1)
    subject = ModelSubject(ahead, processor, make_mesh(MeshConfig(), jax.devices()[:1]), BatchShape(1, 640, 64), 1)
    long = ask("word " * 110, (24, 16))
    assert 512 < len(processor.encode(long.prompt, add_generation_prompt=True).tokens) < 640
    assert [type(result).__name__ for result in subject.answer([long])] == ["Answer"]


def test_a_prompt_with_its_answer_is_the_conversation(processor: Processor) -> None:
    sample = SAMPLES[0]
    whole = processor.encode(sample.messages)
    prompt = processor.encode(sample.prompt, add_generation_prompt=True)
    start = len(prompt.tokens)
    answer = [int(t) for t in whole.tokens[start : start + 4]]
    assert processor.decode(answer) == "yes" and answer[-1] == processor.end_id
    made = with_answer(prompt, answer)
    for name in ("tokens", "visual_index"):
        np.testing.assert_array_equal(getattr(made, name), getattr(whole, name)[: start + 4])
    np.testing.assert_array_equal(made.positions, whole.positions[:, : start + 4])
    for name, code in made.info._asdict().items():
        np.testing.assert_array_equal(code, getattr(whole.info, name)[: start + 4], err_msg=name)


def test_a_look_is_the_mean_row_of_the_choosing_queries_and_of_the_question(
    subject: ModelSubject, vlm: Vlm, processor: Processor
) -> None:
    sample, answer = SAMPLES[2], Answer("abc", (70, 71, 72))
    looks = subject.look([sample, SAMPLES[1]], [answer, Answer("", ())])
    assert looks[1] is None, "no picture, no look"
    prompt = processor.encode(sample.prompt, add_generation_prompt=True)
    example = with_answer(prompt, answer.tokens)
    batch = collate([[example]], BatchShape(1, len(example.tokens), 64), processor.rules.patch_sizes)
    last = len(prompt.tokens) - 1
    visual = np.flatnonzero(example.info.image == 1)
    # The text behind the picture up to the end of the user's message.
    asking = np.flatnonzero((example.info.role == Role.QUESTION) & (np.arange(len(example.tokens)) > visual[-1]))
    assert 10 < len(asking) <= QUESTION_ROWS
    rows = np.array([[last, last + 1, last + 2, *asking]], np.int32)
    weights = jax.jit(lambda m, b: m.forward(b, Want(queries=rows)).attention)(vlm, batch)
    expected = np.asarray(weights)[:, 0, :3].mean(1)
    assert looks[0] is not None and looks[0].weights.shape[-2:] == (2, 4)
    np.testing.assert_allclose(looks[0].weights.reshape(*expected.shape[:2], -1), expected[..., visual], atol=1e-6)
    assert 0 < looks[0].on_picture < 1
    of_question = np.asarray(weights)[:, 0, 3:].mean(1)[..., visual].reshape(looks[0].weights.shape)
    assert looks[0].question is not None
    np.testing.assert_allclose(looks[0].question, of_question, atol=1e-6)


def test_the_question_is_the_text_of_the_last_turn_behind_the_picture() -> None:
    told = "sVVqqrrqVVqqqrh"  # system, pictures, text of two turns, answers, header
    roles = {"s": Role.SYSTEM, "r": Role.RESPONSE, "h": Role.RESPONSE}
    codes = {name: np.zeros(len(told), np.int32) for name in TokenInfo._fields}
    codes["kind"][:] = [Kind.VISUAL if letter == "V" else Kind.TEXT for letter in told]
    codes["role"][:] = [roles.get(letter, Role.QUESTION) for letter in told]
    codes["turn"][:], codes["image"][[1, 2]], codes["image"][[8, 9]] = [0] + [1] * 6 + [2] * 8, 1, 2
    info = TokenInfo(**codes)
    assert question_rows(info, (), 1).tolist() == [7, 10, 11, 12]
    assert question_rows(info, (Shown(1, WHOLE), Shown(2, WHOLE)), 2).tolist() == [10, 11, 12]
    assert question_rows(info, (Shown(1, WHOLE), Shown(1, None)), 1).tolist() == [10, 11, 12], (
        "two grids of one picture"
    )
    assert question_rows(info, (), 3).tolist() == [], "no such picture"
    long = TokenInfo(*(np.concatenate([code[:13], np.repeat(code[12:13], 90)]) for code in info))
    assert question_rows(long, (), 2).tolist() == list(range(103 - QUESTION_ROWS, 103))


def test_a_knock_out_hides_a_part_of_the_picture_from_all_text(
    subject: ModelSubject, vlm: Vlm, processor: Processor
) -> None:
    """Against one pass for each part, whose hidden tokens are found by row and column, and logits of which are summed
    here; and in the first layer, where nothing has changed yet, against the attention without what is hidden."""
    sample, answer = SAMPLES[2], Answer("abc", (70, 71, 72))
    found, without = subject.knock_out([sample, SAMPLES[1]], [answer, Answer("", ())], most=64)
    assert without is None, "no picture, no knock-out"
    assert found is not None and found.falls.shape == (2, 4)

    prompt = processor.encode(sample.prompt, add_generation_prompt=True)
    example = with_answer(prompt, answer.tokens)
    length, info = len(example.tokens), example.info
    batch = collate([[example]], BatchShape(1, length, 64), processor.rules.patch_sizes)
    every = np.arange(length, dtype=np.int32)[None]

    def read(model: Vlm, batch: Batch, hidden: Array) -> tuple[Array, Array, Array]:
        out = with_hidden(model, hidden).forward(batch, Want(queries=every))
        assert out.attention is not None
        return model.logits(out.hidden), out.attention, model.logits(model.forward(batch).hidden)

    run, visual, text = jax.jit(read), info.kind == Kind.VISUAL, info.kind == Kind.TEXT

    def log_probability(logits: Array) -> float:
        rows = np.float64(logits)[0, len(prompt.tokens) - 1 : length - 1]
        each = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
        return float(each[np.arange(3), list(answer.tokens)].sum())

    seen, open_map, plain = run(vlm, batch, np.zeros((1, length), bool))
    np.testing.assert_allclose(seen, plain, atol=1e-5)
    assert found.log_probability == pytest.approx(log_probability(plain), abs=1e-4)
    for row in range(2):
        for col in range(4):
            hidden = visual & (info.row == row) & (info.col == col)
            logits, hidden_map, _ = run(vlm, batch, hidden[None])
            assert found.falls[row, col] == pytest.approx(log_probability(seen) - log_probability(logits), abs=1e-4)
            assert np.all(np.asarray(hidden_map)[:, 0, text][..., hidden] == 0)
    left = np.where(hidden, 0, np.asarray(open_map)[0, 0])
    expected = np.where(text[:, None, None], left / left.sum(-1, keepdims=True), np.asarray(open_map)[0, 0])
    np.testing.assert_allclose(np.asarray(hidden_map)[0, 0], expected, atol=1e-6)
    assert np.abs(found.falls).min() > 1e-6 and found.whole != pytest.approx(found.falls.sum(), abs=1e-6)


@pytest.mark.parametrize("others", [(), pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["rave", "others"])
def test_without_the_whole_picture_it_does_not_matter_what_it_shows(
    others: tuple[Any, ...], subject: ModelSubject, vlm: Vlm, processor: Processor
) -> None:
    if others:
        changed = model(vlm.config, ModelOptions(mechanisms=others, scan_layers=False), seed=1)
        made = Processor(processor.tokenizer, processor.rules, TEMPLATE, changed.options.layout)
        subject = on(1, changed, made)
    answer = Answer("abc", (70, 71, 72))
    samples = [ask("How many are there?", (16, 32), seed) for seed in (1, 2)]
    one, other = subject.knock_out(samples, [answer, answer], most=1)
    assert one is not None and other is not None
    assert abs(one.log_probability - other.log_probability) > 1e-4
    for found in (one, other):
        assert found.falls.tolist() == [[found.whole]], "one part is the whole"
    assert one.log_probability - one.whole == pytest.approx(other.log_probability - other.whole, abs=1e-5)


@pytest.fixture(scope="module")
def ratios(vlm: Vlm, processor: Processor) -> list[float]:
    """Of every prompt alone, from the whole map."""
    ratios: list[float] = []
    every = np.arange(SHAPE.tokens, dtype=np.int32)[None]
    run = jax.jit(lambda m, b: m.forward(b, Want(queries=every)).attention)
    for sample in SAMPLES:
        example = processor.encode(sample.prompt, add_generation_prompt=True)
        info, length = example.info, len(example.tokens)
        batch = collate([[example]], SHAPE._replace(rows=1), processor.rules.patch_sizes)
        whole = np.float64(run(vlm, batch))[:, 0, :length, :, :length]  # [L,T,H,S]
        picture = whole[..., info.kind == Kind.VISUAL].sum(-1)
        prompt = whole[..., (info.kind == Kind.TEXT) & (info.role == Role.SYSTEM)].sum(-1)
        asks = ((info.kind == Kind.TEXT) & (info.role == Role.QUESTION))[:, None] & (picture > 0) & (prompt > 0)
        ratios += (picture[asks] / prompt[asks]).tolist()
    assert len(ratios) > 50
    return ratios


@pytest.mark.parametrize("devices", (1, pytest.param(2, marks=pytest.mark.slow)))
def test_vas_is_that_of_every_prompt_alone_written_out_densely(
    devices: int, subject: ModelSubject, vlm: Vlm, processor: Processor, ratios: list[float]
) -> None:
    """Three prompts in batches of two: one without a picture, and all with the system prompt of the template."""
    asked = subject if devices == 1 else on(devices, vlm, processor)
    sums = asked.vas(SAMPLES)
    assert sums.ratios == len(ratios)
    np.testing.assert_allclose(sums.total, np.sum(ratios), rtol=1e-4)
    assert asked.vas(SAMPLES[1:2]) == (0, 0), "without a picture there is nothing to read"


def test_glances_are_the_rows_behind_a_look(subject: ModelSubject) -> None:
    """One more than the answer has tokens where there is room, averaged over heads, of the layers asked for."""
    answers = [Answer("", (70, 71, 72)), Answer("", ()), Answer("", (70, 71, 72, 73))]
    looks = subject.look(SAMPLES, answers)
    found = subject.glances(SAMPLES, answers, (1,))
    assert found[1] is None, "no picture"
    for look, glances, answer in zip(looks, found, answers, strict=True):
        if look is not None:
            assert isinstance(glances, np.ndarray) and glances.shape[:2] == (1, 4)
            mean = glances[0, : len(answer.tokens)].mean(0)
            np.testing.assert_allclose(mean, look.weights[1].mean(0), atol=1e-6)
    long = ask("word " * 40, (24, 16))
    assert isinstance(subject.glances([long], answers[:1], (0,))[0], PromptOverBudget)


@pytest.mark.slow
def test_looks_have_the_numbers_that_generation_finds_for_each_prompt(vlm: Vlm, processor: Processor) -> None:
    mechanisms = (Vhr(choose="prompt", layers=(0,)), Gift(saliency_layer=0, layers=(1,)))
    prompted = model(vlm.config, ModelOptions(mechanisms=mechanisms), seed=1)
    subject = on(1, prompted, processor)
    answers = [Answer("", (70, 71, 72))] * 3
    looks, sums = subject.look(SAMPLES, answers), subject.vas(SAMPLES)
    assert sums.ratios > 0 and all(isinstance(one, Answer) for one in subject.answer(SAMPLES))
    sample = SAMPLES[2]
    seen, blind = (
        processor.encode(messages, add_generation_prompt=True)
        for messages in (sample.prompt, tuple(map(without_pictures, sample.prompt)))
    )
    whole = with_answer(seen, (70, 71, 72))
    rows = [
        collate([[one]], BatchShape(1, 100, 64 * shown), processor.rules.patch_sizes)
        for one, shown in ((whole, 1), (seen, 1), (blind, 0))
    ]
    queries = np.array([len(seen.tokens) - 1 + np.arange(3)], np.int32)
    words = np.zeros((1, 100), bool)
    words[0, : len(seen.tokens)] = content_tokens(processor.tokenizer, seen.tokens)

    @jax.jit
    def expected(m: Vlm, whole: Batch, seen: Batch, blind: Batch) -> jax.Array | None:
        return (
            with_numbers(m, prompt_numbers(m, seen, blind, words, 100)).forward(whole, Want(queries=queries)).attention
        )

    found = np.asarray(expected(prompted, *rows))[:, 0].mean(1)[..., np.flatnonzero(whole.info.image == 1)]
    assert looks[2] is not None
    np.testing.assert_allclose(looks[2].weights.reshape(found.shape), found, atol=1e-5)


def test_crops_are_asked_beside_the_picture(subject: ModelSubject) -> None:
    """Of the sample with a picture, as a conversation with two. The usual localisation prompt is over this budget."""
    how = VisualFunnel(layer=1, base=8.0, views=("focal", "whole"), where="{question}")
    assert isinstance(AskedAgain(subject, VisualFunnel(layer=1), Task()).answer(SAMPLES[:1])[0], PromptOverBudget)
    plain, text = subject.answer(SAMPLES[:2])
    asked = AskedAgain(subject, how, Task()).answer(SAMPLES[:2])
    assert [type(answer) for answer in asked] == [Answer, Answer]
    assert asked[1] == text and asked[0] != plain
    none = AskedAgain(subject, dataclasses.replace(how, views=("whole",)), Task()).answer(SAMPLES[:2])
    assert none == [plain, text]
    carved = AskedAgain(subject, Carve(general="?", layers=(1,), fraction=0.9), Task()).answer(SAMPLES[:2])
    assert isinstance(carved[0], Answer) and carved[0] != plain and carved[1] == text


def test_a_reading_gets_prompts_with_their_answers(subject: ModelSubject, processor: Processor) -> None:
    """In batches of two, of which the last has a row without a sample."""
    said = [(70, 71, 72), (), (73,)]
    answers = [Answer("", tokens) for tokens in said]
    found = subject.per_sample(tokens_and_answer, SAMPLES, answers)
    assert len(found) == len(SAMPLES)
    for sample, mine, (tokens, answer) in zip(SAMPLES, said, found, strict=True):
        prompt = processor.encode(sample.prompt, add_generation_prompt=True).tokens
        np.testing.assert_array_equal(tokens[: len(prompt) + len(mine)], [*prompt, *mine])
        np.testing.assert_array_equal(np.flatnonzero(answer), len(prompt) + np.arange(len(mine)))


def tokens_and_answer(model: Vlm, batch: Batch, answer: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(batch.tokens), answer


def test_a_video_is_asked_but_not_looked_at(subject: ModelSubject) -> None:
    frames = [noise(16, 16, seed=i) for i in range(2)]
    content = [{"type": "video", "video": frames, "fps": 2.0}, {"type": "text", "text": "What moves?"}]
    sample = Sample(id="video", messages=({"role": "user", "content": content},), answers=("all",))
    (answer,) = subject.answer([sample])
    assert isinstance(answer, Answer)
    assert subject.look([sample], [answer]) == [None]


def test_prompts_of_any_size_are_few_programs(subject: ModelSubject) -> None:
    usage, before = subject._generator.usage, compilations()
    known = set(usage.programs)
    sizes = [(8 * (1 + i % 5), 8 * (1 + i % 3)) for i in range(10)]
    answers = subject.answer([ask("?" * (1 + i), size, i) for i, size in enumerate(sizes)])
    assert all(isinstance(answer, Answer) for answer in answers)
    # The tower has a size for every window or two; prompts and answers have one each.
    assert compilations() - before <= len(usage.programs - known)
    reaches = {size if name == "decode" else size[0] for name, size in usage.programs if name != "encode_images"}
    assert len(reaches) == 1


def test_no_patches_are_no_pictures(vlm: Vlm, processor: Processor) -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    text, picture = ModelSubject(vlm, processor, mesh, SHAPE._replace(patches=0), NEW).answer([SAMPLES[1], SAMPLES[0]])
    assert isinstance(text, Answer)
    assert isinstance(picture, SampleError) and "over the budget of tokens 96 and patches 0" in str(picture)


def _held() -> int:
    """Bytes of the arrays that something holds, without what other tests left to the garbage collector."""
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def test_weights_are_given_and_let_go_of_without_compiling_again(
    subject: ModelSubject, vlm: Vlm, processor: Processor
) -> None:
    """A subject of an abstract model, as training makes it before there are weights."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    shared = ModelSubject(jax.eval_shape(lambda: vlm), processor, mesh, SHAPE, NEW)
    other = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(7), x.shape, x.dtype), vlm)
    with pytest.raises(RuntimeError, match="the engine has no weights"):
        shared.answer(SAMPLES[:1])
    answers, looks, programs = [], [], []
    held = [_held()]
    for weights in (vlm, other, vlm):
        shared.use(weights)
        answers.append(shared.answer(SAMPLES))
        looks.append(shared.look(SAMPLES[:1], answers[0][:1]))
        shared.vas(SAMPLES)
        shared.route(SAMPLES, answers[0])
        shared.release()
        held.append(_held())
        programs.append((compilations(), shared._answer_attention._cache_size(), shared._vas_sums._cache_size()))
    assert answers[0] == answers[2] == subject.answer(SAMPLES) != answers[1]
    np.testing.assert_array_equal(looks[0][0].weights, looks[2][0].weights)
    assert np.any(looks[0][0].weights != looks[1][0].weights)
    assert programs[0] == programs[1] == programs[2], "one set of programs serves all weights"
    assert len(set(held)) == 1, "nothing is kept"
    with pytest.raises(ValueError, match="built otherwise"):
        shared.use(with_vas(vlm))


def test_what_is_asked_between_two_pieces_of_work_can_end_it(subject: ModelSubject, vlm: Vlm) -> None:
    class Ended(Exception):
        pass

    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Ended

    subject.use(vlm, check)
    with pytest.raises(Ended):
        subject.answer(SAMPLES)
    with pytest.raises(Ended):
        calls = 1
        subject.vas(SAMPLES)
    subject.use(vlm)
    assert all(isinstance(answer, Answer) for answer in subject.answer(SAMPLES)), "nothing of the ended work is left"
