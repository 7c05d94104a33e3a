"""The extra mlp: the stated formula, nothing at its start, named, counted and exported."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.checkpoint.hf_export import export_hf
from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.checkpoint.tiny import Tiny, tiny_config, write_tiny_files
from rave_jax.config import ConfigError
from rave_jax.models.config import ExtraMlp, ModelOptions
from rave_jax.models.extra_mlp import ParallelMlp
from rave_jax.models.parameters import named_parameters, with_values
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from tests.models.layout import batch, document
from tests.models.made import model as made

SIZES = Tiny(
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    mlp_size=16,
    vision_hidden_size=16,
    vision_layers=1,
    vision_heads=2,
    vision_mlp_size=16,
)
CONFIG = tiny_config(SIZES)
OPTIONS = ModelOptions(extra_mlp=ExtraMlp(3))
BATCH = batch([[document([7], CONFIG, np.random.default_rng(0))]], CONFIG, tokens=8, patches=0)
EXTRA = {"down": (2, 3, 16), "up": (2, 16, 3)}
RUN = "decoder.layer_runs.0.layers.extra_mlp."


@jax.jit
def hidden(model: Vlm) -> jax.Array:
    return model.forward(BATCH).hidden


def test_it_is_the_stated_formula() -> None:
    mlp = ParallelMlp(4, 3, dtype=jnp.dtype("float32"), key=jax.random.key(0))
    rng = np.random.default_rng(0)
    assert np.any(mlp.down[...] != 0) and not np.any(mlp.up[...])
    up, x = rng.normal(size=(4, 3)), rng.normal(size=(1, 5, 4))
    mlp.up[...] = jnp.asarray(up, jnp.float32)
    inner = x @ np.float64(mlp.down[...]).T
    np.testing.assert_allclose(mlp(jnp.asarray(x, jnp.float32)), inner / (1 + np.exp(-inner)) @ up.T, atol=1e-6)


def test_a_model_starts_as_the_one_without_and_has_the_stated_parameters() -> None:
    model = made(CONFIG, OPTIONS)
    extra = {path.removeprefix(RUN): p for path, p in named_parameters(model).items() if path.startswith(RUN)}
    assert {name: p.shape for name, p in extra.items()} == EXTRA
    without = {path: p[...] for path, p in named_parameters(model).items() if not path.startswith(RUN)}
    plain = with_values(jax.eval_shape(lambda: Vlm(CONFIG, ModelOptions(), key=jax.random.key(0))), without)
    zero = with_values(model, {f"{RUN}up": jnp.zeros(EXTRA["up"])})
    np.testing.assert_array_equal(hidden(zero), hidden(plain))
    assert np.abs(hidden(model) - hidden(plain)).max() > 1e-3


def test_it_is_exported_beside_the_weights_and_comes_back(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    write_tiny_files(tmp_path / "files", SIZES)
    model = made(CONFIG, OPTIONS)
    export_hf(model, tmp_path / "out", tmp_path / "files")
    back = import_hf(tmp_path / "out", OPTIONS, make_mesh(MeshConfig(), jax.devices()[:1]))
    for path, param in named_parameters(model).items():
        np.testing.assert_array_equal(param[...], named_parameters(back)[path][...])
    assert "an extra mlp of width 3 in all layers" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match="was written with extra_mlp ExtraMlp"):
        import_hf(tmp_path / "out", ModelOptions(), make_mesh(MeshConfig(), jax.devices()[:1]))


def test_a_width_that_no_mlp_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"extra_mlp.width is 0, expected a number from 1 to 8,192"):
        ExtraMlp(0)
