"""What the page says of a row: its tokens one by one, its pictures and its counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from rave_jax.batch import Batch, Kind, Role
from rave_jax.families.config import VlmConfig
from rave_jax.look.rows.pictures import FrameView, shown_frames
from rave_jax.look.rows.spelling import Spelling, Spelt


class Token(NamedTuple):
    """A token of a row.

    Fields:
        index: in the row.
        document: its document in the row, from 1; 0 is padding.
        offset: in its document.
        kind, role, turn, image, frame, region: as in `TokenInfo`.
        id: in the vocabulary.
        spelt: how it is written.
        positions: its rotary positions, one or three.
        learned: weight in the loss of the prediction that it is next.
    """

    index: int
    document: int
    offset: int
    kind: Kind
    role: Role
    turn: int
    image: int
    frame: int
    region: int
    id: int
    spelt: Spelt
    positions: tuple[int, ...]
    learned: float


class Run(NamedTuple):
    """Tokens side by side of one document, one kind and one picture.

    Fields:
        document, kind, image: of each of them.
        tokens: they.
    """

    document: int
    kind: Kind
    image: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class PackedRow:
    """A row as the model sees it.

    Attributes:
        step, number: which row of which step.
        runs: its tokens, in order.
        frames: its pictures.
        patches: patches of the row, padding among them.
    """

    step: int
    number: int
    runs: tuple[Run, ...]
    frames: tuple[FrameView, ...]
    patches: int

    @property
    def tokens(self) -> tuple[Token, ...]:
        """All tokens, padding among them."""
        return tuple(token for run in self.runs for token in run.tokens)

    @property
    def counts(self) -> dict[str, int]:
        """How much there is of what."""
        tokens = self.tokens
        real = [token for token in tokens if token.document]
        return {
            "documents": len({token.document for token in real}),
            "tokens": len(real),
            "of": len(tokens),
            "learned": sum(token.learned != 0 for token in real),
            "visual": sum(token.kind is Kind.VISUAL for token in real),
            "context": sum(token.kind is Kind.CONTEXT for token in real),
            "regions": len({token.region for token in real} - {0}),
            "pictures": len({token.image for token in real} - {0}),
            "patches": sum(frame.patches for frame in self.frames),
            "of patches": self.patches,
        }


def packed_rows(batch: Batch, config: VlmConfig, spelling: Spelling, step: int, first: int = 0) -> list[PackedRow]:
    """The rows of a batch.

    Args:
        batch: of numpy arrays.
        config: of the model.
        spelling: of its tokenizer.
        step: that the batch is of.
        first: number of its first row in the step.
    """
    return [_row(batch, row, config, spelling, step, first + row) for row in range(len(batch.tokens))]


def _row(batch: Batch, row: int, config: VlmConfig, spelling: Spelling, step: int, number: int) -> PackedRow:
    ids = np.asarray(batch.tokens[row]).tolist()
    codes = {name: np.asarray(code[row]).tolist() for name, code in batch.info._asdict().items()}
    weights: Any = np.asarray(batch.loss_weights[row])
    learned = [0.0, *weights[:-1].tolist()]  # a token is predicted by the one before it
    axes = np.asarray(batch.positions[:, row])[: 3 if config.text.mrope_section else 1]
    positions = [tuple(place) for place in axes.T.tolist()]
    tokens = [
        Token(
            index,
            codes["document"][index],
            codes["offset"][index],
            Kind(codes["kind"][index]),
            Role(codes["role"][index]),
            codes["turn"][index],
            codes["image"][index],
            codes["frame"][index],
            codes["region"][index],
            ids[index],
            spelt,
            positions[index],
            learned[index],
        )
        for index, spelt in enumerate(spelling(ids))
    ]
    frames = () if config.vision is None else tuple(shown_frames(batch, row, config.vision))
    return PackedRow(step, number, _runs(tokens), frames, batch.patches.frame.shape[1])


def _runs(tokens: Sequence[Token]) -> tuple[Run, ...]:
    runs = groupby(tokens, lambda token: (token.document, token.kind, token.image))
    return tuple(Run(*named, tuple(run)) for named, run in runs)
