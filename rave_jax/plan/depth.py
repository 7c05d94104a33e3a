"""Steps of fewer layers, from which those of all layers follow: for decoders whose layers are compiled one by one.

Where equal layers stand together they are one loop, and depth costs the compiler nothing. Layers of two kinds that take
turns, and those of `scan_layers` False, are compiled each by itself. What such a step needs and moves grows by the same
for every turn, so that two steps of few turns give all.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable

from rave_jax.attention.plan import plan_layer_runs
from rave_jax.families.config import VlmConfig
from rave_jax.models.config import ModelOptions, window_mechanisms
from rave_jax.plan.result import Moved, Step

FEW_RUNS = 8
"""Runs of layers that are compiled whole."""
SHALLOW, DEEP = 4, 8
"""Layers behind the irregular first ones, at the least."""
LONGEST_TURN = 8


def depths(vlm: VlmConfig, options: ModelOptions) -> tuple[int, int] | None:
    """Two numbers of layers of which the step of all layers follows; None where all layers are compiled.

    Args:
        vlm: the model.
        options: how it is built.
    """
    layers = _layers(vlm, options)
    runs = 1 + sum(a != b for a, b in itertools.pairwise(layers))
    if (runs if options.scan_layers else len(layers)) <= FEW_RUNS or any(
        not isinstance(one.layers, str) for one in options.mechanisms
    ):
        return None
    for turn in range(1, LONGEST_TURN + 1):
        first = vlm.deep_layers
        if (len(layers) - first) % turn or layers[first:-turn] != layers[first + turn :]:
            continue
        few, more = (first + turn * -(-least // turn) for least in (SHALLOW, DEEP))
        alike = all(_layers(shortened(vlm, n), options) == layers[:n] for n in (few, more) if n < len(layers))
        if more < len(layers) and alike:
            return few, more
    return None


def shortened(vlm: VlmConfig, layers: int) -> VlmConfig:
    """The model with its first layers alone; the tower is whole."""
    text = vlm.text
    delta = text.delta
    if delta is not None:
        delta = dataclasses.replace(delta, layers=tuple(n for n in delta.layers if n < layers))
    return dataclasses.replace(vlm, text=dataclasses.replace(text, num_layers=layers, delta=delta))


def extrapolated(few: Step, more: Step, depths: tuple[int, int], layers: int, capacity: int) -> Step:
    """The step of all layers. What the compiler has no part in is that of all layers in both steps already.

    Args:
        few, more: steps of one config with as many layers compiled as `depths` says.
        depths: of the two.
        layers: of the model.
        capacity: bytes that the compiler gives to a program.
    """
    turns = (layers - depths[0]) / (depths[1] - depths[0])

    def line(a: float, b: float) -> float:
        return max(0.0, a + (b - a) * turns)

    def count(a: int, b: int) -> int:
        return round(line(a, b))

    hbm = dataclasses.replace(
        more.hbm,
        temporaries=count(few.hbm.temporaries, more.hbm.temporaries),
        code=count(few.hbm.code, more.hbm.code),
        host=count(few.hbm.host, more.hbm.host),
    )
    hbm = dataclasses.replace(hbm, peak=hbm.parameters + hbm.optimizer + hbm.batch + hbm.temporaries + hbm.code)
    both = few.fits and more.fits
    first, second = ({_key(one): one for one in step.moved} for step in (few, more))
    moved = [_on_line(first.get(key), second.get(key), line) for key in first | second] if both else []
    return dataclasses.replace(
        more,
        fits=both and hbm.peak <= capacity,
        hbm=hbm,
        seconds=few.seconds + more.seconds,
        moved=tuple(sorted(moved, key=lambda one: one.traffic.sent, reverse=True)),
        hbm_traffic=line(few.hbm_traffic, more.hbm_traffic) if both else 0.0,
        host_traffic=line(few.host_traffic, more.host_traffic) if both else 0.0,
        depths=(*depths, layers),
    )


def _key(one: Moved) -> Hashable:
    return one.traffic.kind, one.traffic.axes, one.traffic.members, one.traffic.asynchronous


def _on_line(few: Moved | None, more: Moved | None, line: Callable[[float, float], float]) -> Moved:
    known = more or few
    assert known is not None
    a, b = (None if one is None else one.traffic for one in (few, more))
    counts = {
        name: line(0 if a is None else getattr(a, name), 0 if b is None else getattr(b, name))
        for name in ("count", "times", "sent")
    }
    traffic = dataclasses.replace(
        known.traffic, count=round(counts["count"]), times=round(counts["times"]), sent=counts["sent"]
    )
    return dataclasses.replace(known, traffic=traffic)


def _layers(vlm: VlmConfig, options: ModelOptions) -> list[Hashable]:
    """What sets each layer apart."""
    text = vlm.text
    mechanisms = (*window_mechanisms(text), *options.mechanisms, *options.context_mechanisms)
    kinds = [(kind, n < vlm.deep_layers) for n, kind in enumerate(text.layer_kinds)]
    plans = plan_layer_runs(mechanisms, text.num_layers, False, kinds, text.attention_layers)
    return [(kind, plan.mechanisms) for kind, plan in zip(kinds, plans, strict=True)]
