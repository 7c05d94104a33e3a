"""The choice of a token against the definitions of its rules, written out in numpy."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import settings as budget
from hypothesis import strategies as st

from rave_jax.config import ConfigError, dumps, field_docs, loads
from rave_jax.inference.sampling import RowSampling, Sampling, choose, filtered

V = 37
EDGE = 1e-4
choose_jit, filtered_jit = jax.jit(choose), jax.jit(filtered)

settings = st.builds(
    Sampling,
    temperature=st.just(0.0) | st.floats(0.05, 5),
    top_k=st.just(0) | st.integers(1, V + 5),
    top_p=st.just(1.0) | st.floats(0.01, 1),
    min_p=st.just(0.0) | st.floats(0, 1),
    repetition_penalty=st.just(1.0) | st.floats(0.5, 2),
    seed=st.integers(0, 2**32 - 1),
)
batches = st.lists(settings, min_size=4, max_size=4)
keys = st.integers(0, 2**31)


def made(number: int, rows: int = 4, size: int = V) -> tuple[np.ndarray, np.ndarray]:
    """Logits [rows, size] and which tokens were seen."""
    rng = np.random.default_rng(number)
    return rng.normal(size=(rows, size)).astype(np.float32) * 3, rng.random((rows, size)) < 0.3


def penalised(row: np.ndarray, seen: np.ndarray, s: Sampling) -> np.ndarray:
    row = row.astype(np.float64)
    return np.where(seen, np.where(row > 0, row / s.repetition_penalty, row * s.repetition_penalty), row)


def oracle(row: np.ndarray, seen: np.ndarray, s: Sampling) -> tuple[np.ndarray, float]:
    """Filtered logits of one row, and how far the nearest token is from being decided the other way."""
    row = penalised(row, seen, s)
    if s.temperature == 0:
        return row, np.inf
    row = row / s.temperature
    order = list(np.argsort(-row))
    margin = -np.diff(row[order]).min()
    if s.top_k:
        order = order[: s.top_k]
    if s.top_p < 1:
        chances = np.exp(row[order] - row[order[0]])
        together = np.cumsum(chances / chances.sum())
        # The fewest tokens whose chances sum to top_p. (All of them sum to 1, whatever rounding says.)
        margin = min([margin, *np.abs(together[:-1] - s.top_p)])
        order = order[: 1 + sum(together[:-1] < s.top_p)]
    if s.min_p:
        ratio = np.exp(row[order] - row[order[0]])
        margin = min([margin, *np.abs(ratio[1:] - s.min_p)])
        order = [order[0], *(i for i, r in zip(order[1:], ratio[1:], strict=True) if r >= s.min_p)]
    kept = np.full_like(row, -np.inf)
    kept[order] = row[order]
    return kept, margin


def draw(logits, rows: list[Sampling], seen, counts) -> list[int]:
    counts = jnp.asarray(counts, jnp.int32)
    return np.asarray(choose_jit(jnp.asarray(logits), RowSampling.of(rows), jnp.asarray(seen), counts)).tolist()


@budget(max_examples=100)
@given(batches, keys)
def test_what_is_cut_is_what_the_definitions_cut(rows: list[Sampling], number: int) -> None:
    logits, seen = made(number)
    wanted, margins = zip(*[oracle(*given) for given in zip(logits, seen, rows, strict=True)], strict=True)
    assume(min(margins) > EDGE)
    ours = np.asarray(filtered_jit(logits, RowSampling.of(rows), seen))
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, np.stack(wanted), rtol=1e-5, atol=1e-5)


@given(batches, keys, st.integers(0, 1000))
def test_a_choice_is_of_its_own_row_alone(rows: list[Sampling], number: int, count: int) -> None:
    """Together, alone, and in another slot."""
    logits, seen = made(number)
    counts = count + np.arange(4)
    together = draw(logits, rows, seen, counts)
    alone = [draw(logits[i, None], [rows[i]], seen[i, None], [counts[i]])[0] for i in range(4)]
    assert together == alone
    turned = [2, 0, 3, 1]
    other = draw(logits[turned], [rows[i] for i in turned], seen[turned], counts[turned])
    assert other == [together[i] for i in turned]
    kept = np.asarray(filtered_jit(logits, RowSampling.of(rows), seen))
    assert np.isfinite(kept[np.arange(4), together]).all(), "a token that was cut"


@given(keys, st.floats(0.5, 2), st.integers(0, 5), st.floats(0.1, 1))
def test_greedy_is_the_most_likely_after_the_penalty(number: int, penalty: float, top_k: int, top_p: float) -> None:
    """The other settings do nothing, nor does a row beside it that is sampled."""
    logits, seen = made(number)
    row = Sampling(repetition_penalty=penalty)
    ours = draw(logits, [row, replace(row, top_k=top_k, top_p=top_p, min_p=0.5), row, Sampling(1, 2.0)], seen, [0] * 4)
    assert ours[:3] == [int(np.argmax(penalised(logits[i], seen[i], row))) for i in range(3)]


def test_a_seed_gives_the_same_again_and_each_count_another() -> None:
    flat = np.zeros((64, V), np.float32)
    seen = np.zeros_like(flat, bool)
    row = Sampling(temperature=1.0, seed=7)
    by_count = draw(flat, [row] * 64, seen, range(64))
    assert by_count == draw(flat, [row] * 64, seen, range(64))
    by_seed = draw(flat, [replace(row, seed=2**32 - 1 - n) for n in range(64)], seen, [0] * 64)
    halves = draw(flat, [replace(row, seed=2**31 - 1 - n) for n in range(64)], seen, [0] * 64)
    assert len(set(by_count)) > 25 and len(set(by_seed)) > 25
    assert by_count != by_seed and by_seed != halves


@pytest.mark.parametrize("by", ["count", "seed"])
@pytest.mark.parametrize(
    "settings", [Sampling(temperature=1.0), Sampling(temperature=1.7, top_k=6, top_p=0.9, min_p=0.05)], ids=str
)
def test_how_often_is_how_likely(by: str, settings: Sampling) -> None:
    n = 8192
    logits = np.tile(made(3, 1, 10)[0] / 4, (n, 1))
    seen = np.zeros_like(logits, bool)
    counts = np.arange(n) if by == "count" else np.zeros(n, int)
    rows = [replace(settings, seed=i) for i in range(n)] if by == "seed" else [settings] * n
    drawn = np.bincount(draw(logits, rows, seen, counts), minlength=10)
    kept, _ = oracle(logits[0], seen[0], settings)
    wanted = n * np.exp(kept) / np.exp(kept).sum()
    real = wanted > 0
    assert wanted[real].min() > 5 and drawn[~real].sum() == 0
    # 9 degrees of freedom at most: one fair draw in 100,000 is beyond 40.
    assert np.sum((drawn - wanted)[real] ** 2 / wanted[real]) < 40


def test_one_token_always_stays_and_equals_stay_together() -> None:
    """Also where the logits would overflow, and where a mask has taken all but one."""
    hard = {"top_k": 1, "top_p": 1e-30, "min_p": 1.0}
    rows = [Sampling(temperature=t, **hard) for t in (1e-4, 1.0, 1e4, 1.0)]
    logits = np.array([[1e4, -1e4, 3, 0], [1, 2, 2, 0], [-1e4, 1e4, 3, 0], [-np.inf, -np.inf, -5, -np.inf]], np.float32)
    kept = np.asarray(filtered(jnp.asarray(logits), RowSampling.of(rows), jnp.zeros(logits.shape, bool)))
    assert [np.flatnonzero(np.isfinite(row)).tolist() for row in kept] == [[0], [1, 2], [1], [2]]
    chosen = draw(logits, rows, np.zeros(logits.shape, bool), [0] * 4)
    assert chosen[0] == 0 and chosen[1] in (1, 2) and chosen[2:] == [1, 2]


def test_half_precision_is_computed_in_float32() -> None:
    logits, seen = made(1)
    half = jnp.asarray(logits, jnp.bfloat16)
    rows = RowSampling.of([Sampling(temperature=0.7, top_k=9, repetition_penalty=1.3)] * 4)
    np.testing.assert_array_equal(filtered(half, rows, seen), filtered(half.astype(jnp.float32), rows, seen))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_new_tokens", (0, -1, 1.5, True, None)),
        ("temperature", (-0.1, 1e-5, 1e5, float("nan"), float("inf"), "1", None, True)),
        ("top_k", (-1, 2**31, 1.0, float("nan"))),
        ("top_p", (0.0, -0.5, 1.01, float("nan"), "1")),
        ("min_p", (-0.1, 1.1, float("nan"))),
        ("repetition_penalty", (0.0, -1.0, float("nan"), float("inf"))),
        ("seed", (-1, 2**32, 0.5)),
        ("stop", ("end", ("end", ""), ["end"], (1,))),
        ("stop_ids", (3, (-1,), (0.5,), [3], (True,))),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, values: tuple) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"^{field} is "):
            Sampling(**{field: value})


def test_settings_are_a_config() -> None:
    full = Sampling(5, 1, 3, 0.5, 0.1, 1.1, 2**32 - 1, ("a", "b"), (3, 4))
    assert loads(Sampling, dumps(full)) == full
    assert set(field_docs(Sampling)) == set(Sampling.__dataclass_fields__)
    rows = RowSampling.of([full, Sampling()])
    assert [str(a.dtype) for a in rows] == ["float32", "int32", "float32", "float32", "float32", "uint32"]
    assert rows.seed.tolist() == [2**32 - 1, 0] and RowSampling.of([]).top_k.shape == (0,)
