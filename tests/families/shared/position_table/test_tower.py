"""The table of positions is stretched over every frame, and one program serves frames of all sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.families.qwen3_vl.presets import tiny
from rave_jax.families.shared.position_table.tower import PositionTable, Tower, block_runs, frame_sizes
from rave_jax.models.config import ModelOptions
from tests.models.layout import Visual, batch, document
from tests.models.made import model as made

CONFIG = tiny(vision_depth=2)


@pytest.mark.parametrize(("side", "rows", "cols"), [(5, 4, 12), (48, 1, 6), (1, 3, 2), (3, 3, 3)])
def test_a_patch_reads_the_table_where_it_stands_between_the_corners(side: int, rows: int, cols: int) -> None:
    table = PositionTable(side, 3, dtype=jnp.dtype("float32"), key=jax.random.key(side))
    entries = np.asarray(table.weight[...]).reshape(side, side, 3)
    place = np.indices((rows, cols)).reshape(2, -1).T.astype(np.int32)
    found = np.asarray(table(place[None], np.broadcast_to(np.int32([rows, cols]), place.shape)[None]))[0]

    def along(count: int) -> np.ndarray:
        """Weight of each entry along an axis for each patch along it."""
        at = np.linspace(0, side - 1, count) if count > 1 else np.zeros(1)
        return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(side)))

    wanted = np.einsum("ru,cv,uvD->rcD", along(rows), along(cols), entries).reshape(-1, 3)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_frames_have_their_own_sizes_and_their_own_table() -> None:
    """A frame is read alike alone and beside others, wherever it stands in a row; sizes compile no second program."""
    traced = []

    @jax.jit
    def see(tower: Tower, patches):
        traced.append(1)
        return tower(patches)

    tower = made(CONFIG, ModelOptions()).vision
    rng = np.random.default_rng(0)
    docs = [document([Visual(1, 4, 10), 1, Visual(2, 8, 2, video=True), 1], CONFIG, rng) for _ in range(2)]
    rows = batch([docs, docs[::-1]], CONFIG, tokens=40, patches=160).patches
    sizes = np.asarray(frame_sizes(rows))[0, np.asarray(rows.frame[0]) > 0]
    assert sizes.tolist() == ([[4, 10]] * 40 + [[8, 2]] * 32) * 2
    both = see(tower, rows)
    assert both.tokens.shape == (2, 40, 32) and len(both.deep) == 2
    alone = see(tower, batch([docs[:1], docs[1:]], CONFIG, tokens=40, patches=160).patches)
    for x, y in zip((both.tokens, *both.deep), (alone.tokens, *alone.deep), strict=True):
        np.testing.assert_allclose(x[0, :18], y[0, :18], atol=1e-5)
        np.testing.assert_allclose(x[1, 18:36], y[0, :18], atol=1e-5)
    assert len(traced) == 1


def test_runs_end_where_features_are_taken() -> None:
    assert block_runs(27, (8, 16, 24)) == [(0, 9), (9, 17), (17, 25), (25, 27)]
    assert block_runs(3, (0, 2)) == [(0, 1), (1, 3)]
    assert block_runs(2, ()) == [(0, 2)]
    assert block_runs(2, (0,), join=False) == [(0, 1), (1, 2)]
