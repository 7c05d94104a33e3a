"""Gaze with other regions than the model's layout, in layers of its own: it is Gaze over those regions."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.attention import (
    AttentionDims,
    BiFormer,
    Features,
    Gaze,
    Mechanism,
    Rave,
    attend,
    build_mechanisms,
    remember,
)
from rave_jax.attention.gaze.elsewhere import GazeElsewhere, elsewhere, regions_of
from rave_jax.attention.masks import causal_codes
from rave_jax.batch import TokenInfo
from rave_jax.config import ConfigError
from rave_jax.layout import AdaptiveRegions, FixedRegions, VisualLayout
from rave_jax.models.config import ModelOptions
from tests.attention.packed import features
from tests.attention.test_gaze import T, a_model, gaze, hidden, rows

OTHER = FixedRegions(3, 1)
HERE = VisualLayout(FixedRegions(2, 2), 16)


def given(order: Any = "region", layout: FixedRegions = OTHER) -> TokenInfo:
    """Codes of two packed rows whose region numbers are those of `data.layout`."""
    return rows(order=order, regions=layout).info


def test_regions_are_found_from_places_as_data_numbers_them() -> None:
    """Also where tokens lie in the order of other regions, and where entries of a cache hold nothing between them."""
    for regions in (OTHER, FixedRegions(2, 2), FixedRegions(1, 3, frames=2)):
        info = given("region", regions)
        np.testing.assert_array_equal(regions_of(info, regions), info.region)
        apart = jax.tree.map(lambda code: jnp.stack([code, jnp.zeros_like(code)], 2).reshape(len(code), -1), info)
        np.testing.assert_array_equal(regions_of(apart, regions)[:, ::2], info.region)
        assert not np.any(regions_of(apart, regions)[:, 1::2])


@functools.partial(jax.jit, static_argnames=("config",))
def attended(config: Any, x: Features, info: TokenInfo) -> tuple[jax.Array, jax.Array]:
    mechanisms = build_mechanisms((config, Rave(rank=2, start="random")), AttentionDims(4, 2, 8), jax.random.key(0))
    keys = remember(mechanisms, x)._replace(summary=mechanisms[0].summarise(x, info.region, 48))
    every = jnp.broadcast_to(jnp.arange(T), (2, T))
    found = attend(x, keys, causal_codes(info), info, info, mechanisms, queries=every, regions=48, implementation="xla")
    assert found.attention is not None
    return found.out, found.attention


@pytest.mark.parametrize(
    "config",
    [
        Gaze(OTHER, 48, top_k=2, rank_with_bias=True),
        Gaze(OTHER, 48, top_k=0.4, share="group", descriptor="spread", descriptor_keys="pre_rope", normalise="none"),
        Gaze(OTHER, 48, top_k=2, normalise="keys", choice="soft_bias"),
    ],
    ids=["bias", "groups", "normalised"],
)
def test_it_reads_what_gaze_reads_over_the_same_regions(config: Gaze) -> None:
    x, info = features(rows=2, length=T), given()
    out, weights = attended(config, x, info)
    # Numbers of the layout are not read.
    wrong = info._replace(region=given("region", FixedRegions(2, 2)).region)
    found = attended(GazeElsewhere(config), x, wrong)
    np.testing.assert_allclose(found[1], weights, atol=1e-6)
    np.testing.assert_allclose(found[0], out, atol=1e-5)


def test_a_model_of_two_layouts_gives_the_same_in_whatever_order_tokens_lie() -> None:
    model = a_model(gaze(layers=(0,)), Gaze(OTHER, 48, top_k=2, layers=(1,)))
    inside = model.decoder.layer_runs[1].layers.mechanisms[0]
    assert isinstance(inside, Mechanism) and inside.OWN_REGIONS
    raster, moved = rows(order="raster"), rows(order="region")
    found = np.asarray(hidden(model, moved))
    by_place = np.argsort(np.where(moved.info.document > 0, moved.info.document * 999 + moved.info.offset, 1 << 20), 1)
    np.testing.assert_allclose(np.take_along_axis(found, by_place[..., None], 1), hidden(model, raster), atol=2e-5)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Gaze(OTHER, 47), "max_regions 47, expected at least 48, the most FixedRegions.* of a row with 16 regions"),
        (Gaze(AdaptiveRegions()), "how large these are depends on the picture.* put it first"),
        (
            Gaze(OTHER, 48, visual_queries="frame+routed"),
            "visual_queries 'frame.routed'.* set visual_queries to",
        ),
        (Gaze(FixedRegions(2, 3), 17), "max_regions 16 and 17, but a row has one budget.* give both the same"),
        (BiFormer(OTHER, 48), "BiFormer asks for other regions than the model's layout.* put it first"),
    ],
)
def test_what_cannot_be_counted_or_found_is_refused(other: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"mechanisms: .*{said}"):
        ModelOptions((gaze(layers=(0,)), dataclasses.replace(other, layers=(1,))))


def test_more_regions_than_another_layout_can_have_are_not_asked_for() -> None:
    assert elsewhere(Gaze(FixedRegions(4, 4), 16), HERE).gaze.max_regions == 16
    assert FixedRegions(1, 1).most_beside(VisualLayout(AdaptiveRegions(2, 2, tokens=9), 8)) == 72
