"""LogN scaling: the released code's factor on queries, by the place in the document, beside whatever else is added."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax import attention as at
from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import ConfigError
from tests.attention.packed import DIMS, KEY, ROWS, attend, everything, features, info_of

LOG_N = at.LogN(length=3)


def stated(x: at.Features, info: TokenInfo) -> at.Features:
    """Features whose queries are multiplied: log of the place, counted from 1, to the base of the trained length."""
    place = np.asarray(info.offset) + 1
    factor = np.where(place > 3, np.log(place) / np.log(3), 1.0).astype(np.float32)
    return x._replace(q=x.q * factor[..., None, None])


def test_it_is_the_stated_factor_with_its_gradients() -> None:
    x, info = features(), info_of(*ROWS)
    ct = features(1).q
    plain = everything((), stated(x, info), info, ct, "reference")
    for which in ("reference", "xla"):
        found = everything((LOG_N,), x, info, ct, which)
        for a, b in zip(found[:2], plain[:2], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
        wanted = stated(plain[2], info)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found[2], wanted)


def test_documents_of_the_trained_length_change_no_bit() -> None:
    x, info = features(), info_of(*ROWS)
    mechanisms = at.build_mechanisms((at.LogN(length=8),), DIMS, KEY)
    found, plain = (jax.jit(lambda x, m=m: attend(x, info, m).out)(x) for m in (mechanisms, []))
    np.testing.assert_array_equal(found, plain)


def test_a_packed_row_equals_its_documents_alone() -> None:
    x = features()
    packed = everything((LOG_N,), x, info_of(*ROWS), x.q)[0]
    for b, documents in enumerate(ROWS):
        start = 0
        for document in documents:
            n = len(document)
            one = jax.tree.map(lambda a, b=b, s=start: np.roll(a[b : b + 1], -s, axis=1).repeat(2, axis=0), x)
            alone = everything((LOG_N,), one, info_of((document,), (document,)), x.q)[0]
            np.testing.assert_allclose(packed[b, start : start + n], alone[0, :n], atol=1e-6)
            start += n


@pytest.mark.slow
def test_terms_that_are_added_stay_and_another_query_grows_too() -> None:
    """Biases and channels do not grow with the scores; scales of several multiply."""
    x, info = features(), info_of(*ROWS)
    configs = (LOG_N, at.Rave(rank=2, start="random"), at.ZeroTuning(0.3), at.ZeroTuning(2.0, route="channel"))
    mechanisms = [*at.build_mechanisms((*configs, at.Decomposed()), DIMS, KEY)]
    both = jax.jit(lambda x: attend(x, info, mechanisms).out)(x)
    # The gate reads q before RoPE, and so does the other query: only the latter is multiplied.
    scaled = stated(x, info)
    gate = mechanisms[1].score(x, mechanisms[1].remember(x), info, info)
    other = at.Score(query=at.OtherQuery(stated(x._replace(q=x.q0), info).q, info.kind == Kind.VISUAL))
    mechanisms[1].score, mechanisms[4].score = (lambda *_, said=said: said for said in (gate, other))
    np.testing.assert_allclose(both, jax.jit(lambda x: attend(x, info, mechanisms[1:]).out)(scaled), atol=1e-5)
    twice = at.build_mechanisms((LOG_N, LOG_N), DIMS, KEY)
    found, plain = (
        jax.jit(lambda x, m=m: attend(x, info, m).out)(y) for m, y in ((twice, x), ([], stated(scaled, info)))
    )
    np.testing.assert_allclose(found, plain, atol=1e-5)


def test_a_length_that_has_no_logarithm_to_its_base_is_refused() -> None:
    with pytest.raises(ConfigError, match="length is 1, expected a number of tokens from 2"):
        at.LogN(length=1)
    assert jnp.isfinite(LOG_N.build(DIMS, KEY).score(features(), None, info_of(), info_of()).scale).all()
