"""Names that do not change with how a stack is cut: layers by their global number.

Where a model cuts its stack into layer runs depends on its mechanisms. What is written beside a checkpoint, or read
into a model that is cut elsewhere, therefore goes by `decoder.layers.7.mechanisms.0.key_proj`.
"""

from __future__ import annotations

import re

from rave_jax.families import TensorRule, family_named
from rave_jax.models.parameters import Location, locate, named_parameters
from rave_jax.models.vlm import Vlm

STACKED = re.compile(r"(decoder|vision)\.layer_runs\.(\d+)\.layers\.(.+)")


def global_names(model: Vlm, path: str) -> list[str]:
    """The names of a parameter's layers in order; a parameter outside the stacks has its path alone."""
    match = STACKED.fullmatch(path)
    if match is None:
        return [path]
    stack, number, inner = match.groups()
    layers = model.decoder if stack == "decoder" else model.vision
    assert layers is not None, "its parameters are there"
    run = layers.layer_runs[int(number)]
    return [f"{stack}.layers.{n}.{inner}" for n in range(run.start, run.stop)]


def locations(model: Vlm) -> dict[str, Location]:
    """Where each global name stands in this model."""
    found: dict[str, Location] = {}
    for path in named_parameters(model):
        names = global_names(model, path)
        stacked = STACKED.fullmatch(path) is not None
        found |= {name: Location(path, n if stacked else None) for n, name in enumerate(names)}
    return found


def rules_of(model: Vlm, format: int = 0) -> tuple[TensorRule, ...]:
    """Every tensor that the model's family has in a HuggingFace checkpoint of this format (`Family.formats`)."""
    return family_named(model.config.family).formats[format](model.config)


def extra_parameters(model: Vlm) -> list[str]:
    """Paths of the parameters that a HuggingFace checkpoint cannot hold."""
    covered = {locate(model, rule).path for rule in rules_of(model)}
    return [path for path in named_parameters(model) if path not in covered]
