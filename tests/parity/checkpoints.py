"""Load an HF checkpoint through the family's table, tensor by tensor: the plainest importer there can be."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from rave_jax.families import family_for
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import locate, named_parameters, with_values
from rave_jax.models.vlm import Vlm


def load(folder: Path, options: ModelOptions) -> Vlm:
    """The model of a checkpoint directory; every key must be used once and every backbone parameter filled."""
    hf = json.loads((folder / "config.json").read_text())
    family = family_for(hf)
    config = family.parse(hf)
    model = jax.eval_shape(lambda: Vlm(config, options, key=jax.random.key(0)))
    found = {family.canonical_key(key): value for key, value in load_file(folder / "model.safetensors").items()}
    rules = family.tensors(config)
    assert set(found) == {rule.hf_key for rule in rules}
    known = named_parameters(model)
    values: dict[str, np.ndarray] = {}
    for rule in rules:
        assert found[rule.hf_key].shape == rule.shape
        path, index = locate(model, rule)
        target = values.setdefault(path, np.full(known[path].shape, np.nan, np.float32))
        into = target if index is None else target[index]
        into[...] = found[rule.hf_key].reshape(into.shape)
    assert set(values) == set(known)
    assert all(np.isfinite(value).all() for value in values.values())
    return with_values(model, {path: jnp.asarray(value) for path, value in values.items()})
