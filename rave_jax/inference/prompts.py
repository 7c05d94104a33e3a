"""Prompts as the programs take them: host arrays of the buckets' shapes, a row per prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rave_jax.batch import Batch, TokenInfo
from rave_jax.data.collate import BatchShape, collate
from rave_jax.data.layout import offsets_in_region
from rave_jax.data.patches import empty_patches, part_of
from rave_jax.data.sample import Example
from rave_jax.families.config import PatchSizes
from rave_jax.inference.buckets import Buckets
from rave_jax.inference.programs import NOTHING, Admission, Pictures
from rave_jax.inference.sampling import RowSampling, Sampling
from rave_jax.models.forward import Chunk
from rave_jax.typing import Bool, Int, NpArray


class Prompt(NamedTuple):
    """A prompt and how it is answered.

    Fields:
        example: the prompt.
        sampling: how tokens are chosen.
        stops: ids that end the answer.
        limit: most tokens of the answer.
        blind: the prompt without its pictures; None where nothing asks for it.
        kept: bounds of its tokens behind each layer after which tokens leave; empty where none do.
        content: which tokens belong to content words; None where nothing asks for it.
    """

    example: Example
    sampling: Sampling
    stops: tuple[int, ...]
    limit: int
    blind: Example | None = None
    kept: tuple[tuple[int, ...], ...] = ()
    content: Bool[NpArray, "T"] | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.example.tokens)

    @property
    def entries(self) -> int:
        """Tokens of the prompt that are not kept by region."""
        return int(np.sum(self.example.info.region == 0))


class PromptGroup:
    """Up to N prompts that are read together.

    Args:
        prompts: at least one.
        rows: N; rows without a prompt are padding.
        buckets: the sizes to use.
        sizes: of the model's patches.
    """

    def __init__(self, prompts: Sequence[Prompt], rows: int, buckets: Buckets, sizes: PatchSizes):
        self.prompts, self.rows, self.buckets = prompts, rows, buckets
        longest = max(prompt.length for prompt in prompts)
        self.width = buckets.chunk_of(longest)
        """T: tokens of each prompt that are read at once."""
        tokens = -(-longest // self.width) * self.width
        patches = max(prompt.example.patches.length for prompt in prompts)
        self._sizes = sizes
        documents = [[prompt.example] for prompt in prompts]
        self._batch: Batch = collate(documents, BatchShape(rows, tokens, patches), sizes)
        regions = max(int(np.max(prompt.example.info.region, initial=0)) for prompt in prompts)
        self.region_reach = buckets.region_reach(regions)
        """Regions that the prompts' chunks see; None for a model without."""
        self.lengths = buckets.behind(largest([prompt.kept for prompt in prompts]), self.width) or None
        """What tokens are gathered into behind layers after which some leave; None where none do."""
        self._region_offset: Any = np.stack([offsets_in_region(np.asarray(row)) for row in self._batch.info.region])

    def pictures(self, most: int) -> Iterator[Pictures]:
        """All frames, in as few runs of the tower as `most` patches a row and run allow; a larger frame goes alone.
        Where units are mixed, all frames of a picture go together."""
        parts: list[Any] = [prompt.example.patches for prompt in self.prompts]
        mixed = self._sizes.mixed
        groups = [_groups(patches.window if mixed else patches.frame, most) for patches in parts]
        for turn in range(max(map(len, groups))):
            spans = [mine[turn] if turn < len(mine) else range(0) for mine in groups]
            P = self.buckets.tower(max(map(len, spans)))
            tokens = self.buckets.lengths[-1] if mixed else 0
            cut: Any = empty_patches((self.rows, P), self._sizes.numbers, (tokens, mixed))
            offset: Any = np.zeros(self.rows, np.int32)
            for row, (whole, span) in enumerate(zip(parts, spans, strict=True)):
                own, offset[row] = part_of(whole, span, self._sizes)
                for part, one in zip(cut, own, strict=True):
                    part[row, : one.shape[0]] = one
            yield Pictures(cut, offset)

    def whole(
        self, slots: Sequence[int], no_slot: int
    ) -> tuple[Chunk, Chunk | None, Bool[NpArray, "N T"] | None, Int[NpArray, "N"]]:
        """All prompts at once, the same without their pictures and which tokens are of content words, where these were
        given, and where they go; arguments as in `chunks`."""
        blind = [prompt.blind for prompt in self.prompts if prompt.blind is not None]
        without = None
        if blind:
            shape = BatchShape(self.rows, self._batch.tokens.shape[1], 0)
            without = _whole(collate([[example] for example in blind], shape, self._sizes))
        words = [prompt.content for prompt in self.prompts if prompt.content is not None]
        content: Any = np.zeros(self._batch.tokens.shape, bool) if words else None
        for row, mine in enumerate(words):
            content[row, : len(mine)] = mine
        return _whole(self._batch), without, content, self._column(slots, no_slot)

    def chunks(self, slots: Sequence[int], no_slot: int) -> Iterator[tuple[int, Chunk, Admission]]:
        """(reach, tokens, who they belong to) of each pass over the prompts.

        Args:
            slots: where the prompts go.
            no_slot: stands for padding rows.
        """
        batch, T = self._batch, self.width
        lengths = self._column([prompt.length for prompt in self.prompts])
        admission = self._admission(self._column(slots, no_slot))
        # A chunk is written whole into entries that follow each other, or token by token beside regions.
        real, outside = (np.asarray(code) for code in (batch.info.document > 0, batch.info.region == 0))
        beside: Any = np.max(np.cumsum(real & outside, axis=1), axis=0)
        for start in range(0, batch.tokens.shape[1], T):
            part = slice(start, start + T)
            info = TokenInfo(*(code[:, part] for code in batch.info))
            rest = (batch.positions[:, :, part], batch.visual_index[:, part], self._region_offset[:, part])
            chunk = Chunk(batch.tokens[:, part], info, *rest)
            here = (start < lengths) & (lengths <= start + T)
            last: Any = np.where(here, lengths - 1 - start, NOTHING).astype(np.int32)
            begins: Any = np.full(self.rows, start == 0)
            needed = start + T if self.region_reach is None else int(beside[start + T - 1])
            yield self.buckets.reach(needed), chunk, admission._replace(last=last, begins=begins)

    def _admission(self, slots: NpArray) -> Admission:
        fill = [Sampling()] * (self.rows - len(self.prompts))
        samplings = [prompt.sampling for prompt in self.prompts] + fill
        width = max(len(prompt.stops) for prompt in self.prompts)
        stops: Any = np.full((self.rows, width), NOTHING, np.int32)
        for row, prompt in enumerate(self.prompts):
            stops[row, : len(prompt.stops)] = prompt.stops
        values: dict[str, Any] = {
            "slot": slots,
            "begins": None,
            "last": None,
            # As text does after anything that it follows (`PictureRules.positions`).
            "position": self._column([int(prompt.example.positions.max()) + 1 for prompt in self.prompts]),
            "turn": self._column([int(np.asarray(prompt.example.info.turn)[-1]) for prompt in self.prompts]),
            "limit": self._column([prompt.limit for prompt in self.prompts]),
            "stops": stops,
        }
        return Admission(**values, sampling=RowSampling.of(samplings))

    def _column(self, values: Sequence[int], fill: int = 0) -> NpArray:
        return np.array([*values, *[fill] * (self.rows - len(values))], np.int32)


def _whole(batch: Batch) -> Chunk:
    return Chunk(batch.tokens, batch.info, batch.positions, batch.visual_index)


def largest(counts: Sequence[tuple[tuple[int, ...], ...]]) -> tuple[tuple[int, ...], ...]:
    """The largest of each of the numbers that all have."""
    return tuple(tuple(map(max, zip(*bounds, strict=True))) for bounds in zip(*counts, strict=True))


def _groups(number: Any, most: int) -> list[range]:
    """Spans of whole frames, or pictures, with at most `most` patches together; a larger one stands alone."""
    ends = [*(np.flatnonzero(np.diff(number)) + 1).tolist(), len(number)] if len(number) else []
    groups: list[range] = []
    start = 0
    for end in ends:
        if groups and end - groups[-1].start <= most:
            groups[-1] = range(groups[-1].start, end)
        else:
            groups.append(range(start, end))
        start = end
    return groups
