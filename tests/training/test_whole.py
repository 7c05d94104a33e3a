"""Large parameters that a mesh cannot split are refused by name, before anything is paid for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from rave_jax.config import ConfigError
from rave_jax.families.qwen2_5_vl.presets import qwen2_5_vl_7b
from rave_jax.models.config import ModelOptions
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, abstract_mesh
from rave_jax.training.state import ModelGraph
from rave_jax.training.whole import LARGE, check_whole


def check(size: int, tensor: int, *, axis: str = "heads", allow: bool = False) -> None:
    mesh = abstract_mesh(MeshConfig(fsdp=2, tensor=tensor), 2 * tensor)
    shape = jax.ShapeDtypeStruct((size, 128, LARGE // (4 * 128 * size) + 2), jnp.float32)
    check_whole({"query.weight": shape}, {"query.weight": (axis, "head_dim", None)}, mesh, allow=allow)


def test_what_divides_passes() -> None:
    check(28, 4)


def test_what_does_not_divide_is_named_with_its_axis() -> None:
    with pytest.raises(ConfigError, match=r"tensor 8 does not divide the 28 heads of query\.weight.*allow_whole"):
        check(28, 8)


def test_it_can_be_allowed() -> None:
    check(28, 8, allow=True)


def test_devices_may_share_a_kv_head() -> None:
    check(4, 8, axis="kv_heads")


def test_small_parameters_may_stay_whole() -> None:
    mesh = abstract_mesh(MeshConfig(fsdp=2, tensor=8), 16)
    shape = jax.ShapeDtypeStruct((28, 128), jnp.float32)
    check_whole({"bias": shape}, {"bias": ("heads", "head_dim")}, mesh, allow=False)


def test_a_released_model_on_too_many_tensor_shards() -> None:
    model = jax.eval_shape(lambda key: Vlm(qwen2_5_vl_7b(), ModelOptions(), key=key), jax.random.key(0))
    graph = ModelGraph(model)
    check_whole(graph.shapes, graph.axes, abstract_mesh(MeshConfig(fsdp=64, tensor=4), 256), allow=False)
    with pytest.raises(ConfigError, match=r"tensor 8 does not divide the 28 heads of decoder\..*query"):
        check_whole(graph.shapes, graph.axes, abstract_mesh(MeshConfig(fsdp=32, tensor=8), 256), allow=False)
