"""For every mechanism: documents packed into rows give what each gives alone, with every gradient.

A stack has another mechanism, or another set of them, in each layer, so that one program serves many. The first layer
that lets something through is named.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings

from rave_jax.attention import (
    Arrow,
    Avar,
    BiFormer,
    Cca,
    Croc,
    Decomposed,
    Dyvte,
    Gaze,
    LogN,
    MechanismConfig,
    Mma,
    Moba,
    Moh,
    Pine,
    Pruning,
    Rave,
    Sads,
    SlidingWindow,
    Sparsifiner,
    Steer,
    Superlinear,
    TextPositions,
    Var,
    Vhr,
    VisualBias,
    ZeroTuning,
)
from rave_jax.layout import ContextTokens, FixedRegions
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import named_parameters
from tests import packing
from tests.attention.built_in import BUILT_IN, OF_PROMPTS
from tests.families.every import small
from tests.packing import MANY, Documents

GAMMA = (0.5, 3.0)
ZERO = functools.partial(ZeroTuning, gamma=GAMMA, heads=(0, 3))
SINKS = Var(dims=(0, 1, 2), tau=1.0, rho=0.2, summ=0.05)
"""A third of all tokens are sinks, and most rows move their attention."""
STEER = Steer(image=0.7, system=0.3, by="score")
"""By the score itself: the slope of its size jumps where rounding decides the sign."""
GAZE = functools.partial(Gaze, FixedRegions(2, 1), 96, top_k=2)
MASKS = (
    (Rave(rank=2), Croc(), Vhr(heads=(0, 2)), VisualBias(0.7)),
    (Croc(rule="prefix"), ZERO(), Sads(heads=(1,)), STEER, Rave(rank=2, features="post_rope")),
    (Decomposed(), ZERO(route="after"), Moh("learned", balance=0.5)),
    (Decomposed(rope="kept"), SlidingWindow(9), Mma(), SINKS),
    (TextPositions(), ZERO(route="merge"), Avar(), LogN(length=5)),
    (Cca(), ZERO(route="channel"), Rave(rank=2, form="centered_sigmoid", queries="text")),
    (Arrow(9, 2), ZERO(), Moh("learned", shared=0.25, active=0.5)),
    (Pine(3), Rave(rank=2), SlidingWindow(30)),
)
"""The mechanisms of each layer that attends."""
BLOCKS = (
    (Moba(3, top_k=2), Croc(), Rave(rank=2), SINKS),
    (Sparsifiner(3, keep=0.4, rank=2, every=2), Avar()),
    (Superlinear(3, spans=2, rank=2), Rave(rank=2)),
)
REGIONS = (
    (GAZE(descriptor="min_max", rank_with_bias=True, choice="straight_through"), Rave(rank=2, form="tanh"), Mma()),
    (GAZE(descriptor="learned", choice="soft_bias", visual_queries="frame+routed", share="group"), SlidingWindow(20)),
    (GAZE(top_k=0.3, descriptor="spread", descriptor_keys="pre_rope"), Avar()),
    (GAZE(descriptor="oracle"), ZERO(route="channel")),
    (GAZE(descriptor="random"), TextPositions(), SINKS),
    (GAZE(normalise="keys", visual_queries="frame+routed"), Cca(), ZERO(route="after")),
    (BiFormer(FixedRegions(2, 1), 96, top_k=2), Croc()),
    (Gaze(FixedRegions(3, 2), 96, top_k=2, descriptor="min_max"), Rave(rank=2)),
)
DROPS = (
    (Pruning(keep=0.6, slope=1.0), Rave(rank=2)),
    (Dyvte(width=4), ZERO(route="after")),
    (SlidingWindow(9), LogN(length=5)),
)
"""Behind the first two layers visual tokens leave."""
WITH_SIZES = (*REGIONS[:3], (*REGIONS[3], Moh(balance=0.5)), *REGIONS[4:])
"""Also heads that are chosen by the sizes of their queries over their spread. Where two sizes are nearly equal the
gradient of that is rounding, so it stands where gradients are not compared."""
CONTEXT = {
    "masks": ContextTokens(2),
    "blocks": ContextTokens(1),
    "regions": ContextTokens(1, per="image"),
    "drops": ContextTokens(1),
}
STACKS = {"masks": MASKS, "blocks": BLOCKS, "regions": REGIONS, "drops": DROPS}
LOSSES = {
    "masks": {"avar_enhance", "avar_suppress", "moh_balance"},
    "blocks": {"avar_enhance", "avar_suppress", "sparsifiner"},
    "regions": {"avar_enhance", "avar_suppress"},
    "drops": set(),
}
FAMILIES = ("qwen2_5_vl", "qwen3_5")
"""One whose layers all attend, and one with layers of the gated delta rule between them."""
EACH = pytest.mark.parametrize(
    ("family", "stack"),
    [(family, stack) for family in FAMILIES for stack in STACKS if (family, stack) != ("qwen3_5", "drops")],
)
"""Behind a layer of the gated delta rule nothing may leave."""


def placed(stack: tuple[tuple[MechanismConfig, ...], ...], first: int) -> tuple[MechanismConfig, ...]:
    """The mechanisms of a stack in the layers from `first` on."""
    return tuple(dataclasses.replace(one, layers=(first + n,)) for n, layer in enumerate(stack) for one in layer)


@functools.cache
def documents_of(family: str, stack: str) -> Documents:
    """Documents of a small model with a stack."""
    hybrid = family == "qwen3_5"
    layers = WITH_SIZES if hybrid and stack == "regions" else STACKS[stack]
    options = ModelOptions(
        placed(layers, int(hybrid)),
        context=None if hybrid else CONTEXT[stack],
        attention="reference" if hybrid else "xla",
    )
    of = small(family, options)
    text: Any = dataclasses.replace(of.config.text, num_layers=len(layers) + hybrid)
    of = of._replace(config=dataclasses.replace(of.config, text=text))
    assert text.attention_layers == tuple(range(int(hybrid), text.num_layers))
    told = packing.conversations(pictures=True, videos=True)
    return Documents(
        of, of.model(options), told, tolerance=packing.DELTA if hybrid else packing.TOLERANCE, learning=not hybrid
    )


def test_the_stacks_have_every_mechanism() -> None:
    found = {type(one) for stack in STACKS.values() for layer in stack for one in layer}
    assert found == set(BUILT_IN) - OF_PROMPTS


@pytest.mark.slow
@EACH
@settings(max_examples=1)
@given(rows=packing.arrangements(6))
@example(rows=[[0], [MANY]]).via("text alone beside a row of nine pictures")
@example(rows=[[], [4, MANY, 1, 5, 0, 2]]).via("all in one row")
def test_packed_documents_are_each_alone(family: str, stack: str, rows: list[list[int]]) -> None:
    packing.check(documents_of(family, stack), rows)


@pytest.mark.slow
@EACH
def test_neighbours_change_no_bit(family: str, stack: str) -> None:
    packing.check_neighbours(documents_of(family, stack))


@pytest.mark.slow
@pytest.mark.parametrize("stack", STACKS)
def test_every_mechanism_learns(stack: str) -> None:
    """Its losses are there, and each of its parameters has a gradient."""
    documents = documents_of("qwen2_5_vl", stack)
    found = documents.of_rows([range(len(documents.examples)), []])
    assert {name for name, value in found.losses.items() if value} == LOSSES[stack]
    named = named_parameters(documents.model)
    # Routers of Dyvte learn in a procedure of their own.
    own = [path for path in named if ".mechanisms." in path and not path.endswith((".first", ".second"))]
    assert own and [path for path in own if not np.abs(found.gradients[path]).max() > 0] == []
