"""Which backend serves: what `auto` takes on which devices, and what is said where one cannot serve."""

from __future__ import annotations

import logging
from typing import Any

import jax
import pytest

from rave_jax.kernels.attention import OPERATION as ATTENTION
from rave_jax.kernels.dispatch import Backend, Operation
from rave_jax.kernels.routed.api import OPERATION as ROUTED
from rave_jax.kernels.routed.gather.api import OPERATION as GATHERED
from rave_jax.parallel.sharding import use_mesh
from tests.kernels import test_attention, test_pallas_tpu, test_routed, test_routed_tpu
from tests.kernels.attention_backend import AttentionBackend
from tests.kernels.routed_backend import RoutedBackend


def operation() -> Operation:
    """Sums, which a TPU kernel makes of at most ten numbers and is not worth it for fewer than three."""
    fused = Backend(
        sum,
        "fused",
        ("tpu",),
        lambda count: f"at most 10 numbers fit, not {count}" if count > 10 else None,
        lambda count: "few numbers are added one by one" if count < 3 else None,
    )
    return Operation("sums", {"xla": Backend(sum, "one by one"), "pallas_tpu": fused})


def on(platform: str, kind: str) -> Any:
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return use_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device))


@pytest.mark.parametrize(
    ("count", "name", "why"),
    [
        (5, "pallas_tpu", "fused, TPU v5 lite"),
        (11, "xla", "one by one; pallas_tpu cannot serve: at most 10 numbers fit, not 11"),
        (2, "xla", "few numbers are added one by one"),
    ],
)
def test_auto_takes_the_kernel_of_the_devices_where_it_serves(count: int, name: str, why: str, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "rave_jax.kernels"), on("tpu", "TPU v5 lite"):
        label = f"sums of {count}, here"
        assert [operation().choose("auto", count, label=label) for _ in range(2)] == [name] * 2
    assert [record.getMessage() for record in caplog.records] == [f"{label}: {name} ({why})"], "said once"


def test_without_a_kernel_for_the_devices_it_is_xla(caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "rave_jax.kernels"):
        assert operation().choose("auto", 5) == "xla"
    assert caplog.messages == ["sums: xla (one by one; the fused kernels are for TPUs)"]


def test_what_cannot_serve_is_refused_by_name() -> None:
    assert operation().choose("pallas_tpu", 2) == "pallas_tpu", "who asks for it gets it, worth it or not"
    with pytest.raises(ValueError, match="'cudnn' cannot serve sums; expected auto, xla, pallas_tpu"):
        operation().choose("cudnn", 2)
    with pytest.raises(ValueError, match="cannot serve sums: at most 10 numbers fit, not 12; expected auto, or xla"):
        operation().choose("pallas_tpu", 12)


@pytest.mark.parametrize("operation", [ATTENTION, ROUTED, GATHERED], ids=lambda operation: operation.name)
def test_every_operation_has_an_oracle_and_a_backend_for_whatever_is_asked(operation: Operation) -> None:
    assert {"reference", "xla"} <= set(operation.backends)
    for name in ("reference", "xla"):
        backend = operation.backends[name]
        assert not backend.platforms and backend.against(*[None] * 6) is None
    preferred = [platform for backend in operation.backends.values() for platform in backend.platforms]
    assert "tpu" in preferred and len(preferred) == len(set(preferred)), "one for each kind of device"


@pytest.mark.parametrize(
    ("operation", "rules", "modules"),
    [
        (ATTENTION, AttentionBackend, (test_attention, test_pallas_tpu)),
        (ROUTED, RoutedBackend, (test_routed, test_routed_tpu)),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_every_backend_inherits_the_tests_of_its_operation(operation: Operation, rules: type, modules: Any) -> None:
    classes = [x for module in modules for name, x in vars(module).items() if name.startswith("Test")]
    assert sorted(x.name for x in classes if issubclass(x, rules)) == sorted(operation.backends)
