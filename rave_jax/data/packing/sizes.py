"""Sizes of many samples as flat arrays, and the room of a row that they are fitted into."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from rave_jax.typing import Float, Int, NpArray


class Sizes(NamedTuple):
    """What samples take of a row, as `Processor.size` counts it.

    Fields:
        tokens: text and visual together.
        patches: of all pictures and videos.
        regions: 0 where the visual layout has none.
        pictures: pictures and videos.
    """

    tokens: Int[NpArray, "N"]
    patches: Int[NpArray, "N"]
    regions: Int[NpArray, "N"]
    pictures: Int[NpArray, "N"]

    def take(self, places: Any) -> Sizes:
        """The sizes at these places."""
        return Sizes(*(column[places] for column in self))


class Room(NamedTuple):
    """What a row holds.

    Fields:
        tokens, patches: budgets of the row.
        regions: the budget of regions; not read where the visual layout has none.
        documents: the most documents.
    """

    tokens: int
    patches: int
    regions: int
    documents: int

    def holds(self, sizes: Sizes) -> Any:
        """Which of these samples a row of their own would hold."""
        fits = (sizes.tokens <= self.tokens) & (sizes.patches <= self.patches)
        return fits & (sizes.regions <= self.regions)

    def full(self, sizes: Sizes, documents: Int[NpArray, "N"]) -> Float[NpArray, "N"]:
        """How much of a row so many documents of these sizes together take, by whichever budget is the narrowest: 0 to
        1."""
        parts = [sizes.tokens / self.tokens, documents / self.documents]
        parts += [sizes.patches / self.patches] if self.patches else []
        parts += [sizes.regions / self.regions] if self.regions else []
        return np.max(parts, axis=0)

    def rows(self, sizes: Sizes) -> float:
        """How many rows these samples fill at the least, whatever budget is the narrowest."""
        needs = [(int(sizes.tokens.sum()), self.tokens), (len(sizes.tokens), self.documents)]
        needs += [(int(sizes.patches.sum()), self.patches), (int(sizes.regions.sum()), self.regions)]
        return max(need / most for need, most in needs if need)
