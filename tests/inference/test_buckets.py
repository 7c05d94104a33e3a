"""Sizes of slots and the buckets that programs are compiled for."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_jax.config import ConfigError
from rave_jax.families.config import PatchSizes
from rave_jax.inference import SlotConfig
from rave_jax.inference.buckets import Buckets
from rave_jax.layout import FixedRegions, VisualLayout


@pytest.mark.parametrize(
    "field",
    [
        "slots",
        "max_length",
        "chunk",
        "smallest",
        "patches",
        "prefill_rows",
        "decode_steps",
        "max_prompt",
    ],
)
def test_sizes_that_make_no_slots_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        SlotConfig(**{field: 0})
    with pytest.raises(ConfigError, match="prefill_rows"):
        SlotConfig(slots=2, prefill_rows=3)
    with pytest.raises(ConfigError, match="max_patches"):
        SlotConfig(max_patches=-1)


def test_a_limit_of_time_is_a_number_of_seconds() -> None:
    for limit in (-1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="request_timeout"):
            SlotConfig(request_timeout=limit)


@given(st.integers(2, 5000), st.integers(1, 700), st.integers(1, 200))
def test_buckets_hold_whatever_fits(max_length: int, chunk: int, smallest: int) -> None:
    config = SlotConfig(max_length=max_length, chunk=chunk, smallest=smallest)
    sizes = PatchSizes(1, 4, 64)
    buckets = Buckets(config, sizes, VisualLayout())
    reaches = buckets.reaches
    assert list(reaches) == sorted(set(reaches)) and max_length <= buckets.size < max_length + buckets.chunk
    most = max(2, max_length // 3)
    beside = Buckets(dataclasses.replace(config, max_text=most), sizes, VisualLayout(FixedRegions(2, 2), 9))
    assert beside.lengths == reaches and most <= beside.size < most + beside.chunk
    assert all(length <= beside.reach(length) for length in (0, 1, most))
    for length in (1, max_length // 3 + 1, max_length - 1, max_length):
        assert length <= buckets.reach(length)
        assert buckets.tower(4 * length) >= 4 * length
        # The chunks of a prompt: each program reaches to the end of its own, padding too.
        size = buckets.chunk_of(length)
        assert all(buckets.reach(start + size) >= start + size for start in range(0, length, size))
