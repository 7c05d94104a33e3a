"""`rave-jax calibrate debias` and `dyvte`: what they write goes into a model, and misuse is one line."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from rave_jax import config as machinery
from rave_jax.attention import Dyvte, MechanismConfig, Pruning
from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.checkpoint.tiny import write_tiny
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import named_parameters
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.tools import source as sources
from rave_jax.tools.cli import main
from tests.tools.test_cli import SMALL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tokens") / "model", SMALL)


@pytest.mark.slow
def test_the_bias_goes_into_a_models_options(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    flags = ["--samples", "5", "--rows", "8", "--layer", "0", "--keep", "0.25"]
    assert main(["calibrate", "debias", str(folder), str(out), *flags]) == 0
    assert "5 samples" in (said := capsys.readouterr().out) and "exp(" in said
    (found,) = machinery.loads(tuple[MechanismConfig, ...], out.read_text())
    assert isinstance(found, Pruning) and (found.keep, found.layers) == (0.25, (0,)) and found.slope != 0
    import_hf(folder, ModelOptions(mechanisms=(found,)), make_mesh(MeshConfig()))


def test_a_layer_that_nothing_stands_behind_is_refused_before_anything_is_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--samples", "1", "--layer", str(SMALL.num_layers - 1)]
    assert main(["calibrate", "debias", str(folder), str(tmp_path / "found.json"), *flags]) == 2
    assert "Pruning.layers names 1, the last layer" in capsys.readouterr().err


@pytest.mark.slow
def test_routers_are_trained_and_written_with_their_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "with_routers"
    flags = ["--samples", "6", "--rows", "8", "--steps", "6", "--width", "8", "--rate", "0.01"]
    assert main(["calibrate", "dyvte", str(folder), str(out), *flags]) == 0
    assert "6 samples, 6 steps" in capsys.readouterr().out
    model, *_ = sources.load(out)
    assert model.options.mechanisms == (Dyvte(width=8),)
    old, new = (named_parameters(one) for one in (import_hf(folder, ModelOptions(), make_mesh(MeshConfig())), model))
    routers = {path: value for path, value in new.items() if ".mechanisms." in path}
    assert len(routers) == 2 * (SMALL.num_layers - 1)
    assert any(np.any(value[...]) for path, value in routers.items() if path.endswith("second"))
    count = sum(np.sum(np.abs(np.asarray(jax.device_get(x[...]), np.float64))) for x in old.values())
    same = sum(
        np.sum(np.abs(np.asarray(jax.device_get(x[...]), np.float64))) for path, x in new.items() if path not in routers
    )
    assert same == pytest.approx(count, rel=1e-12), "the backbone is as it was"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["debias", "{tmp}/out.json", "--keep", "1"], "keep"),
        (["dyvte", "{tmp}/out", "--steps", "0"], "steps"),
        (["dyvte", "{tmp}"], "it exists; expected a new directory"),
    ],
)
def test_misuse_is_one_line(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, *given = [word.format(tmp=tmp_path) for word in words]
    try:
        code = main(["calibrate", name, str(tmp_path / "never read"), *given])
    except SystemExit as stopped:
        code = stopped.code
    err = capsys.readouterr().err
    assert code == 2 and said in err and err.count("\n") == 1, err
