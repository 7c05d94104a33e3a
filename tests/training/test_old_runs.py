"""A run from before optimizers had an `algorithm`: its config and its checkpoints are read as they are.

`old_run/` has what train.py of that time wrote: config.json of `tests/resume/small_run.py` with beta2 0.95 and a first
moment in bfloat16, and the names of the arrays of its optimizer state, as orbax lists them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from rave_jax import config as configs
from rave_jax.checkpoint.target import abstract_model
from rave_jax.checkpoint.tiny import Tiny, tiny_config
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.training.algorithms import AdamW
from rave_jax.training.config import TrainConfig, differences
from rave_jax.training.session import session_of
from tests.resume import small_run

OLD = Path(__file__).parent / "old_run"


def read() -> TrainConfig:
    return configs.loads(TrainConfig, (OLD / "config.json").read_text())


def name(key: Any) -> str:
    return str(next(getattr(key, of) for of in ("key", "idx", "name") if hasattr(key, of)))


def test_the_same_config_of_today_continues_it() -> None:
    today = small_run.get_config()
    optimizer = dataclasses.replace(today.optimizer, algorithm=AdamW(beta2=0.95, first_moment="bfloat16"))
    assert differences(read(), dataclasses.replace(today, optimizer=optimizer, steps=8, save_every=4)) == []
    assert differences(read(), dataclasses.replace(today, steps=8)) == [
        "optimizer.algorithm.beta2 is 0.999, was 0.95",
        "optimizer.algorithm.first_moment is 'float32', was 'bfloat16'",
    ]


def test_its_optimizer_state_has_the_names_of_today() -> None:
    """So a checkpoint is restored into it: orbax goes by names."""
    config = read()
    assert isinstance(config.init, Tiny)
    model = abstract_model(tiny_config(config.init), config.model)
    state = session_of(config, model, make_mesh(MeshConfig(), jax.devices()[:1])).state.optimizer
    arrays = jax.tree_util.tree_flatten_with_path(state)[0]
    assert sorted("/".join(map(name, path)) for path, _ in arrays) == (OLD / "optimizer.txt").read_text().split()
    first = {x.dtype.name for path, x in arrays if "mu" in map(name, path)}
    assert first == {"bfloat16"}
