"""An example laid out as a model's mechanisms want its pictures: context tokens added, regions numbered, tokens of a
region side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rave_jax.batch import Kind, TokenInfo
from rave_jax.data.sample import Example, OverBudget
from rave_jax.layout import Grid, VisualLayout
from rave_jax.typing import Int, NpArray


def lay_out(example: Example, layout: VisualLayout, *, one_axis: bool = False) -> Example:
    """The example with the context tokens and region numbers that the layout asks for; its tokens stay in order.

    A context token stands behind the last token of its frame (or picture) and holds the same placeholder. In positions
    of three axes (M-RoPE) it keeps that frame's time; its row and column stand behind the largest position of the whole
    picture or video, where text would go on, and all that follows moves on by as many positions. On one axis it has
    the next position, as a token of text would. (Our choice; the paper says nothing of them.)

    Args:
        example: of one document.
        layout: what the mechanisms want.
        one_axis: does the model read one position of a token (1-D RoPE) and not three?

    Raises:
        OverBudget: the example has more regions, or larger ones, than the layout allows.
    """
    if layout.context is not None:
        example = _with_context(example, layout, one_axis)
    return example if layout.regions is None else _with_regions(example, layout)


def region_major(example: Example) -> Example:
    """The example with the tokens of every region side by side, the context tokens of a picture behind its regions.

    Everything that is known of a token moves with it; `offset` still says where it stands in its document, and that is
    what masks go by.
    """
    info = example.info
    region = np.where(info.kind == Kind.CONTEXT, np.iinfo(np.int32).max, info.region)
    order: Any = np.arange(len(example.tokens))
    for span, _ in pictures(info):
        order[span] = span.start + np.argsort(region[span], kind="stable")
    return example._replace(
        tokens=example.tokens[order],
        loss_mask=example.loss_mask[order],
        info=TokenInfo(*(code[order] for code in info)),
        positions=example.positions[:, order],
        visual_index=example.visual_index[order],
    )


def check_regions(example: Example, most: int, name: str = "") -> None:
    """Raise OverBudget, naming the sample, if it has more than `most` regions."""
    _check_regions(int(np.max(example.info.region, initial=0)), most, name)


def _check_regions(found: int, most: int, name: str = "") -> None:
    if found > most:
        raise OverBudget(f"{name + ': ' if name else ''}{found} regions, over the budget of max_regions {most}")


def check_region_sizes(grids: Sequence[Grid], layout: VisualLayout) -> None:
    """Raise OverBudget if pictures of these merged grids have regions of more tokens, or more of them, than the layout
    allows: what `lay_out` refuses."""
    if layout.regions is None:
        return
    for grid in grids:
        _check_region_size(grid, layout.regions.largest(grid), layout.regions.tokens)
    _check_regions(sum(map(layout.count_regions, grids)), layout.max_regions)


def pictures(info: TokenInfo) -> Iterator[tuple[slice, Grid]]:
    """Where each picture or video of one document stands, and its merged grid."""
    image = np.asarray(info.image)
    for number in range(1, int(image.max(initial=0)) + 1):
        (tokens,) = np.nonzero(image == number)
        first = tokens[0]
        grid = tuple(int(code[first]) for code in (info.grid_t, info.grid_h, info.grid_w))
        yield slice(int(first), int(tokens[-1]) + 1), (grid[0], grid[1], grid[2])


def offsets_in_region(region: Int[NpArray, "T"]) -> Int[NpArray, "T"]:
    """How many tokens of its region stand before each token; 0 where there is no region."""
    order = np.argsort(region, kind="stable")
    numbers = region[order]
    first = np.searchsorted(numbers, numbers, side="left")
    places = np.empty(len(region), np.int32)
    places[order] = np.arange(len(region)) - first
    return np.where(region > 0, places, 0)


def _check_region_size(grid: Grid, largest: int, most: int) -> None:
    if largest > most:
        raise OverBudget(
            f"a picture of {grid[1]} x {grid[2]} tokens has regions of {largest} tokens, "
            f"over the budget of regions.tokens {most}"
        )


def _with_regions(example: Example, layout: VisualLayout) -> Example:
    regions = layout.regions
    assert regions is not None
    info = example.info
    number: Any = np.zeros(len(example.tokens), np.int32)
    total = 0
    for span, grid in pictures(info):
        shape = regions.shape(grid)
        places: Any = info.frame[span], info.row[span], info.col[span]
        frame, row, col = regions.coordinates(places, grid)
        local = (frame * shape[1] + row) * shape[2] + col
        seen = info.kind[span] == Kind.VISUAL
        _check_region_size(grid, int(np.bincount(local[seen]).max()), regions.tokens)
        number[span] = np.where(seen, total + 1 + local, 0)
        total += layout.count_regions(grid)
    example = example._replace(info=info._replace(region=number))
    check_regions(example, layout.max_regions)
    return example


def _with_context(example: Example, layout: VisualLayout, one_axis: bool) -> Example:
    context = layout.context
    assert context is not None
    info, length = example.info, len(example.tokens)
    # Each token of the result is a copy of one of the example; a context token, of the last of its frame.
    source: list[NpArray] = [np.arange(0)]
    index: list[NpArray] = [np.arange(0)]
    moved: Any = np.zeros(length, np.int32)
    end = 0
    for span, (t, _, _) in pictures(info):
        frames = t if context.per == "frame" else 1
        run = np.arange(span.start, span.stop).reshape(frames, -1)
        copies = np.repeat(run[:, -1:], context.count, axis=1)
        source += [np.arange(end, span.start), np.concatenate([run, copies], axis=1).ravel()]
        places = np.concatenate([np.full(run.shape, -1), np.tile(np.arange(context.count), (frames, 1))], axis=1)
        index += [np.full(span.start - end, -1), places.ravel()]
        moved[span.stop :] += context.count
        end = span.stop
    take = np.concatenate([*source, np.arange(end, length)])
    nth = np.concatenate([*index, np.full(length - end, -1)])
    added = nth >= 0
    codes = TokenInfo(*(code[take] for code in info))
    if one_axis:
        positions = example.positions[:, take] + np.cumsum(added)
    else:
        behind = _behind(example)[take] + nth
        positions = (example.positions + moved)[:, take]
        positions[1:] = np.where(added, behind + moved[take], positions[1:])
    own: dict[str, Any] = {
        "offset": np.arange(len(take)),
        "kind": np.where(added, Kind.CONTEXT, codes.kind),
        "row": np.where(added, nth, codes.row),
        "col": np.where(added, 0, codes.col),
        "padded": np.where(added, 0, codes.padded),
    }
    return example._replace(
        tokens=example.tokens[take],
        loss_mask=np.where(added, 0, example.loss_mask[take]).astype(example.loss_mask.dtype),
        info=codes._replace(**{name: code.astype(np.int32) for name, code in own.items()}),
        positions=positions.astype(np.int32),
        visual_index=np.where(added, 0, example.visual_index[take]).astype(np.int32),
    )


def _behind(example: Example) -> Int[NpArray, "T"]:
    """On tokens of a picture or video, the first position behind its largest one; 0 elsewhere."""
    found: Any = np.zeros(len(example.tokens), np.int32)
    for span, _ in pictures(example.info):
        found[span] = example.positions[:, span].max() + 1
    return found
