"""What a text query reads of pictures, and what that costs: entries, FLOPs and bytes of one step of decoding.

An entry is the key and value of a visual or context token. Counted are text queries that stand behind a picture of
their document, all decoder layers, and nothing but pictures: what they read of text is the same with and without Gaze.
H, K and h are query heads, kv heads and head_dim, e the entries of one layer, and a multiply-add is 2 FLOPs.

    attention   4 H h e            <q, k> and the weighted sum of v, for the visual entries
    context     4 H h e            the same for context tokens
    routing     2 H c R            <x, d> with R descriptors of c numbers; ranking by mass (oracle): 2 H h for each key
    bytes       2 h b K e          k and v, b bytes each, in plain attention and for context tokens
                2 h b K m n        routed: for each kv head n regions of m entries, padding of smaller ones read too:
                                   all that one of its query heads chose (`kernels/routed/gather`), which is n = k
                                   where they share a choice, and otherwise at most n = min(k H / K, R), as counted here
                                   (ranking by mass, a soft bias and regions that are not the layout's read all keys,
                                   as plain attention does)
                4 c K R            descriptors, float32

Which regions are read depends on the query, so where their sizes differ the mean takes all candidates for equally
likely, and the maximum takes the largest. Left out: sorting the scores of regions; making descriptors and context
tokens, once for a picture; and that plain XLA computes every score, chosen or not (`kernels/routed/xla.py`).
The counting rule is that of the Gaze Attention authors (arXiv 2605.13080): 20 regions of 36 tokens and 4 context tokens
of each of 8 frames are 752 of 4,608 entries.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from rave_jax.attention import AttentionDims, LayerReading, MechanismConfig, PicturesBefore
from rave_jax.attention.gaze.elsewhere import regions_of
from rave_jax.batch import Kind, TokenInfo
from rave_jax.families.config import TextConfig
from rave_jax.layout import FixedRegions, Regions
from rave_jax.models.config import ModelOptions, attention_dims
from rave_jax.typing import Bool, Int, NpArray


@dataclass(frozen=True)
class Reading:
    """Of one text query, a mean over queries; FLOPs and bytes are summed over layers.

    Attributes:
        visual: visual tokens before it.
        entries: entries it reads in a layer, mean over layers.
        most: the most that any query may read in any layer.
        attention, routing, context: FLOPs.
        bytes: read from the cache, padding counted.
        dense_attention, dense_bytes: of plain attention to the same visual tokens, without context tokens.
    """

    visual: float
    entries: float
    most: int
    attention: float
    routing: float
    context: float
    bytes: float
    dense_attention: float
    dense_bytes: float

    @property
    def share(self) -> float:
        """Entries that are read, of the visual tokens there are."""
        return self.entries / self.visual

    def sentence(self) -> str:
        """The finding in words."""
        flops = (self.attention, self.routing, self.context, self.dense_attention)
        attention, routing, context, dense = (f"{x / 1e6:,.3g}" for x in flops)
        return (
            f"a text query reads {self.entries:,.1f} entries of {self.visual:,.1f} visual tokens ({self.share:.1%}) "
            f"in a layer, at most {self.most:,}; in all layers {attention} MFLOPs of attention to them, {routing} of "
            f"routing and {context} of context tokens (plain attention: {dense}), and {self.bytes / 1e3:,.4g} kB "
            f"({self.dense_bytes / 1e3:,.4g})"
        )


class _Row:
    """What one row holds: its text queries behind pictures, and what of pictures stands before each of them."""

    def __init__(self, info: TokenInfo):
        codes = {name: np.asarray(code) for name, code in info._asdict().items()}
        self._codes = codes
        picture = (codes["kind"] == Kind.VISUAL) | (codes["kind"] == Kind.CONTEXT)
        before = self._before(np.flatnonzero(picture))
        self.queries = np.flatnonzero((codes["kind"] == Kind.TEXT) & before.any(axis=1))
        self.visual = self._before(np.flatnonzero(codes["kind"] == Kind.VISUAL))[self.queries].sum(1)
        self.context = self._before(np.flatnonzero(codes["kind"] == Kind.CONTEXT))[self.queries].sum(1)
        self.sizes = np.bincount(codes["region"], minlength=1)[1:]
        """Tokens of each region."""
        region = codes["region"]
        lasts = [int(np.flatnonzero(region == n)[np.argmax(codes["offset"][region == n])]) for n in self._numbers()]
        self.candidates: Bool[NpArray, "N R"] = self._before(np.array(lasts, np.int64))[self.queries]
        """Regions that stand whole before each query."""

    def over(self, regions: Regions) -> _Row:
        """The same row with other regions."""
        assert isinstance(regions, FixedRegions)
        row = TokenInfo(*(jnp.asarray(self._codes[name])[None] for name in TokenInfo._fields))
        row = row._replace(region=regions_of(row, regions))
        return _Row(TokenInfo(*(code[0] for code in row)))

    def _numbers(self) -> range:
        return range(1, len(self.sizes) + 1)

    def _before(self, tokens: Int[NpArray, "n"]) -> Bool[NpArray, "T n"]:
        """Which of these tokens stand before each token of their document."""
        document, place = self._codes["document"], self._codes["offset"]
        return (document[:, None] == document[tokens]) & (place[:, None] > place[tokens])


def account(info: TokenInfo, text: TextConfig, options: ModelOptions, number_bytes: int = 2) -> Reading | None:
    """What the text queries of a row or prompt read of its pictures; None where no text stands behind a picture.

    Args:
        info: numpy codes of one row, arrays [T], laid out for the options.
        text: the decoder, of which the layers that attend count.
        options: its mechanisms, whose `reading` says what a layer with them reads; one of a layer says it.
        number_bytes: of a number in the cache, 2 for bfloat16.
    """
    row = _Row(info)
    if not len(row.queries):
        return None
    dims = attention_dims(text)
    H, K, h, _ = dims
    plain = LayerReading(row.visual, row.visual, np.zeros(len(row.queries)), 2 * h * number_bytes * K * row.visual)
    layers = dict.fromkeys(text.attention_layers, plain)
    for mechanism in options.mechanisms:
        reading = _reading(mechanism, options, row, dims, number_bytes)
        for n in mechanism.layers_of(text.attention_layers):
            layers[n] = layers[n] if reading is None else reading
    mean, routing, read = (
        np.sum([getattr(layer, name) for layer in layers.values()], axis=0) for name in ("mean", "routing", "bytes")
    )
    context = 4 * H * h * len(layers) * row.context
    return Reading(
        visual=float(row.visual.mean()),
        entries=float(np.mean(mean / len(layers) + row.context)),
        most=int(max(np.max(layer.most + row.context) for layer in layers.values())),
        attention=float(np.mean(4 * H * h * mean)),
        routing=float(np.mean(routing)),
        context=float(np.mean(context)),
        bytes=float(np.mean(read + len(layers) * 2 * h * number_bytes * K * row.context)),
        dense_attention=float(np.mean(4 * H * h * len(layers) * row.visual)),
        dense_bytes=float(np.mean(len(layers) * 2 * h * number_bytes * K * row.visual)),
    )


def _reading(
    mechanism: MechanismConfig, options: ModelOptions, row: _Row, dims: AttentionDims, number_bytes: int
) -> LayerReading | None:
    """What one layer reads. Regions that are not those of the layout are no order of the cache: all keys are read."""
    regions = mechanism.layout.regions
    if regions in (None, options.layout.regions):
        return mechanism.reading(PicturesBefore(row.visual, row.sizes, row.candidates), dims, number_bytes)
    own = row.over(regions)
    found = mechanism.reading(PicturesBefore(own.visual, own.sizes, own.candidates), dims, number_bytes)
    read = 2 * dims.head_dim * number_bytes * dims.num_kv_heads * row.visual
    return None if found is None else found._replace(bytes=read)


def mean_reading(readings: list[Reading]) -> Reading | None:
    """Means over rows, and the greatest `most`; None of nothing."""
    if not readings:
        return None
    names = [field.name for field in dataclasses.fields(Reading)]
    values: dict[str, Any] = {name: float(np.mean([getattr(r, name) for r in readings])) for name in names}
    return Reading(**values | {"most": max(r.most for r in readings)})
