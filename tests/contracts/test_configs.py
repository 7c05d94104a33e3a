"""Contracts of all configs: every field has help and is read, every file in configs/ is a run that lowers."""

from __future__ import annotations

import ast
import dataclasses
import tempfile
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh

from rave_jax import config as machinery
from rave_jax.checkpoint.hf_import import load_config
from rave_jax.checkpoint.tiny import Tiny
from rave_jax.command_line import _defaults, _options
from rave_jax.evaluation.config import Examination
from rave_jax.families.config import VlmConfig
from rave_jax.kernels.support import SMALL
from rave_jax.parallel.mesh import MeshConfig, abstract_mesh, make_mesh
from rave_jax.plan.models import model_of
from rave_jax.plan.program import largest_row, train_program
from rave_jax.study.config import Study
from rave_jax.training.config import TrainConfig
from rave_jax.training.init import FromHF, prepare

REPO = Path(__file__).resolve().parents[2]
FILES = sorted(p for p in (REPO / "configs").glob("*.py") if "def get_config(" in p.read_text())
DEVICES = 8
"""Devices of a config that takes as many as there are."""


def config_classes(kind: typing.Any) -> Iterator[type]:
    """Every dataclass that a config of this type can hold, itself included."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        yield kind
        for hint in typing.get_type_hints(kind).values():
            yield from config_classes(hint)
    for argument in typing.get_args(kind):
        yield from config_classes(argument)


CLASSES = sorted(
    set(config_classes(TrainConfig)) | set(config_classes(VlmConfig)) | set(config_classes(Study)),
    key=lambda c: c.__qualname__,
)

CLASSES_OF_COMMANDS = sorted(
    set(config_classes(TrainConfig)) | set(config_classes(Examination)), key=lambda c: c.__qualname__
)


@cache
def names_read() -> set[str]:
    """Attribute names, and names in `getattr`-like strings, that any code but a `__post_init__` uses."""
    found: set[str] = set()
    for path in [*(REPO / "rave_jax").rglob("*.py"), *REPO.glob("*.py")]:
        tree = ast.parse(path.read_text())
        checks = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "__post_init__"]
        skipped = {id(n) for check in checks for n in ast.walk(check)}
        found |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and id(n) not in skipped}
    return found


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_field_has_help_a_default_and_a_reader(cls: type) -> None:
    fields = dataclasses.fields(cls)
    names = {f.name for f in fields}
    helped = {name for base in cls.__mro__ if dataclasses.is_dataclass(base) for name in machinery.field_docs(base)}
    assert dict.fromkeys(names - helped) == {}, "fields without help"
    # No family is the one that others are compared with, so none is the default.
    stated = {"VlmConfig": ["family"]}.get(cls.__name__, [])
    assert [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING] == stated
    assert names - names_read() == set(), "fields that nothing reads"


def test_class_names_are_unique() -> None:
    """They are the type tags of JSON."""
    names = [cls.__name__ for cls in CLASSES]
    assert sorted(set(names)) == names


def test_the_configs_that_the_project_promises_exist() -> None:
    promised = {"quickstart", "synthetic_all", "qwen2_5_vl_7b_rave_sft", "llava_1_5_7b_rave_sft"}
    assert promised <= {path.stem for path in FILES}
    assert len([path for path in FILES if path.stem.startswith("quickstart_")]) >= 4, "four ablations"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_config_survives_its_resolved_form(path: Path) -> None:
    config = machinery.load_file(path)
    assert isinstance(config, TrainConfig)
    assert (ast.get_docstring(ast.parse(path.read_text())) or "").strip(), "a config says what it is for"
    assert machinery.loads(TrainConfig, machinery.dumps(config)) == config


def num_devices(config: TrainConfig) -> int:
    """Devices that the config is made for."""
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    given = 1
    for size in sizes:
        given *= max(size, 1)
    return given if -1 not in sizes else max(config.simulated_devices or DEVICES, given)


@cache
def model_config(init: FromHF | Tiny) -> VlmConfig:
    """The shapes of the checkpoint that a config starts from. It is written once for all that start from it."""
    if not isinstance(init, FromHF):
        with tempfile.TemporaryDirectory() as folder:
            prepare(init, Path(folder) / "model")
            return load_config(Path(folder) / "model")[0]
    return model_of(init)[0]


LOWERED = ("synthetic_all", "qwen2_5_vl_7b_rave_sft")
"""The others are slow tests: to trace a step takes 2 to 7 s."""


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem not in LOWERED)) for p in FILES]
)
def test_a_config_lowers_to_a_sharded_tpu_program(path: Path) -> None:
    """The whole train step, traced at its real shapes on a mesh without devices, as the TPU would get it."""
    config = machinery.load_file(path)
    mesh = abstract_mesh(config.mesh, num_devices(config), tpu_kind="TPU v5p")
    text = lowered_on(config, mesh)
    assert f"mhlo.num_partitions = {mesh.size}" in text
    if largest_row(config)[0] ** 2 > SMALL:
        assert "tpu_custom_call" in text, "attention over long rows runs in the fused kernels"


def lowered_on(config: TrainConfig, mesh: Mesh | AbstractMesh) -> str:
    """The train step as the TPU would get it, as text."""
    lowered = train_program(config, model_config(config.init), mesh).lowered
    state, metrics = lowered.out_info
    assert state.step.shape == metrics.loss.shape == ()
    return lowered.as_text()


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(("topology", "slices"), [("v6e:8x8", 1), ("v5p:4x4x4", 2)])
def test_the_released_config_lowers_on_real_chips(topology: str, slices: int, monkeypatch) -> None:
    """On the devices that libtpu describes, one slice and two. tests/parallel lays out meshes of every chip."""
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    several = {"num_slices": slices} if slices > 1 else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices
    config = machinery.load_file(REPO / "configs" / "qwen2_5_vl_7b_rave_sft.py")
    rows = dataclasses.replace(config.data, rows=len(devices) * config.optimizer.accumulation)
    mesh = make_mesh(config.mesh, devices)
    text = lowered_on(dataclasses.replace(config, data=rows), mesh)
    assert f"mhlo.num_partitions = {len(devices)}" in text
    assert "tpu_custom_call" in text


def test_a_config_that_does_not_fit_its_mesh_is_refused() -> None:
    config = TrainConfig(mesh=MeshConfig(data=3))
    with pytest.raises(machinery.ConfigError, match="mesh is data 3"):
        abstract_mesh(config.mesh, 8)


CHECKED_ELSEWHERE = {
    "seed": "any number serves",
    "data": "the mesh is held against the devices",
    "fsdp": "the mesh is held against the devices",
    "tensor": "the mesh is held against the devices",
    "context": "the mesh is held against the devices",
    "expert": "the mesh is held against the devices",
    "simulated_devices": "hosts.start refuses it before a device is made",
    "warmup": "a run has more steps than its warm-up",
    "frame": "a mosaic's frame is held against the size of the picture",
    "cached_groups": "only groups that are read are kept",
}


def numbers_of(cls: type) -> Iterator[tuple[str, type]]:
    """Its numeric fields."""
    for name, hint in typing.get_type_hints(cls).items():
        for kind in (int, float):
            if kind in _options(hint):
                yield name, kind


# An `Extension` is written by train.py and looked at by nobody; `Tiny` is checked as the model that it makes.
SIZED = [cls for cls in CLASSES_OF_COMMANDS if cls.__name__ != "Extension"]


@pytest.mark.parametrize("cls", SIZED, ids=lambda c: c.__name__)
def test_a_number_that_no_machine_has_is_refused_by_its_field(cls: type) -> None:
    """Before anything is made of it: 10^15 of something, and numbers that are none."""
    values = {f.name: getattr(_defaults(cls), f.name) for f in dataclasses.fields(cls)}
    values |= {name: "x" for name in ("name", "path") if values.get(name) == ""}
    for name, kind in numbers_of(cls):
        if name in CHECKED_ELSEWHERE and kind is int:
            continue
        with pytest.raises(machinery.ConfigError, match="expected" if cls is Tiny else name.rsplit("_", 1)[-1]):
            cls(**values | {name: 10**15 if kind is int else float("nan")})
