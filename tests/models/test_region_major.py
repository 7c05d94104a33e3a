"""Rows in raster order and region by region are one thing to a model: the same logits, whatever the mechanisms."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from rave_jax import attention as at
from rave_jax.batch import Batch, Role
from rave_jax.data.collate import BatchShape, collate
from rave_jax.data.layout import lay_out, region_major
from rave_jax.data.sample import Example
from rave_jax.families.qwen2_5_vl import presets
from rave_jax.layout import ContextTokens, FixedRegions, VisualLayout
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import Want
from rave_jax.models.vlm import Vlm
from tests.attention.built_in import BUILT_IN, OF_PROMPTS
from tests.inference.prompts import example_of
from tests.models.layout import Visual, document
from tests.models.made import model as made

CONFIG = presets.tiny(vocab_size=64, num_layers=2, vision_depth=1, full_attention_blocks=())
VISION = CONFIG.vision
assert VISION is not None
# Regions of two frames, and smaller ones at the edges: frames of a video do not lie one behind the other.
REGIONS = FixedRegions(2, 2, frames=2)
SETTINGS: dict[str, tuple[at.MechanismConfig, ...]] = {
    "plain": (),
    "rave and window": (at.Rave(rank=4), at.SlidingWindow(7), at.Arrow(9, 2), at.VisualBias(0.5)),
    "text positions": (at.TextPositions(), at.LogN(length=4), at.Steer(image=0.7, by="score", rows="all")),
    "mma and croc": (at.Mma(), at.Croc()),
    "prefix": (at.Croc("prefix"),),
    "cca": (at.Cca(),),
    "blocks": (at.Moba(5, top_k=2, layers=(0,)), at.Sparsifiner(5, keep=0.3, rank=4, layers=(1,))),
    "spans": (at.Superlinear(5, spans=1, rank=4),),
    "mean queries": (at.BiFormer(REGIONS, 64, top_k=2), at.Croc(layers=(0,)), at.Cca(layers=(1,))),
    "first token": (at.ZeroTuning(3.0), at.ZeroTuning(0.5, route="after"), at.ZeroTuning(2.0, route="merge")),
    "sinks and losses": (
        at.Var(dims=(3, 11, 20), tau=1.8, summ=0.05, rho=0.3, layers="all"),
        at.Avar(),
        at.Moh(balance=0.5),
        at.Sads(heads=(1,)),
        at.Vhr(heads=(0,)),
    ),
    "decomposed": (at.Decomposed(),),
    "gaze": (at.Gaze(REGIONS, 64, top_k=2, layers=(0,)), at.Gaze(REGIONS, 64, top_k=2, share="group", layers=(1,))),
}


def example(parts: list[int | Visual], answer: range, layout: VisualLayout) -> Example:
    doc = document(parts, CONFIG, np.random.default_rng(len(parts)))
    for place in answer:
        doc.codes[place]["role"] = Role.RESPONSE
    for code in doc.codes[answer.stop :]:
        code["turn"] += 1
    return lay_out(example_of(doc, CONFIG), layout)


def both(context: ContextTokens | None) -> tuple[Batch, Batch, np.ndarray]:
    """A packed row in raster order and region by region, and where the first row's tokens lie in the second."""
    layout = VisualLayout(REGIONS, 64, context)
    documents = [
        # An answer comes before its second picture.
        example([2, Visual(1, 6, 8), 5, Visual(3, 6, 6, video=True), 4], range(15, 17), layout),
        example([4], range(2, 4), layout),
        example([Visual(2, 4, 6, video=True), 3, Visual(1, 2, 6), 2], range(13, 15), layout),
    ]
    shape = BatchShape(1, 120, 256)
    rows = [documents, [region_major(one) for one in documents]]
    raster, major = (collate([row], shape, CONFIG.patch_sizes) for row in rows)
    starts = np.cumsum([0] + [len(one.tokens) for one in documents])
    lies = np.concatenate([start + np.argsort(one.info.offset) for start, one in zip(starts, rows[1], strict=False)])
    assert np.any(lies != np.arange(len(lies)))
    return raster, major, lies


@jax.jit
def outcome(model: Vlm, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    out = model.forward(batch, Want(losses=True))
    return model.logits(out.hidden), out.losses


@functools.cache
def a_model(name: str, context: ContextTokens | None) -> Vlm:
    return made(CONFIG, ModelOptions(SETTINGS[name], context))


FAST = ("sinks and losses", "decomposed", "mma and croc, context", "cca", "gaze, context")
"""Among them are all kinds of what a mechanism may read: places, kinds, masks, positions and regions."""


@pytest.mark.parametrize(
    ("name", "context"),
    [
        pytest.param(name, context, id=name + beside, marks=[pytest.mark.slow] * (name + beside not in FAST))
        for beside, context in (("", None), (", context", ContextTokens(2)))
        for name in SETTINGS
    ],
)
def test_logits_go_by_places_and_not_by_the_order_of_tokens(name: str, context: ContextTokens | None) -> None:
    vlm = a_model(name, context)
    raster, major, lies = both(context)
    plain, moved = outcome(vlm, raster), outcome(vlm, major)
    np.testing.assert_allclose(np.asarray(moved[0])[0, lies], np.asarray(plain[0])[0, : len(lies)], atol=2e-5)
    assert plain[1].keys() == moved[1].keys()
    for key, value in plain[1].items():
        np.testing.assert_allclose(moved[1][key], value, rtol=1e-4)


def test_every_mechanism_is_among_the_settings() -> None:
    tried = {type(config) for configs in SETTINGS.values() for config in configs}
    # Rows stand region by region beside mechanisms that route over regions, and these are refused there.
    assert tried == set(BUILT_IN) - OF_PROMPTS - {at.Pine, at.Pruning, at.Dyvte}
