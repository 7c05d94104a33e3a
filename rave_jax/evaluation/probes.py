"""The probes that there are, and those that an evaluation asks for."""

from __future__ import annotations

from rave_jax.evaluation.config import Eval
from rave_jax.evaluation.knocked import Knocks
from rave_jax.evaluation.looking import Drawing, Looks
from rave_jax.evaluation.probe import Probe
from rave_jax.evaluation.routing import Routes
from rave_jax.evaluation.sinks import SinkProbe
from rave_jax.evaluation.spans import SpanProbe
from rave_jax.evaluation.vas import VasProbe

PROBES: tuple[type[Probe], ...] = (Looks, Knocks, VasProbe, Routes, SpanProbe, SinkProbe)
"""In the order of the summary and of the report."""


def probes_of(config: Eval) -> tuple[Probe, ...]:
    """The probes of an evaluation. One that measures no sample finds nothing."""
    drawing = Drawing(config.layers, config.per_head, config.picture_format)
    return (
        Looks(config.looks, config.pictures, drawing),
        Knocks(config.knock_outs, config.knock_out_blocks, config.pictures, config.picture_format),
        VasProbe(config.vas),
        Routes(config.routes),
        SpanProbe(config.spans),
        SinkProbe(config.sinks),
    )
