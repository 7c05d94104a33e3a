"""Regions and context tokens: who is in which region, where context tokens stand, and what moves with a token."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given

from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import ConfigError
from rave_jax.data.collate import BatchShape, check_fits, collate
from rave_jax.data.config import DataConfig
from rave_jax.data.layout import check_regions, lay_out, offsets_in_region, pictures, region_major
from rave_jax.data.pipeline import Pipeline
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Example, OverBudget
from rave_jax.data.sources import QaJsonl
from rave_jax.families.config import PatchSizes
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.layout import AdaptiveRegions, ContextTokens, FixedRegions, Grid, Regions, VisualLayout
from tests.data.pictures import noise
from tests.inference.prompts import example_of
from tests.models.layout import Visual, document

CONFIG = tiny(vocab_size=64)
assert CONFIG.vision is not None
MERGE = CONFIG.vision.merge_size
MANY = 10_000

side = st.integers(1, 6).map(lambda n: n * MERGE)
visuals = st.builds(lambda h, w: Visual(1, h, w), side, side) | st.builds(
    lambda t, h, w, s: Visual(t, h, w, video=True, seconds=s),
    st.integers(1, 3),
    side,
    side,
    st.sampled_from([0.4, 2.0]),
)
parts = st.lists(st.integers(1, 4) | visuals, min_size=1, max_size=4)
fixed = st.builds(FixedRegions, st.integers(1, 4), st.integers(1, 4), st.integers(1, 2))
adaptive = st.builds(AdaptiveRegions, st.integers(1, 4), st.integers(1, 4), st.integers(1, 2), st.just(MANY))
contexts = st.builds(ContextTokens, st.integers(1, 3), st.sampled_from(("frame", "image")))
layouts = st.builds(VisualLayout, fixed | adaptive, st.just(MANY), st.none() | contexts)


def example(some: list[int | Visual], context: ContextTokens | None = None) -> Example:
    """A document of text and pictures, by plain loops; half of its text is learned."""
    made = example_of(document(some, CONFIG, np.random.default_rng(0), context), CONFIG)
    text = made.info.kind == Kind.TEXT
    learned = np.where(text & (np.cumsum(text) % 2 == 0), 1, 0).astype(np.float32)
    return made._replace(loss_mask=learned, info=made.info._replace(document=np.ones_like(made.tokens)))


def grids_of(some: list[int | Visual]) -> list[Grid]:
    return [(part.t, part.h // MERGE, part.w // MERGE) for part in some if isinstance(part, Visual)]


def assert_same(one: Example, other: Example) -> None:
    for name in Example._fields:
        ours, theirs = getattr(one, name), getattr(other, name)
        pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
        for n, (a, b) in enumerate(pairs):
            assert a.dtype == b.dtype, name
            np.testing.assert_array_equal(a, b, err_msg=f"{name} {n}")


# Regions


@given(parts, layouts)
def test_regions_cover_every_visual_token_and_nothing_else(some: list, layout: VisualLayout) -> None:
    info = lay_out(example(some), layout).info
    np.testing.assert_array_equal(info.region > 0, info.kind == Kind.VISUAL)
    total = sum(layout.count_regions(grid) for grid in grids_of(some))
    assert set(info.region[info.region > 0]) == set(range(1, total + 1)), "no region is empty"
    assert layout.regions is not None
    assert np.bincount(info.region, minlength=2)[1:].max() <= layout.regions.tokens


def cuts(regions: Regions, grid: Grid) -> list[list[range]]:
    """Frames, rows and columns of the regions, as the words say: whole steps and what is left, or as even as can be."""
    if isinstance(regions, FixedRegions):
        steps = (regions.frames, regions.height, regions.width)
        return [
            [range(low, min(low + step, n)) for low in range(0, n, step)] for step, n in zip(steps, grid, strict=True)
        ]
    frames = [range(low, min(low + regions.frames, grid[0])) for low in range(0, grid[0], regions.frames)]
    even = [
        [range(-(-i * n // k), -(-(i + 1) * n // k)) for i in range(k)]
        for n, k in ((grid[1], min(regions.rows, grid[1])), (grid[2], min(regions.cols, grid[2])))
    ]
    return [frames, *even]


@given(parts, layouts)
def test_regions_are_boxes_numbered_by_frames_then_rows_then_columns(some: list, layout: VisualLayout) -> None:
    info = lay_out(example(some), layout).info
    assert layout.regions is not None
    number = 0
    for image, grid in enumerate(grids_of(some), start=1):
        frames, rows, cols = cuts(layout.regions, grid)
        assert layout.regions.shape(grid) == (len(frames), len(rows), len(cols))
        for box in ((t, r, c) for t in frames for r in rows for c in cols):
            number += 1
            mine = info.region == number
            found = set(zip(info.frame[mine], info.row[mine], info.col[mine], strict=True))
            assert found == {(t, r, c) for t in box[0] for r in box[1] for c in box[2]}
            assert set(info.image[mine]) == {image}
        if isinstance(layout.regions, AdaptiveRegions):
            for spans in (rows, cols):
                assert max(map(len, spans)) - min(map(len, spans)) <= 1


@given(parts, layouts)
def test_region_major_moves_tokens_within_their_picture_alone(some: list, layout: VisualLayout) -> None:
    raster = lay_out(example(some), layout)
    major = region_major(raster)
    places = major.info.offset
    np.testing.assert_array_equal(np.sort(places), raster.info.offset)
    moved = places != raster.info.offset
    assert not np.any(moved & (raster.info.image == 0))
    np.testing.assert_array_equal(major.info.image, raster.info.image)
    # By places everything is as it was: what is known of a token moved with it.
    back = np.argsort(places)
    assert_same(
        major._replace(
            tokens=major.tokens[back],
            loss_mask=major.loss_mask[back],
            info=TokenInfo(*(code[back] for code in major.info)),
            positions=major.positions[:, back],
            visual_index=major.visual_index[back],
        ),
        raster,
    )
    for span, _ in pictures(major.info):
        region, kind = major.info.region[span], major.info.kind[span]
        visual = kind == Kind.VISUAL
        assert np.all(np.diff(region[visual]) >= 0), "regions side by side, in order"
        assert np.all(np.diff(visual.astype(int)) <= 0), "context tokens behind them"
        for number in np.unique(region[visual]):
            assert np.all(np.diff(places[span][region == number]) > 0), "inside a region in order"
        assert np.all(np.diff(places[span][~visual]) > 0)


@given(st.lists(st.integers(0, 5), max_size=20))
def test_places_in_a_region_count_what_stands_before(region: list[int]) -> None:
    found = offsets_in_region(np.array(region, np.int32))
    assert found.tolist() == [region[:i].count(n) if n else 0 for i, n in enumerate(region)]


@given(st.lists(parts, min_size=1, max_size=3), layouts, st.booleans())
def test_packed_documents_number_their_regions_on(some: list, layout: VisualLayout, major: bool) -> None:
    examples = [lay_out(example(one), layout) for one in some]
    examples = [region_major(one) for one in examples] if major else examples
    tokens, patches = sum(len(one.tokens) for one in examples), sum(one.patches.length for one in examples)
    batch: Any = collate(
        [examples], BatchShape(1, tokens + 3, patches), PatchSizes(examples[0].patches.pixels.shape[1], MERGE**2)
    )
    start = images = regions = units = 0
    for one in examples:
        here = slice(start, start + len(one.tokens))
        info = one.info
        for name, code, before in (("region", info.region, regions), ("image", info.image, images)):
            np.testing.assert_array_equal(getattr(batch.info, name)[0, here], np.where(code > 0, code + before, 0))
        visual = info.kind == Kind.VISUAL
        np.testing.assert_array_equal(batch.visual_index[0, here], np.where(visual, one.visual_index + units, 0))
        for name in ("offset", "kind", "row", "col", "frame", "grid_t"):
            np.testing.assert_array_equal(getattr(batch.info, name)[0, here], getattr(info, name))
        np.testing.assert_array_equal(batch.loss_weights[0, here][:-1], one.loss_mask[1:])
        start, images = here.stop, images + int(info.image.max(initial=0))
        regions, units = regions + int(info.region.max(initial=0)), units + one.patches.length // MERGE**2
    assert not any(code[0, start:].any() for code in batch.info)


def test_over_budget_names_the_field() -> None:
    one = example([Visual(1, 8, 12), 2, Visual(1, 4, 4)])  # 4 x 6 and 2 x 2 tokens
    layout = VisualLayout(FixedRegions(2, 2), max_regions=7)
    assert lay_out(one, layout).info.region.max() == 7
    with pytest.raises(OverBudget, match="7 regions, over the budget of max_regions 6"):
        lay_out(one, dataclasses.replace(layout, max_regions=6))
    with pytest.raises(OverBudget, match="s: 7 regions, over the budget of max_regions 3"):
        check_regions(lay_out(one, layout), 3, "s")
    few = VisualLayout(AdaptiveRegions(2, 2, tokens=5), max_regions=7)
    with pytest.raises(OverBudget, match=r"regions of 6 tokens, over the budget of regions\.tokens 5"):
        lay_out(one, few)


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (FixedRegions, "height"),
        (FixedRegions, "frames"),
        (AdaptiveRegions, "rows"),
        (AdaptiveRegions, "tokens"),
        (ContextTokens, "count"),
    ],
)
def test_sizes_of_nothing_are_refused(kind: type, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        kind(**{field: 0})


# Context tokens


@given(parts, contexts)
def test_context_tokens_stand_where_the_plain_loop_puts_them(some: list, context: ContextTokens) -> None:
    """Tokens, codes and positions are those of a document that is written with them."""
    wanted, plain = example(some, context), example(some)
    found = lay_out(plain, VisualLayout(context=context))
    assert_same(found, wanted)
    extra = sum(VisualLayout(context=context).extra_tokens(grid) for grid in grids_of(some))
    assert len(found.tokens) - len(plain.tokens) == extra == np.sum(found.info.kind == Kind.CONTEXT)
    assert (
        not np.any(found.loss_mask[found.info.kind == Kind.CONTEXT]) and found.loss_mask.sum() == plain.loss_mask.sum()
    )


@given(parts, contexts)
def test_positions_are_unique_and_before_the_text_that_follows(some: list, context: ContextTokens) -> None:
    assume(all(isinstance(part, int) or not part.video or part.seconds >= 1 for part in some))  # frames of one time
    made = lay_out(example(some), VisualLayout(context=context))
    assert len(set(map(tuple, made.positions.T))) == len(made.tokens)
    height = made.positions[1:]
    for span, _ in pictures(made.info):
        here = made.info.kind[span] == Kind.CONTEXT
        own = height[:, span]
        assert own[:, here].min() > own[:, ~here].max()
        assert np.all(height[:, span.stop :] > own.max())


def test_lay_out_without_wishes_changes_nothing() -> None:
    one = example([2, Visual(1, 4, 4), 3])
    assert lay_out(one, VisualLayout()) is one
    text = example([5])
    assert_same(lay_out(text, VisualLayout(FixedRegions(), 0, ContextTokens())), text)


def test_budgets_count_context_tokens(processor: Processor) -> None:
    layout = VisualLayout(context=ContextTokens(3))
    wider = Processor(processor.tokenizer, processor.rules, processor.chat._template, layout)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": noise(16, 24)}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "no"},
    ]
    plain, made = processor.encode(messages), wider.encode(messages)
    assert len(made.tokens) == len(plain.tokens) + 3
    assert wider.count_tokens(16, 24) == processor.count_tokens(16, 24) + 3 == np.sum(made.info.image > 0)
    assert processor.decode(made.tokens[made.loss_mask > 0]) == processor.decode(plain.tokens[plain.loss_mask > 0])
    placeholder = made.tokens[made.info.kind == Kind.CONTEXT]
    assert set(placeholder) == {processor.rules.image_token_id}
    check_fits(plain, len(plain.tokens), plain.patches.length, "plain")
    with pytest.raises(OverBudget, match=f"wider: {len(made.tokens)} tokens"):
        check_fits(made, len(plain.tokens), made.patches.length, "wider")


def test_the_pipeline_gives_rows_region_by_region(processor: Processor, qa_folder: Any) -> None:
    layout = VisualLayout(FixedRegions(1, 2), max_regions=24, context=ContextTokens(2))
    wider = Processor(processor.tokenizer, processor.rules, processor.chat._template, layout)
    good = (qa_folder / "qa.jsonl").read_text().splitlines()[:3]
    (qa_folder / "good.jsonl").write_text("\n".join(good))
    source = QaJsonl(path=str(qa_folder / "good.jsonl"), image_dir=str(qa_folder))
    config = DataConfig(sources=(source,), rows=2, tokens=256, patches=192, documents_per_row=2, prefetch=0)
    batch: Any = Pipeline(config, wider).rows(0, 0, 2)
    for row in range(2):
        region = batch.info.region[row]
        assert np.all(np.diff(region[region > 0]) >= 0) and 0 < region.max() <= layout.max_regions
        assert np.sum(batch.info.kind[row] == Kind.CONTEXT) == 4
        assert np.any(np.diff(batch.info.offset[row]) < 0), "not in raster order"
    # A document may have its share of a row's regions, as of its tokens.
    few = dataclasses.replace(layout, max_regions=10)
    fewer = Processor(processor.tokenizer, processor.rules, processor.chat._template, few)
    with pytest.raises(OverBudget, match="6 regions, over the budget of max_regions 5"):
        Pipeline(dataclasses.replace(config, on_error="fail"), fewer).rows(0, 0, 2)
