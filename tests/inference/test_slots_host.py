"""Slots whose visual keys lie in host memory say what a whole forward pass says, and leave the keys there."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from rave_jax.attention import Gaze, Rave
from rave_jax.batch import Kind
from rave_jax.config import ConfigError
from rave_jax.data.sample import OverBudget
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.inference import Engine, Sampling, SlotConfig
from rave_jax.inference.slots import compilations
from rave_jax.layout import FixedRegions
from rave_jax.models.config import ModelOptions
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from tests.inference.prompts import example_of, whole_forward
from tests.inference.test_slots import NEW, engine, run
from tests.models.layout import Document, Visual, document
from tests.models.made import model

CONFIG = tiny(tie_embeddings=False, num_layers=2, vision_depth=1, full_attention_blocks=())
OPTIONS = ModelOptions((Gaze(FixedRegions(2, 2), max_regions=12, top_k=2), Rave(rank=4)))
# Prompts of one chunk and of two; the third takes the slot of the first or second.
PARTS: tuple[list[int | Visual], ...] = (
    [3, Visual(1, 4, 8), 3, Visual(1, 8, 8), 15],
    [2, Visual(1, 4, 4), 9],
    [1, Visual(1, 4, 8), 9],
)
SIZES = SlotConfig(
    slots=2,
    max_length=64,
    # The longest has 27 tokens beside its regions.
    max_text=28,
    chunk=32,
    smallest=32,
    patches=64,
    decode_steps=4,
    max_stop_ids=2,
    regions_in="host",
)


@functools.cache
def a_model() -> Vlm:
    return model(CONFIG, OPTIONS, seed=7)


def prompts() -> list[Document]:
    rng = np.random.default_rng(0)
    return [document(parts, CONFIG, rng) for parts in PARTS]


def check_memory(slots: Engine) -> None:
    """Keys and values of regions are on the host, and nothing else is."""
    cache = slots._state.cache
    kept = [part for one in cache.regions.layer_runs for part in (one.keys.k, one.keys.v)]
    kept = [getattr(part, "values", part).tiles for part in kept]
    assert {x.sharding.memory_kind for x in kept} == {"pinned_host"}
    found = [x for x in jax.tree.leaves(slots._state) if x.sharding.memory_kind != "device"]
    assert len(found) == len(kept) and sum(x.nbytes for x in kept) == cache.host_nbytes


def test_keys_and_values_of_regions_alone_are_on_the_host() -> None:
    check_memory(engine(a_model(), SIZES))


@pytest.mark.slow
def test_each_token_is_the_argmax_of_a_whole_forward_and_nothing_is_compiled_twice() -> None:
    jax.clear_caches()  # other tests may have compiled some of these programs
    before = compilations()
    slots = engine(a_model(), SIZES)
    check_memory(slots)
    answers = run(slots, prompts())
    check_memory(slots)
    assert len({token for answer in answers for token in answer}) > 5, "a model that says one thing proves nothing"
    for answer, logits in zip(answers, whole_forward(a_model(), prompts(), answers, T=64, P=96), strict=True):
        assert len(answer) == NEW and answer == logits.argmax(-1).tolist()
        best = np.sort(logits, axis=-1)
        assert (best[:, -1] - best[:, -2]).min() > 1e-4, "no tie decides"
    assert run(slots, prompts()[::-1]) == answers[::-1], "used slots remember nothing of who was there"
    assert compilations() - before == len(slots.usage.programs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_few_bytes_on_the_host_say_what_they_say_on_the_device(kind) -> None:
    slots = engine(a_model(), dataclasses.replace(SIZES, cache=kind))
    check_memory(slots)
    on_device = engine(a_model(), dataclasses.replace(SIZES, cache=kind, regions_in="device"))
    assert run(slots, prompts()) == run(on_device, prompts())
    check_memory(slots)


@pytest.mark.slow
def test_a_mesh_of_one_device_changes_nothing() -> None:
    expected = run(engine(a_model(), SIZES), prompts())
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    before = compilations()
    slots = engine(a_model(), SIZES, mesh=mesh)
    assert run(slots, prompts(), [Sampling(NEW)] * len(PARTS)) == expected
    check_memory(slots)
    assert compilations() - before == len(slots.usage.programs)


@pytest.mark.slow
def test_an_answer_ends_where_the_slots_beside_its_regions_do() -> None:
    slots = engine(a_model(), dataclasses.replace(SIZES, max_text=14))
    assert slots._state.cache.size == 14, "slots of the cache are for what lies in no region"
    # 10 tokens beside three pictures of 16: more than the slots hold if pictures were among them.
    parts = [3, *[Visual(1, 8, 8)] * 3, 1]
    prompt = document(parts, CONFIG, np.random.default_rng(1))
    beside = int(np.sum(np.asarray([code["kind"] for code in prompt.codes]) != Kind.VISUAL))
    assert len(prompt.tokens) == beside + 48 and 14 - beside < 64 - len(prompt.tokens), "max_text is what ends it"
    (answer,) = run(slots, [prompt], [Sampling(1000)])
    assert len(answer) == 14 - beside + 1
    (logits,) = whole_forward(a_model(), [prompt], [answer], T=80, P=192)
    assert answer == logits.argmax(-1).tolist()


def test_too_much_text_beside_regions_is_refused_by_name() -> None:
    example = example_of(document([14, Visual(1, 4, 4), 14], CONFIG, np.random.default_rng(0)), CONFIG, OPTIONS.layout)
    with pytest.raises(
        OverBudget, match="29 tokens outside regions, with one token of the answer, over the budget of max_text"
    ):
        engine(a_model(), SIZES).submit(example, Sampling(NEW))
    with pytest.raises(ConfigError, match="max_text is 28, expected None: the model keeps no regions"):
        engine(model(CONFIG, ModelOptions((Rave(rank=4),)), seed=3), dataclasses.replace(SIZES, regions_in="device"))
    with pytest.raises(ConfigError, match=r"max_text is 65, expected 2 to `max_length` \(64\)"):
        dataclasses.replace(SIZES, max_text=65)


def test_where_regions_cannot_lie_on_the_host_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="regions_in is 'host', expected device: no mechanism of the model keeps"):
        engine(model(CONFIG, ModelOptions((Rave(rank=4),)), seed=3), dataclasses.replace(SIZES, max_text=None))
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    with pytest.raises(ConfigError, match="regions_in is 'host', expected device on a mesh of 2 devices"):
        engine(a_model(), SIZES, mesh=mesh)
    with pytest.raises(ConfigError, match="regions_in"):
        SlotConfig(**{"regions_in": "disk"})
