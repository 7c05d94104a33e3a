"""Small random models, made without compiling an initialiser."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from rave_jax.families.config import VlmConfig
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import named_parameters, with_values
from rave_jax.models.vlm import Vlm


def model(config: VlmConfig, options: ModelOptions = ModelOptions(), seed: int = 0) -> Vlm:  # noqa: B008  # frozen
    """Random numbers in every parameter, mechanisms and adapters too: nothing stands at a neutral start."""
    abstract = jax.eval_shape(lambda: Vlm(config, options, key=jax.random.key(0)))
    rng = np.random.default_rng(seed)
    values = {}
    for path, param in named_parameters(abstract).items():
        wide = path.endswith("weight") and param.ndim > 1 and "norm" not in path
        fan = np.prod(param.shape[-1:]) if wide else 4
        value = rng.standard_normal(param.shape) / np.sqrt(fan) + ("norm" in path)
        values[path] = jnp.asarray(value, param.dtype)
    return with_values(abstract, values)
