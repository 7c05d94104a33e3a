"""A constant bias on visual keys: the stated formula with its gradients, nothing at 0, packed as alone."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from rave_jax import attention as at
from rave_jax.batch import Kind
from rave_jax.config import ConfigError
from tests.attention.packed import DIMS, KEY, ROWS, dense_map, everything, features, info_of, normalised, outputs

BIAS = at.VisualBias(0.7)


def test_visual_keys_weigh_the_stated_multiple() -> None:
    x, info = features(), info_of(*ROWS)
    out, rows, _ = everything((BIAS,), x, info, x.q, "xla")
    visual = np.asarray(info.kind == Kind.VISUAL)[:, None, None]
    wanted = normalised(dense_map((), x, info) * np.where(visual, math.exp(0.7), 1.0))
    np.testing.assert_allclose(rows, wanted, atol=1e-5)
    np.testing.assert_allclose(out, outputs(wanted, x), atol=1e-5)


def test_its_gradients_are_those_of_the_oracle() -> None:
    x, info, ct = features(), info_of(*ROWS), features(1).q
    found, oracle = (everything((BIAS,), x, info, ct, which) for which in ("xla", "reference"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found[2], oracle[2])


def test_no_bias_asks_for_nothing() -> None:
    (none,) = at.build_mechanisms((at.VisualBias(),), DIMS, KEY)
    x, info = features(), info_of(*ROWS)
    assert none.score(x, None, info, info) is None


def test_a_packed_row_equals_its_documents_alone() -> None:
    x = features()
    packed = everything((BIAS,), x, info_of(*ROWS), x.q)[0]
    for b, documents in enumerate(ROWS):
        start = 0
        for document in documents:
            n = len(document)
            one = jax.tree.map(lambda a, b=b, s=start: np.roll(a[b : b + 1], -s, axis=1).repeat(2, axis=0), x)
            alone = everything((BIAS,), one, info_of((document,), (document,)), x.q)[0]
            np.testing.assert_allclose(packed[b, start : start + n], alone[0, :n], atol=1e-6)
            start += n


def test_a_bias_that_no_score_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bias is 1000000.0, expected a number of logits from -10,000"):
        at.VisualBias(1e6)
