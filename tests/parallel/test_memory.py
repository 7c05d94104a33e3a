"""What cannot fit into memory is refused before a byte of it is taken."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from rave_jax.config import ConfigError
from rave_jax.parallel import memory
from rave_jax.parallel.memory import check_memory
from rave_jax.parallel.mesh import MeshConfig, make_mesh


def test_devices_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), ()))
    for sharding, copies in ((split, 2), (whole, 8), (SingleDeviceSharding(jax.devices()[0]), 1)):
        tree = {"a": jax.ShapeDtypeStruct((1000, 10), jnp.bfloat16, sharding=sharding)}
        monkeypatch.setattr(memory, "host_memory", lambda copies=copies: 20_000 * copies)
        check_memory(tree, "the parameters")
        monkeypatch.setattr(memory, "host_memory", lambda copies=copies: 20_000 * copies - 1)
        with pytest.raises(ConfigError, match=r"^the parameters need .* GB of memory, but this machine has .* GB: "):
            check_memory(tree, "the parameters")


def test_a_machine_has_memory() -> None:
    assert 1e8 < memory.host_memory() < 1e15
