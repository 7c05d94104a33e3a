"""Samples that are sizes alone, and the plan of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from rave_jax.data.order import Order
from rave_jax.data.packing.choice import Chosen
from rave_jax.data.packing.config import Packing
from rave_jax.data.packing.plan import PackedRows, PackedStage
from rave_jax.data.packing.sizes import Room, Sizes
from rave_jax.data.skips import Skip


def sizes(tokens: Sequence[int], patches: Sequence[int] | None = None, regions: Sequence[int] | None = None) -> Sizes:
    """Sizes of samples; without patches and regions unless given."""
    zeros = [0] * len(tokens)
    columns = (tokens, patches or zeros, regions or zeros, [int(n > 0) for n in patches or zeros])
    return Sizes(*(np.array(column, np.int32) for column in columns))


def mixed(count: int, tokens: int, seed: int = 0) -> Sizes:
    """Half texts, a third documents of one picture, a sixth conversations of two to nine pictures; four patches make a
    visual token, and none is longer than `tokens`."""
    rng = np.random.default_rng(seed)
    kind = rng.random(count)
    text = np.minimum(rng.lognormal(np.log(tokens / 16), 0.9, count), 0.8 * tokens).astype(int) + 2
    one = rng.uniform(0.05, 0.3, count) * tokens
    several = rng.integers(2, 10, count) * rng.uniform(0.02, 0.06, count) * tokens
    visual = np.where(kind < 0.5, 0, np.where(kind < 0.83, one, several)).astype(int)
    text = np.where(visual > 0, text // 2 + 1, text)
    return sizes((np.minimum(text + visual, tokens)).tolist(), (4 * visual).tolist())


@dataclass
class Sized:
    """The choice of samples that are sizes: those that a row does not hold are left out."""

    sources: Sequence[Sizes]
    max_skips: int = 10**6
    fails: bool = False
    asked: Counter[tuple[int, int]] = field(default_factory=Counter)

    def facts(self) -> dict[str, Any]:
        return {}

    def ahead(self, sources: Any, indices: Any) -> None:
        pass

    def choose(self, sources: Any, indices: Any, room: Room) -> Chosen:
        columns = np.zeros((4, len(indices)), np.int32)
        for number, of in enumerate(self.sources):
            mine = sources == number
            columns[:, mine] = np.stack(of)[:, indices[mine]]
        found = Sizes(*columns)
        reasons = dict.fromkeys(np.flatnonzero(~room.holds(found)).tolist(), "over budget")
        return Chosen(found, np.zeros(len(indices), np.int32), reasons, frozenset())

    def skip(self, source: int, index: int, reason: str, room: Room) -> Skip:
        return Skip(f"source {source}", index, reason, f"sample {index}")


def plan(
    *sources: Sizes,
    rows: int,
    room: Room,
    packing: Packing | None = None,
    stages: Sequence[tuple[int, tuple[int, ...], Room]] = (),
    seed: int = 0,
    **choice: Any,
) -> PackedRows:
    """The plan of samples of these sizes; one stage of equal shares unless stages are given."""
    given = stages or ((0, (1,) * len(sources), room),)
    made = [PackedStage(step, tuple(map(Fraction, shares)), of) for step, shares, of in given]
    chosen: Any = Sized(sources, **choice)
    order = Order(tuple(len(of.tokens) for of in sources), seed)
    return PackedRows(packing or Packing(), rows, made, order, chosen)
