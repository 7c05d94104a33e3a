"""What is read of pictures, counted: the authors' own examples, and every query by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from rave_jax.attention import Gaze
from rave_jax.batch import Kind, TokenInfo
from rave_jax.data.layout import lay_out
from rave_jax.data.patches import empty_patches
from rave_jax.data.sample import Example
from rave_jax.evaluation.accounting import Reading, account, mean_reading
from rave_jax.families.config import DeltaConfig, TextConfig
from rave_jax.families.qwen2_5_vl.presets import qwen2_5_vl_7b
from rave_jax.layout import AdaptiveRegions, ContextTokens, FixedRegions, VisualLayout
from rave_jax.models.config import ModelOptions
from rave_jax.models.vlm import Vlm

QWEN3_4B = TextConfig(num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128, hidden_size=2560)
PER_ENTRY = 589_824
"""FLOPs of an entry and decode step in Qwen3-4B: 4 x 36 layers x 32 heads x 128."""


def prompt(grids: list[tuple[int, int, int]], options: ModelOptions, text: int = 3) -> TokenInfo:
    """Text, and behind each picture (or video) text again, laid out for the options."""
    parts: list[dict[str, Any]] = [{"kind": Kind.TEXT}] * text
    for number, (t, h, w) in enumerate(grids, 1):
        shape = {"kind": Kind.VISUAL, "image": number, "grid_t": t, "grid_h": h, "grid_w": w}
        places = [(f, r, c) for f in range(t) for r in range(h) for c in range(w)]
        parts += [shape | {"frame": f, "row": r, "col": c} for f, r, c in places]
        parts += [{"kind": Kind.TEXT}] * text
    T = len(parts)
    codes: dict[str, Any] = {
        name: np.array([int(part.get(name, 0)) for part in parts], np.int32) for name in TokenInfo._fields
    }
    codes |= {"document": np.ones(T, np.int32), "offset": np.arange(T, dtype=np.int32)}
    zero = np.zeros(T, np.int32)
    positions = np.tile(np.arange(T, dtype=np.int32), (3, 1))
    info = TokenInfo(**codes)
    example = Example(zero, zero.astype(np.float32), info, positions, zero, empty_patches((0,), 0))
    layout: VisualLayout = options.layout
    return lay_out(example, layout).info


def reading(grids: list[tuple[int, int, int]], text: TextConfig, options: ModelOptions) -> Reading:
    found = account(prompt(grids, options), text, options)
    assert found is not None
    return found


def test_eight_frames_are_the_authors_752_entries_of_4608() -> None:
    gaze = Gaze(regions=FixedRegions(6, 6, 1), max_regions=128, top_k=20)
    found = reading([(8, 24, 24)], QWEN3_4B, ModelOptions(mechanisms=(gaze,), context=ContextTokens(4)))
    assert (found.visual, found.entries, found.most) == (4608, 752, 752)
    assert round(found.share, 3) == 0.163
    assert found.attention == 20 * 36 * PER_ENTRY and found.context == 32 * PER_ENTRY
    assert found.routing == 128 * PER_ENTRY / 2, "a descriptor costs a query one product, an entry two"
    assert found.dense_attention == 4608 * PER_ENTRY
    assert found.dense_bytes == 4608 * 147_456, "Qwen3-4B keeps 147,456 bytes of a token"


def test_the_authors_flops_are_those_of_qwen3_4b_over_64_frames_of_144_tokens() -> None:
    """5.52 GFLOPs before, 0.89 + 0.19 + 0.15 after. Their video is our guess (64 frames of 12 x 12 tokens and four
    context tokens each, which explains dense and context); so are their regions, and none of these explains 0.19."""
    context = ContextTokens(4)
    plain = reading([(64, 12, 12)], QWEN3_4B, ModelOptions())
    assert plain.dense_attention == pytest.approx(5.52e9, rel=0.02), "text makes up the rest"
    for side, routing in ((3, 0.30), (4, 0.17), (6, 0.08)):
        gaze = Gaze(regions=FixedRegions(side, side), max_regions=1024, top_k=9 * 150 // side**2)
        found = reading([(64, 12, 12)], QWEN3_4B, ModelOptions(mechanisms=(gaze,), context=context))
        assert round(found.context / 1e9, 2) == 0.15
        assert round(found.routing / 1e9, 2) == routing
        assert found.attention < 0.89e9, "that many entries and text"


def test_plain_attention_reads_every_visual_token_and_context_adds_its_own() -> None:
    text = TextConfig(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)
    plain = reading([(1, 4, 4)], text, ModelOptions())
    assert (plain.entries, plain.most, plain.share) == (16, 16, 1.0)
    assert plain.attention == plain.dense_attention == 4 * 4 * 8 * 3 * 16 and plain.routing == plain.context == 0
    assert plain.bytes == plain.dense_bytes == 2 * 2 * 8 * 2 * 3 * 16
    more = reading([(1, 4, 4)], text, ModelOptions(context=ContextTokens(2)))
    assert (more.entries, more.most) == (18, 18) and more.context == 4 * 4 * 8 * 3 * 2
    assert more.dense_attention == plain.attention


def test_layers_that_do_not_attend_read_nothing() -> None:
    text = TextConfig(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)
    delta = DeltaConfig(layers=(0, 2), key_heads=2, value_heads=2, key_dim=8, value_dim=8)
    gaze = ModelOptions((Gaze(FixedRegions(2, 2), 16, top_k=1),))
    for options in (ModelOptions(), gaze):
        found = reading([(1, 4, 4)], dataclasses.replace(text, delta=delta), options)
        assert found == reading([(1, 4, 4)], dataclasses.replace(text, num_layers=1), options)


def test_ragged_regions_are_counted_by_their_sizes_and_read_with_their_padding() -> None:
    """A 3 x 5 grid in regions of 2 x 2 has sizes 4, 4, 2, 2, 2, 1."""
    text = TextConfig(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8)
    gaze = Gaze(regions=FixedRegions(2, 2), max_regions=8, top_k=3)
    found = reading([(1, 3, 5)], text, ModelOptions(mechanisms=(gaze,)))
    assert found.entries == pytest.approx(3 * 15 / 6) and found.most == 4 + 4 + 2
    key_and_value = 2 * 8 * 2
    descriptors = 4 * 8 * 2 * 6
    assert found.bytes == key_and_value * 2 * 6 * 4 + descriptors, "two query heads may want three blocks each"
    few = dataclasses.replace(gaze, top_k=2)
    found = reading([(1, 3, 5)], text, ModelOptions(mechanisms=(few,)))
    assert found.bytes == key_and_value * 2 * 4 * 4 + descriptors
    shared = dataclasses.replace(gaze, share="group")
    found = reading([(1, 3, 5)], text, ModelOptions(mechanisms=(shared,)))
    assert found.bytes == key_and_value * 2 * 3 * 4 + descriptors
    for reads_all in (dataclasses.replace(few, choice="soft_bias"), dataclasses.replace(few, descriptor="oracle")):
        found = reading([(1, 3, 5)], text, ModelOptions(mechanisms=(reads_all,)))
        assert found.bytes >= found.dense_bytes == key_and_value * 2 * 15, "decoding gathers nothing"


def test_other_regions_of_a_layer_are_counted_by_their_own_sizes_and_all_keys_are_read() -> None:
    """A 3 x 5 grid in regions of 3 x 2 has sizes 6, 6, 3."""
    text = TextConfig(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
    first, second = Gaze(FixedRegions(2, 2), 8, top_k=8, layers=(0,)), Gaze(FixedRegions(3, 2), 8, top_k=2, layers=(1,))
    found = reading([(1, 3, 5)], text, ModelOptions((first, second)))
    assert found.entries == (15 + 2 * 15 / 3) / 2 and found.most == 15
    alone = reading([(1, 3, 5)], text, ModelOptions((dataclasses.replace(first, layers=(0, 1)),)))
    assert found.bytes == alone.bytes / 2 + 2 * 8 * 2 * 2 * 15


def test_queries_between_pictures_choose_among_those_before_them() -> None:
    text = TextConfig(num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4)
    gaze = Gaze(regions=FixedRegions(2, 2), max_regions=8, top_k=0.5, layers=(1,))
    found = reading([(1, 4, 4), (1, 2, 2)], text, ModelOptions(mechanisms=(gaze,)))
    # Three queries see 16 tokens in 4 regions, three see 20 in 5: 2 and 3 regions of 4, and all in layer 0.
    assert found.visual == 18
    assert found.entries == pytest.approx((18 + (8 + 12) / 2) / 2) and found.most == 20
    assert found.routing == 2 * 2 * 4 * 4.5


def test_descriptors_cost_by_their_width_and_the_oracle_all_scores() -> None:
    text = TextConfig(num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4)
    costs = {}
    for name in ("mean", "min_max", "oracle"):
        gaze = Gaze(regions=AdaptiveRegions(2, 2, tokens=9), max_regions=4, top_k=1, descriptor=name)
        costs[name] = reading([(1, 6, 6)], text, ModelOptions(mechanisms=(gaze,))).routing
    assert costs == {"mean": 2 * 2 * 4 * 4, "min_max": 2 * 2 * 8 * 4, "oracle": 2 * 2 * 4 * 36}


def test_the_figures_of_the_page_on_empty_slots_come_out() -> None:
    """docs/gaze.md: bytes that a small picture's adaptive regions read, and what caches of Qwen2.5-VL 7B take."""
    config = qwen2_5_vl_7b()
    adaptive = ModelOptions((Gaze(AdaptiveRegions(), 16, top_k=0.25, share="group"),), compute_dtype="bfloat16")
    found = reading([(1, 16, 16)], config.text, adaptive)
    assert found.bytes / found.dense_bytes == pytest.approx(2.3, abs=0.05)

    def mebibytes(slots: int, *mechanisms: Gaze) -> int:
        options = ModelOptions(mechanisms, compute_dtype="bfloat16")
        vlm = jax.eval_shape(lambda key: Vlm(config, options, key=key), jax.random.key(0))
        return round(jax.eval_shape(lambda vlm: vlm.empty_cache(1, slots), vlm).nbytes / 2**20)

    assert (mebibytes(4096), mebibytes(4096, Gaze())) == (224, 743)
    assert mebibytes(1024, Gaze(FixedRegions(8, 8), max_regions=64)) == 284


def test_text_alone_reads_nothing() -> None:
    assert account(prompt([], ModelOptions()), TextConfig(), ModelOptions()) is None
    assert mean_reading([]) is None


def test_means_over_prompts_keep_the_greatest() -> None:
    text, options = TextConfig(), ModelOptions()
    small, large = reading([(1, 2, 2)], text, options), reading([(1, 4, 4)], text, options)
    both = mean_reading([small, large])
    assert both is not None and (both.visual, both.most) == (10, 16)
    assert "16" in both.sentence() and "100.0%" in both.sentence()
