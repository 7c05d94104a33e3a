"""Slots against their definition: each token is the argmax of a whole forward pass, whoever is in the other slots."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.attention import (
    Arrow,
    Avar,
    CacheType,
    Decomposed,
    Dyvte,
    Gaze,
    LogN,
    MechanismConfig,
    Moba,
    Moh,
    Pine,
    Pruning,
    Rave,
    Sads,
    SlidingWindow,
    Sparsifiner,
    Steer,
    Superlinear,
    TextPositions,
    Var,
    Vhr,
    VisualBias,
    ZeroTuning,
)
from rave_jax.config import ConfigError
from rave_jax.data.layout import lay_out
from rave_jax.data.sample import OverBudget, SampleError
from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.inference import Engine, Sampling, SlotConfig
from rave_jax.inference.faults import NotFinite, TimedOut
from rave_jax.inference.slots import compilations
from rave_jax.layout import AdaptiveRegions, FixedRegions, VisualLayout
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import with_values
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import named_sharding
from tests.inference.prompts import example_of, whole_forward
from tests.models.layout import Document, Visual, document
from tests.models.made import model

# Tied, a random model repeats what it read.
CONFIG = tiny(tie_embeddings=False, vision_depth=1, full_attention_blocks=())
SHORT = tiny(tie_embeddings=False, vision_depth=1, full_attention_blocks=(), num_layers=2)
VISION = CONFIG.vision
assert VISION is not None
NEW = 6
# Prompts of one token, within one chunk, and of three chunks; without a picture, with one, with several and a video.
PARTS: tuple[list[int | Visual], ...] = (
    [3, Visual(1, 4, 4), 4],
    [2, Visual(1, 4, 6), 1, Visual(1, 2, 4), 5],
    [1],
    [9, Visual(1, 4, 8), 4, Visual(2, 4, 4, video=True), 2, Visual(1, 4, 4), 9],
    [14],
)
SIZES = SlotConfig(
    slots=3, max_length=80, chunk=20, smallest=20, patches=40, prefill_rows=2, decode_steps=4, max_stop_ids=2
)
# Half as many programs; prompts still come in one chunk and in two, and slots are filled again.
FEW = dataclasses.replace(SIZES, chunk=40, smallest=40)
SETTINGS: dict[str, tuple[MechanismConfig, ...]] = {
    "plain": (),
    "rave": (
        TextPositions(),
        Rave(rank=4, layers=(0,), queries="text", form="tanh"),
        SlidingWindow(window=20, layers=(1,)),
    ),
    "positions": (TextPositions(), SlidingWindow(window=7, layers=(0,)), Arrow(7, 2, layers=(1,))),
    "some in each layer": (
        Var(dims=(3, 11, 20), tau=1.8, summ=0.05, rho=0.3, move_fraction=0.9, layers=(0,)),
        Rave(rank=4, layers=(0,), features="post_rope"),
        ZeroTuning(0.2, layers=(0,)),
        ZeroTuning((6.0, 0.5), heads=(0, 2), layers=(1,), route="after"),
        SlidingWindow(window=20, layers=(1,)),
        Decomposed(layers=(1,)),
        Moh("learned", layers=(0,)),
        Sads(heads=(2,), layers=(1,)),
        Vhr(heads=(0, 3), layers=(1,)),
        LogN(length=4),
        Steer(image=0.7, system=0.3, layers=(0,)),
        VisualBias(0.7, layers=(1,)),
    ),
    "first token, bias and after": (
        ZeroTuning(0.2),
        ZeroTuning((6.0, 0.5), heads=(0, 2), layers=(1, 2), route="after"),
        Rave(rank=4, layers=(0, 1)),
    ),
    "first token, channel and merge": (
        ZeroTuning(0.2, layers=(0, 1), route="channel"),
        ZeroTuning(5.0, layers=(1, 2), route="merge"),
        Avar(),
        SlidingWindow(window=30, layers=(2,)),
    ),
    # By these dimensions one token in seven or more is a sink, of answers too; long prompts and their answers change.
    "sinks": (
        Var(dims=(3, 11, 20), tau=1.8, summ=0.05, rho=0.3, move_fraction=0.9, layers="all"),
        Rave(rank=4, layers=(1,)),
    ),
    "pictures in no order": (
        Pine(3),
        Rave(rank=4, layers=(0,)),
        SlidingWindow(window=40, layers=(1,)),
    ),
    "gaze": (
        Gaze(FixedRegions(2, 2), max_regions=12, top_k=2, layers=(1,)),
        Gaze(FixedRegions(2, 2), max_regions=12, top_k=2, rank_with_bias=True, layers=(0,)),
        Rave(rank=4, layers=(0,)),
        SlidingWindow(window=40, layers=(1,)),
        Moh(layers=(0, 1)),
    ),
    "gaze of groups": (
        Gaze(AdaptiveRegions(1, 2, frames=2, tokens=8), max_regions=9, top_k=0.5, share="group", descriptor="min_max"),
        ZeroTuning(0.2, layers=(1,)),
        Rave(rank=4, form="centered_sigmoid", layers=(0,)),
    ),
    "blocks": (
        Moba(5, top_k=2, layers=(0,)),
        Rave(rank=4, layers=(0,)),
        Sparsifiner(4, keep=0.3, rank=4, layers=(1,)),
        Moba(7, top_k=2, queries="text", share="group", layers=(2,)),
    ),
    "blocks beside regions": (
        Moba(5, top_k=2, layers=(0,)),
        Gaze(FixedRegions(2, 2), max_regions=12, top_k=2, normalise="keys", layers=(1,)),
        Superlinear(5, spans=1, rank=4, layers=(2,)),
    ),
    "other regions in other layers": (
        Gaze(FixedRegions(2, 2), max_regions=12, top_k=2, layers=(1,)),
        Gaze(FixedRegions(2, 3), max_regions=12, top_k=2, rank_with_bias=True, layers=(0,)),
        Gaze(FixedRegions(1, 2), max_regions=24, top_k=3, descriptor="spread", descriptor_keys="pre_rope", layers=(2,)),
        Rave(rank=4, layers=(0,)),
        SlidingWindow(window=40, layers=(1,)),
    ),
    "gaze for study": (
        Gaze(FixedRegions(1, 3), 16, top_k=1, descriptor="spread", layers=(0,)),
        Gaze(FixedRegions(1, 3), 16, top_k=1, descriptor="oracle", layers=(1,)),
        Gaze(FixedRegions(1, 3), 16, top_k=1, descriptor="learned", descriptor_keys="pre_rope", layers=(2,)),
        Decomposed(layers=(2,)),
    ),
    "pruned": (
        Pruning(keep=0.4, slope=1.0, layers=(0,)),
        Pruning(keep=0.5, layers=(1,)),
        Rave(rank=4, layers=(0, 1, 2)),
        SlidingWindow(window=30, layers=(1, 2)),
        ZeroTuning(0.2, layers=(1,)),
        TextPositions(layers=(2,)),
    ),
    "routers": (Dyvte(width=8), LogN(length=4)),
    "decomposed": (
        Decomposed(layers=(0, 1)),
        Decomposed("kept", layers=(2,)),
        Rave(rank=4, layers=(0, 2)),
        SlidingWindow(window=20, layers=(1,)),
    ),
}

FAST = ("some in each layer", "gaze")
"""Each program of the others takes 1 to 2 s to compile, and most of their mechanisms are in these."""


@functools.cache
def a_model(name: str = "rave") -> Vlm:
    config = SHORT if name in ("rave", *FAST) else CONFIG
    return model(config, ModelOptions(mechanisms=SETTINGS[name]), seed=3)


@functools.cache
def prompts() -> list[Document]:
    rng = np.random.default_rng(0)
    return [document(parts, CONFIG, rng) for parts in PARTS]


def engine(vlm: Vlm, sizes: SlotConfig = SIZES, stop_ids: Sequence[int] = (), mesh=None) -> Engine:
    return Engine(vlm, sizes, stop_ids, mesh)


def run(slots: Engine, documents: Sequence[Document], samplings: Sequence[Sampling] | None = None) -> list[list[int]]:
    """The answers, in order; also holds that each request ends once."""
    samplings = samplings or [Sampling(NEW)] * len(documents)
    vlm = slots._model
    examples = [example_of(doc, vlm.config, vlm.options.layout) for doc in documents]
    numbers = [slots.submit(*asked) for asked in zip(examples, samplings, strict=True)]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    ended = []
    while slots.waiting or slots.running:
        for progress in slots.step():
            assert progress.request not in ended
            answers[progress.request] += progress.tokens
            ended += [progress.request] * (progress.reason is not None)
    assert sorted(ended) == numbers
    return [answers[number] for number in numbers]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in SETTINGS]
)
def test_each_token_is_the_argmax_of_a_whole_forward(name: str) -> None:
    vlm = a_model(name)
    answers = run(engine(vlm, SIZES if name == "rave" else FEW), prompts())
    assert [len(answer) for answer in answers] == [NEW] * len(PARTS)
    assert len({token for answer in answers for token in answer}) > 5, "a model that says one thing proves nothing"
    for answer, logits in zip(answers, whole_forward(vlm, prompts(), answers, T=96, P=160), strict=True):
        assert answer == logits.argmax(-1).tolist()
        best = np.sort(logits, axis=-1)
        assert (best[:, -1] - best[:, -2]).min() > 1e-4, "no tie decides"


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return run(engine(a_model()), prompts())


def test_a_batch_says_what_each_row_says_alone(expected: list[list[int]]) -> None:
    slots = engine(a_model())
    assert [run(slots, [prompt])[0] for prompt in prompts()] == expected
    assert run(slots, prompts()[::-1]) == expected[::-1], "used slots remember nothing of who was there"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_smaller_cache_says_nearly_the_same(kind: CacheType, expected: list[list[int]]) -> None:
    slots = engine(a_model(), dataclasses.replace(FEW, cache=kind))
    assert {x.dtype.name for x in jax.tree.leaves(slots._state.cache.layer_runs[1].k)} >= {kind}
    answers = run(slots, prompts()[:2])
    assert [answer[0] for answer in answers] == [answer[0] for answer in expected[:2]]


@pytest.mark.slow
def test_layers_apart_say_the_same(expected: list[list[int]]) -> None:
    stacked = a_model()
    options = dataclasses.replace(stacked.options, scan_layers=False)
    apart = jax.eval_shape(lambda: Vlm(SHORT, options, key=jax.random.key(0)))
    layers = [
        jax.tree.map(lambda x, n=n: x[n : n + 1], part.layers)
        for part in stacked.decoder.layer_runs
        for n in range(part.stop - part.start)
    ]
    for part, one in zip(apart.decoder.layer_runs, layers, strict=True):
        part.layers = one
    apart.decoder.norm, apart.embed, apart.lm_head = stacked.decoder.norm, stacked.embed, stacked.lm_head
    apart.vision = stacked.vision
    assert run(engine(apart, FEW), prompts()[:2]) == expected[:2]


@pytest.mark.slow
def test_less_room_behind_a_drop_says_the_same() -> None:
    """Text and the visual tokens that stay need fewer entries in the layers behind."""
    vlm, few = a_model("pruned"), dataclasses.replace(FEW, max_kept=56)
    whole, less = engine(vlm, FEW), engine(vlm, few)
    assert run(less, prompts()) == run(whole, prompts())
    sizes = [[run.size for run in slots._state.cache.layer_runs[1:]] for slots in (whole, less)]
    assert sizes == [[80, 80], [56, 56]]
    text = document([56], CONFIG, np.random.default_rng(0))
    with pytest.raises(OverBudget, match="57 tokens that stay, with one token of the answer, over the budget"):
        less.submit(example_of(text, CONFIG), Sampling(NEW))


def test_stop_tokens_end_a_row_and_only_that_row(expected: list[list[int]]) -> None:
    stop, own = expected[0][2], expected[3][1]
    samplings = [Sampling(NEW), Sampling(NEW), Sampling(1), Sampling(NEW, stop_ids=(own,)), Sampling(NEW)]
    answers = run(engine(a_model(), stop_ids=(stop,)), prompts(), samplings)
    for answer, free, sampling in zip(answers, expected, samplings, strict=True):
        stops = {stop, *sampling.stop_ids}
        free = free[: sampling.max_new_tokens]
        assert answer == free[: next((i for i, token in enumerate(free) if token in stops), len(free))]
    assert len(answers[0]) <= 2 and len(answers[3]) <= 1


def test_an_answer_ends_where_its_slot_does(expected: list[list[int]]) -> None:
    prompt = prompts()[3]
    slots = engine(a_model())
    room = SIZES.max_length - len(prompt.tokens) + 1
    number = slots.submit(example_of(prompt, CONFIG), Sampling(1000))
    progress = [p for _ in range(room) for p in slots.step()]
    assert {p.request for p in progress} == {number}
    answer = [token for p in progress for token in p.tokens]
    assert len(answer) == room and answer[:NEW] == expected[3]
    assert [p.reason for p in progress if p.reason] == ["full"]
    # The last token needed no slot of its own, and every one before it was seen.
    # As many rows as elsewhere: one program.
    logits, *_ = whole_forward(a_model(), [prompt] * len(PARTS), [answer] * len(PARTS), T=96, P=160)
    assert answer == logits.argmax(-1).tolist()


@pytest.mark.slow
def test_a_mesh_changes_nothing_and_compiles_nothing_twice(expected: list[list[int]]) -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    before = compilations()
    slots = engine(a_model(), dataclasses.replace(FEW, slots=4), mesh=mesh)
    stored = slots._state.cache.layer_runs[0].k
    wanted = named_sharding(("layers", "batch", "kv_heads", "length", None), stored.shape, mesh)
    assert stored.sharding.is_equivalent_to(wanted, stored.ndim) and not wanted.is_fully_replicated
    assert run(slots, prompts()) == expected
    assert run(slots, prompts()[::-1]) == expected[::-1]
    assert compilations() - before == len(slots.usage.programs)


@pytest.mark.slow
def test_regions_on_a_mesh_and_in_few_bytes_say_the_same() -> None:
    """Over rows and kv heads; and with int8 keys, most of what is said."""
    expected = run(engine(a_model("gaze"), FEW), prompts())
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    slots = engine(a_model("gaze"), dataclasses.replace(FEW, slots=4), mesh=mesh)
    far = slots._state.cache.regions
    assert far is not None and not far.layer_runs[0].keys.k.sharding.is_fully_replicated
    assert run(slots, prompts()) == expected
    few = run(engine(a_model("gaze"), dataclasses.replace(FEW, cache="int8")), prompts())
    said = [a == b for mine, theirs in zip(few, expected, strict=True) for a, b in zip(mine, theirs, strict=True)]
    assert sum(said) > 0.6 * len(said)


def test_more_regions_than_the_budget_are_refused_by_name() -> None:
    slots = engine(a_model("gaze"))
    wide = document([2, Visual(1, 4, 56), 2], CONFIG, np.random.default_rng(0))
    example = lay_out(example_of(wide, CONFIG), VisualLayout(FixedRegions(2, 2), 99))
    with pytest.raises(OverBudget, match="wide: 14 regions, over the budget of max_regions 12"):
        slots.submit(example, Sampling(NEW), "wide")
    with pytest.raises(SampleError, match="plain: a picture without regions: the processor needs the model's layout"):
        slots.submit(example_of(wide, CONFIG), Sampling(NEW), "plain")
    assert not slots.waiting


def test_a_mixed_load_compiles_its_buckets_and_keeps_slots_busy() -> None:
    rng = np.random.default_rng(1)
    before = compilations()
    bound = jax.device_put(a_model(), jax.devices()[0])  # as an import gives it
    sizes = dataclasses.replace(SIZES, max_length=64, chunk=32, smallest=32, prefill_rows=1, decode_steps=5)
    slots = engine(bound, sizes)
    some = [document([int(n), Visual(1, 4, 4), 1], CONFIG, rng) for n in rng.integers(1, 30, 60)]
    run(slots, some, [Sampling(int(n)) for n in rng.integers(1, 25, 60)])
    names = ("encode_images", "prefill", "decode")
    encoded, prefilled, decoded = ({n for kind, n in slots.usage.programs if kind == name} for name in names)
    assert encoded == {16} and prefilled == {(n, 32, None) for n in (32, 64)} and decoded <= {32, 64}
    assert compilations() - before == len(slots.usage.programs)
    assert 0.95 < slots.usage.occupancy < 1, "only at the end slots run empty"


def test_what_does_not_fit_is_refused_and_nothing_is_lost(expected: list[list[int]]) -> None:
    slots = engine(a_model(), dataclasses.replace(SIZES, max_prompt=40, max_patches=60))
    long = document([41], CONFIG, np.random.default_rng(0))
    many = document([1, Visual(1, 8, 8), 1], CONFIG, np.random.default_rng(0))
    whole = document([80], CONFIG, np.random.default_rng(0))
    with pytest.raises(OverBudget, match="x: the prompt has 41 tokens, over the budget of max_prompt 40"):
        slots.submit(example_of(long, CONFIG), Sampling(), "x")
    with pytest.raises(OverBudget, match="64 patches, over the budget of max_patches 60"):
        slots.submit(example_of(many, CONFIG), Sampling())
    with pytest.raises(OverBudget, match="81 tokens, with one token of the answer, over the budget of max_length 80"):
        engine(a_model()).submit(example_of(whole, CONFIG), Sampling())
    for number in (-1, CONFIG.text.vocab_size):
        odd = example_of(prompts()[0], CONFIG)
        odd.tokens[-1] = number
        with pytest.raises(SampleError, match=f"x: the prompt holds the token id {number}: the embedding has 512 rows"):
            slots.submit(odd, Sampling(), "x")
    with pytest.raises(SampleError, match="3 ids end its answer, but max_stop_ids is 2"):
        slots.submit(example_of(prompts()[0], CONFIG), Sampling(stop_ids=(1, 2, 3)))
    with pytest.raises(ConfigError, match="max_kept is 40, expected None: no mechanism of the model lets tokens leave"):
        engine(a_model(), dataclasses.replace(SIZES, max_kept=40))
    with pytest.raises(ConfigError, match="3 ids end an answer"):
        engine(a_model(), stop_ids=(1, 2, 3))
    text = VlmConfig(text=TextConfig(), family="qwen3")
    with pytest.raises(SampleError, match="the model is for text only"):
        engine(model(text)).submit(example_of(prompts()[0], CONFIG), Sampling())
    assert run(slots, prompts()[:1]) == expected[:1]


def finish(slots: Engine) -> dict[int, tuple[list[int], SampleError | None]]:
    """Tokens of every request that was submitted, and what went wrong with it."""
    ends: dict[int, tuple[list[int], SampleError | None]] = {}
    while slots.waiting or slots.running:
        for request, tokens, _, error in slots.step():
            before, failed = ends.get(request, ([], None))
            assert failed is None, "nothing follows an error"
            ends[request] = ([*before, *tokens], error)
    return ends


@pytest.mark.parametrize("name", ["rave", pytest.param("gaze", marks=pytest.mark.slow)])
def test_logits_that_are_not_finite_end_their_own_answer_and_leave_nothing_behind(name: str) -> None:
    """A token whose embedding is NaN: one answer says it, one prompt holds it."""
    free = run(engine(a_model(name)), prompts())
    read = {int(token) for prompt in prompts() for token in prompt.tokens}
    said = [token for answer in free for token in answer]
    bad, place, before = next(
        (token, place, n)
        for place, answer in enumerate(free)
        for n, token in enumerate(answer[:-1])
        if said.count(token) == 1 and token not in read and n > 0
    )
    vlm = a_model(name)
    weight = vlm.embed.weight[...]
    broken = with_values(vlm, {"embed.weight": weight.at[bad].set(jnp.nan)})
    slots = engine(broken)
    # The longest prompts, one for each slot, before others take the slots.
    poisoned = dataclasses.replace(prompts()[3], tokens=[bad, *prompts()[3].tokens[1:]])
    asked = [*[poisoned] * SIZES.slots, *prompts()]
    examples = [example_of(prompt, CONFIG, vlm.options.layout) for prompt in asked]
    numbers = [slots.submit(example, Sampling(NEW), f"n{i}") for i, example in enumerate(examples)]
    ends = finish(slots)
    for n, number in enumerate(numbers):
        tokens, error = ends[number]
        if n < SIZES.slots:
            assert tokens == [] and f"n{n}: " in str(error) and "token 1 of the answer" in str(error)
        elif n == SIZES.slots + place:
            position = len(asked[n].tokens) + before + 1
            assert tokens == free[place][: before + 1] and isinstance(error, NotFinite)
            assert f"n{n}: " in str(error) and f"token {before + 2} of the answer, at position {position}" in str(error)
        else:
            assert (tokens, error) == (free[n - SIZES.slots], None)


def test_an_answer_that_takes_too_long_ends_with_an_error_and_others_go_on(expected: list[list[int]]) -> None:
    slots = engine(a_model(), dataclasses.replace(SIZES, request_timeout=5.0))
    seconds = 0.0
    slots._clock = lambda: seconds
    asked = [(0, Sampling(39), "slow"), (1, Sampling(NEW), "a"), (3, Sampling(NEW), "b"), (2, Sampling(NEW), "c")]
    numbers = [slots.submit(example_of(prompts()[n], CONFIG), how, name) for n, how, name in asked]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    errors: dict[int, SampleError] = {}
    while slots.waiting or slots.running:
        for request, tokens, _, error in slots.step():
            answers[request] += tokens
            errors |= {request: error} if error is not None else {}
        seconds += 1.5
    assert errors.keys() == {numbers[0]} and isinstance(errors[numbers[0]], TimedOut)
    given = len(answers[numbers[0]])
    assert 4 < given < 39 and "slow: the answer was not finished 5 s after" in str(errors[numbers[0]])
    assert f"with {given} tokens so far" in str(errors[numbers[0]])
    assert [answers[number] for number in numbers[1:]] == [expected[1], expected[3], expected[2]]


def test_the_first_process_says_which_answers_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes must end the same ones, and this one, whose clock stands, ends what the first has found late."""
    slots = engine(a_model(), dataclasses.replace(SIZES, request_timeout=5.0))
    slots._clock = lambda: 0.0
    numbers = [slots.submit(example_of(prompts()[n], CONFIG), Sampling(39)) for n in range(2)]
    asked: list[list[int]] = []
    monkeypatch.setattr("rave_jax.inference.slots.from_first", lambda late: asked.append(late) or [1])
    ended = [piece for piece in slots.step() if piece.error is not None]
    assert asked == [[]], "by its own clock none is late"
    assert [piece.request for piece in ended] == numbers[1:] and isinstance(ended[0].error, TimedOut)
    assert slots.running == 1


def test_compiling_takes_none_of_an_answers_time() -> None:
    slots = engine(a_model(), SIZES)
    ticks = itertools.count()
    slots._clock = lambda: next(ticks)  # a call of a program takes one second
    slots._run("x", 1, lambda *_: (slots._state,))
    slots._run("x", 1, lambda *_: (slots._state,))
    assert slots._compiling == 1


def test_a_cancelled_request_leaves_its_slot(expected: list[list[int]]) -> None:
    slots = engine(a_model())
    numbers = [slots.submit(example_of(prompt, CONFIG), Sampling(40)) for prompt in prompts()]
    slots.step()
    assert slots.running == 2 and slots.waiting == 3, "the third slot waits for a second prompt"
    for number in numbers:
        slots.cancel(number)
    assert slots.running == slots.waiting == 0 and slots.step() == []
    assert run(slots, prompts()) == expected
