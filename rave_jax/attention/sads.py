"""SADS (RAR): late layers drop the heads that collapse on a few tokens of little meaning, in training and inference.

Source: "Reversing Visual Attention Re-Sinking", openreview.net xTbFeDhdRG, from notes on the paper; no code was found.
Heads of late layers are vision heads, sinks that read global context (sink_G), or sinks that collapsed (sink_S). The
output of sink_S heads is dropped, and nothing is scaled for them: y = sum over kept heads of O_h W_O^h. Head 0 of a
layer is shared and always kept.

Which heads these are is a property of a model, found by `rave-jax calibrate sads`
(`rave_jax/attention/calibrate/sads.py`), and the same in every row: a choice that looked at a row's text would let its
tokens know of later ones. The unit is a query head. All heads are computed: no time is saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from rave_jax.attention.base import AttentionDims, Mechanism
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.attention.heads import ScaledHeads, check_heads
from rave_jax.config import check_fields, require


@dataclass(frozen=True)
class Sads(MechanismConfig):
    """The outputs of some heads are dropped (SADS)."""

    heads: tuple[int, ...] = ()
    """Query heads that are dropped, by number, as `rave-jax calibrate sads` finds them; head 0 is always kept. Empty
    changes nothing. For other heads in other layers, give the model several of these configs, each with its
    `layers`."""
    rescale: bool = False
    """Are the kept heads multiplied by H / (number of kept heads)? The source does not."""
    layers: Layers = "all"
    """Decoder layers that use it, by global number, or all."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(len(set(self.heads)) == len(self.heads), "heads", self.heads, "each head once")

    def build(self, dims: AttentionDims, key: jax.Array) -> Mechanism:
        """The mechanism of one layer; one that changes nothing if no head is dropped.

        Raises:
            ConfigError: a head that the layer does not have, or head 0.
        """
        check_heads(self.heads, dims)
        require(0 not in self.heads, "heads", self.heads, "no head 0, which every layer keeps")
        kept = dims.num_heads / (dims.num_heads - len(self.heads)) if self.rescale else 1.0
        scales = tuple(0.0 if n in self.heads else kept for n in range(dims.num_heads))
        return ScaledHeads(scales) if self.heads else Mechanism()
