"""Examples into a batch of static shape: several documents per row, padding after them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from rave_jax.batch import Batch, Kind, TokenInfo
from rave_jax.data.patches import empty_patches, moved
from rave_jax.data.sample import Example, OverBudget
from rave_jax.families.config import PatchSizes


class BatchShape(NamedTuple):
    """The static shape of a batch.

    Fields:
        rows: B.
        tokens: T, text and visual tokens of a row.
        patches: P of a row; a multiple of the tower's window (`PatchSizes.window`), or 0 for text only.
    """

    rows: int
    tokens: int
    patches: int


def round_up(number: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


def smallest_shape(rows: Sequence[Sequence[Example]], tokens_multiple: int, patches_multiple: int) -> BatchShape:
    """The least shape that holds these rows, lengths rounded up so that few shapes occur.

    Args:
        rows: documents of each row.
        tokens_multiple: T is a multiple of it.
        patches_multiple: P is a multiple of it; the tower's window, or a multiple of that.
    """
    tokens = max((sum(len(e.tokens) for e in row) for row in rows), default=0)
    patches = max((sum(e.patches.length for e in row) for row in rows), default=0)
    return BatchShape(len(rows), round_up(max(tokens, 1), tokens_multiple), round_up(patches, patches_multiple))


def check_fits(example: Example, tokens: int, patches: int, name: str) -> None:
    """Raise OverBudget, naming the sample and its sizes, unless it fits the budgets."""
    if len(example.tokens) > tokens or example.patches.length > patches:
        raise OverBudget(
            f"{name}: {len(example.tokens)} tokens and {example.patches.length} patches, "
            f"over the budget of {tokens} tokens and {patches} patches",
            len(example.tokens),
            example.patches.length,
        )


def empty_batch(shape: BatchShape, patch_numbers: int, mixed: int = 0) -> Batch:
    """A batch of padding only; `patch_numbers` is C, `mixed` is K (`PatchSizes`)."""
    b, t, p = shape

    def zeros(*size: int, dtype: DTypeLike = np.int32) -> Any:
        return np.zeros(size, dtype)

    return Batch(
        tokens=zeros(b, t),
        targets=zeros(b, t),
        loss_weights=zeros(b, t, dtype=np.float32),
        info=TokenInfo(*(zeros(b, t) for _ in TokenInfo._fields)),
        positions=zeros(3, b, t),
        visual_index=zeros(b, t),
        patches=empty_patches((b, p), patch_numbers, (t if mixed else 0, mixed)),
    )


def collate(rows: Sequence[Sequence[Example]], shape: BatchShape, sizes: PatchSizes) -> Batch:
    """Pack the documents of each row one after another and pad to `shape`.

    A document's images, frames, windows and merged patches are numbered on behind those of the documents before it;
    its positions and turns start anew. A token predicts the next one of its own document.

    Args:
        rows: documents of each row, at most `shape.rows` of them; rows that are missing are padding.
        shape: the batch's shape.
        sizes: of the model's patches.

    Raises:
        OverBudget: a row's documents do not fit. Nothing is cut.
    """
    if len(rows) > shape.rows:
        raise OverBudget(f"{len(rows)} rows for a batch of {shape.rows}")
    batch = empty_batch(shape, sizes.numbers, sizes.mixed)
    for b, documents in enumerate(rows):
        token = patch = images = frames = windows = regions = mixes = 0
        for number, example in enumerate(documents, start=1):
            check_fits(example, shape.tokens - token, shape.patches - patch, f"row {b}, document {number}")
            t = slice(token, token + len(example.tokens))
            p = slice(patch, patch + example.patches.length)
            visual = example.info.kind == Kind.VISUAL
            batch.tokens[b, t] = example.tokens
            batch.targets[b, t.start : t.stop - 1] = example.tokens[1:]
            batch.loss_weights[b, t.start : t.stop - 1] = example.loss_mask[1:]
            for name, code in example.info._asdict().items():
                getattr(batch.info, name)[b, t] = code
            batch.info.document[b, t] = number
            batch.info.image[b, t] = np.where(example.info.image > 0, example.info.image + images, 0)
            batch.info.region[b, t] = np.where(example.info.region > 0, example.info.region + regions, 0)
            batch.positions[:, b, t] = example.positions
            units = patch // sizes.merge
            before = mixes if sizes.mixed else units
            batch.visual_index[b, t] = np.where(visual, example.visual_index + before, 0)
            batch.patches.pixels[b, p] = example.patches.pixels
            batch.patches.place[b, p] = example.patches.place
            batch.patches.frame[b, p] = example.patches.frame + frames
            batch.patches.window[b, p] = example.patches.window + windows
            if sizes.mixed:
                m = slice(mixes, mixes + example.patches.source.shape[0])
                batch.patches.source[b, m] = moved(example.patches.source, units)
                batch.patches.weight[b, m] = example.patches.weight
                mixes = m.stop
            token, patch = t.stop, p.stop
            images += int(example.info.image.max(initial=0))
            frames += int(example.patches.frame.max(initial=0))
            windows += int(example.patches.window.max(initial=0))
            regions += int(example.info.region.max(initial=0))
    return batch
