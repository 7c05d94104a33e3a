"""Gaze beside mechanisms of its layer that reorder keys or weigh them anew, against the dense formula in loops."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.attention import (
    AttentionDims,
    Cca,
    Croc,
    Features,
    Gaze,
    MechanismConfig,
    ZeroTuning,
    attend,
    build_mechanisms,
    remember,
)
from rave_jax.attention.attend import mask_codes
from rave_jax.attention.masks import causal_codes
from rave_jax.batch import TokenInfo
from tests.attention.packed import features
from tests.attention.test_gaze import PARTS, T, gaze, rows

COMPANY: dict[str, tuple[MechanismConfig, ...]] = {
    "croc": (Croc(),),
    "prefix": (Croc("prefix"),),
    "cca": (Cca(),),
    "after": (ZeroTuning((5.0, 0.3), heads=(0, 2), route="after"),),
}


@functools.partial(jax.jit, static_argnames=("gaze", "company"))
def beside(gaze: Gaze, company: tuple[MechanismConfig, ...], x: Features, info: TokenInfo) -> Any:
    """What a layer gives, and the mask codes of those that stand beside Gaze."""
    mechanisms = build_mechanisms((gaze, *company), AttentionDims(4, 2, 8), jax.random.key(0))
    codes = mask_codes(mechanisms, info, info, causal_codes(info))
    every = jnp.broadcast_to(jnp.arange(T), (2, T))
    summary = mechanisms[0].summarise(x, info.region, 16)
    keys = remember(mechanisms, x)._replace(summary=summary)
    found = attend(x, keys, codes, info, info, mechanisms, queries=every, regions=16, implementation="xla")
    return found.out, found.attention, codes


FAST = {("cca", "frame+routed"), ("after", "dense")}
BEGINS = ((PARTS[0][0], PARTS[0][1][1:]), (PARTS[1][0], PARTS[1][1][1:]))
"""Two documents begin with a picture, so that their first token is in a region."""


@pytest.mark.parametrize(
    ("name", "visual_queries"),
    [
        pytest.param(name, who, marks=[pytest.mark.slow] * ((name, who) not in FAST))
        for name in COMPANY
        for who in ("dense", "frame+routed")
    ],
)
def test_beside_what_reorders_or_reweighs_it_is_the_dense_formula(name: str, visual_queries) -> None:
    """Query by query in loops: text chooses two of the regions that it sees whole, the mask decides the rest."""
    given, x = rows(order="region", parts=BEGINS), features(rows=2, length=T)
    config = gaze(visual_queries=visual_queries)
    found = beside(config, COMPANY[name], x, given.info)
    out, weights = map(np.asarray, found[:2])
    lo, hi, order, _, _ = map(np.asarray, found[2])
    info = jax.tree.map(np.asarray, given.info)
    gammas = dict(zip((0, 2), (5.0, 0.3), strict=True)) if name == "after" else {}
    for b, t in np.ndindex(2, T):
        if not info.document[b, t]:
            assert not weights[b, t].any()
            continue
        seen = (lo[b, t] <= order[b]) & (order[b] <= hi[b, t])
        regions = [np.flatnonzero(info.region[b] == n) for n in range(1, info.region[b].max() + 1)]
        if info.image[b, t] and visual_queries == "dense":
            able = []
        elif info.image[b, t]:
            own = [info.document[b] == info.document[b, t], info.offset[b] < info.offset[b, t]]
            ahead = np.logical_and.reduce(own) & (
                (info.image[b] != info.image[b, t]) | (info.frame[b] < info.frame[b, t])
            )
            able = [keys for keys in regions if ahead[keys].all()]
        else:
            able = [keys for keys in regions if seen[keys].all()]
        for head in range(4):
            q, k, v = (np.float64(y)[b] for y in (x.q[:, t, head], x.k[:, :, head // 2], x.v[:, :, head // 2]))
            ranked = sorted(able, key=lambda keys, q=q, k=k: -q @ k[keys].mean(0))
            open_ = seen.copy()
            for keys in ranked[2:]:
                open_[keys] = False
            row = np.where(open_, np.exp(k @ q / 8**0.5), 0.0)
            first = (info.document[b] == info.document[b, t]) & (info.offset[b] == 0)
            row = np.where(first, row * gammas.get(head, 1.0), row)
            np.testing.assert_allclose(weights[b, t, head], row / row.sum(), atol=2e-5)
            np.testing.assert_allclose(out[b, t, head], row / row.sum() @ v, atol=2e-5)
