"""A model under other mechanisms: its layers are cut into other runs, and every parameter stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rave_jax.checkpoint.naming import global_names, locations
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import named_parameters, with_values
from rave_jax.models.vlm import Vlm
from rave_jax.typing import Array


def recut(model: Vlm, options: ModelOptions, added: Callable[[str], Any]) -> Vlm:
    """The model with other options, for mechanisms that stand behind those it has.

    Args:
        model: with parameters.
        options: of the result; a parameter that both have has one shape.
        added: the value of a parameter that the model does not have, by its global name (`naming.py`).
    """
    made = jax.eval_shape(lambda: Vlm(model.config, options, key=jax.random.key(0)))
    old, known = named_parameters(model), locations(model)

    def one(name: str) -> Array:
        if name not in known:
            return jnp.asarray(added(name))
        path, index = known[name]
        return old[path][...] if index is None else old[path][...][index]

    def value(path: str, shape: tuple[int, ...]) -> Array:
        names = global_names(made, path)
        return one(path) if names == [path] else jnp.stack([one(name) for name in names]).reshape(shape)

    return with_values(made, {path: value(path, param.shape) for path, param in named_parameters(made).items()})
