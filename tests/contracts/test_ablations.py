"""The controls of the quickstart are fair."""

from __future__ import annotations

from pathlib import Path

import jax

from rave_jax.checkpoint.tiny import Tiny, tiny_config
from rave_jax.config import load_file
from rave_jax.models.parameters import named_parameters
from rave_jax.models.vlm import Vlm

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def added(name: str, marker: str) -> int:
    """Parameters of the config's model whose path holds the marker."""
    config = load_file(CONFIGS / f"{name}.py")
    assert isinstance(config.init, Tiny)
    shapes = tiny_config(config.init)
    model = jax.eval_shape(lambda key: Vlm(shapes, config.model, key=key), jax.random.key(0))
    return sum(param.size for path, param in named_parameters(model).items() if marker in path)


def test_the_lora_control_has_no_fewer_extra_parameters_than_the_gate() -> None:
    # Of the ranks around it, 4 has 15 % more than the gate and 3 has 14 % fewer.
    assert (added("quickstart", ".mechanisms."), added("quickstart_lora_control", ".adapter.")) == (4 * 1448, 4 * 1664)
