"""BiFormer against its formula: the mean queries of regions, in loops, under the mask and as in the paper."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.attention import (
    BiFormer,
    Croc,
    Features,
    MechanismConfig,
    attend,
    build_mechanisms,
    causal_codes,
    mask_codes,
    remember,
)
from rave_jax.batch import TokenInfo
from rave_jax.config import ConfigError
from tests.attention.packed import DIMS, KEY, features
from tests.attention.test_gaze import LAYOUT, T, rows

CONFIG = BiFormer(LAYOUT, 16, top_k=2)
X = features(rows=2, length=T)


@functools.partial(jax.jit, static_argnames="configs")
def layer(configs: tuple[MechanismConfig, ...], x: Features, info: TokenInfo) -> Any:
    """Output, map and mask codes of a layer."""
    mechanisms = build_mechanisms(configs, DIMS, KEY)
    codes = mask_codes(mechanisms, info, info, causal_codes(info))
    keys = remember(mechanisms, x)
    if configs and isinstance(configs[0], BiFormer):
        keys = keys._replace(summary=mechanisms[0].summarise(x, info.region, 16))
    every = jnp.broadcast_to(jnp.arange(T), (2, T))
    found = attend(x, keys, codes, info, info, mechanisms, queries=every, regions=16)
    return found.out, found.attention, codes


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("config", "company"),
    [
        (CONFIG, ()),
        pytest.param(CONFIG, (Croc(),), marks=SLOW),
        pytest.param(dataclasses.replace(CONFIG, text="dense"), (), marks=SLOW),
    ],
    ids=["causal", "both ways, as in the paper", "text reads all"],
)
def test_a_region_reads_the_best_by_mean_query_and_mean_key(
    config: BiFormer, company: tuple[MechanismConfig, ...]
) -> None:
    batch = rows(order="region")
    out, weights, codes = jax.tree.map(np.asarray, layer((config, *company), X, batch.info))
    info = jax.tree.map(np.asarray, batch.info)
    whole = 0
    for b, t in np.ndindex(2, T):
        if not info.document[b, t]:
            continue
        seen = (codes.lo[b, t] <= codes.order[b]) & (codes.order[b] <= codes.hi[b, t])
        mine = info.region[b] == info.region[b, t] if info.region[b, t] else np.arange(T) == t
        regions = [np.flatnonzero(info.region[b] == n) for n in range(1, info.region[b].max() + 1)]
        able = [keys for keys in regions if seen[keys].all() and (info.region[b, t] or config.text == "routed")]
        picture = [keys for keys in regions if info.image[b, keys[0]] == info.image[b, t]]
        whole += bool(company) and info.image[b, t] > 0 and all(seen[keys].all() for keys in picture)
        for head in range(4):
            q, k, v = np.float64(X.q)[b, :, head], np.float64(X.k)[b, :, head // 2], np.float64(X.v)[b, :, head // 2]
            ranked = sorted(able, key=lambda keys, q=q, k=k, mine=mine: -q[mine].mean(0) @ k[keys].mean(0))
            open_ = seen.copy()
            for keys in ranked[2:]:
                open_[keys] = False
            row = np.where(open_, np.exp(k @ q[t] / 8**0.5), 0.0)
            np.testing.assert_allclose(weights[b, t, head], row / row.sum(), atol=2e-5)
            np.testing.assert_allclose(out[b, t, head], row / row.sum() @ v, atol=2e-5)
    visual = int((info.region > 0).sum())
    assert whole == (visual if company else 0), "beside Croc a region chooses from all of its picture"


def test_all_regions_change_no_bit() -> None:
    info = rows().info
    found, plain = (layer(configs, X, info)[0] for configs in ((BiFormer(LAYOUT, 16, top_k=16),), ()))
    np.testing.assert_array_equal(found, plain)


def test_wrong_settings_are_refused() -> None:
    for field, wrong in (("top_k", 0), ("max_regions", 0)):
        with pytest.raises(ConfigError, match=f"^{field} is "):
            BiFormer(**{field: wrong})
