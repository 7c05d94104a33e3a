"""`rave-jax calibrate sads`, `vhr`, `rave` and `var`: the files go into a model's options, and misuse is one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from rave_jax import config as machinery
from rave_jax.attention import MechanismConfig, Rave, Sads, Var, Vhr
from rave_jax.attention.calibrate.sads import HeadStats, SadsSearch, sparsify
from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.checkpoint.sidecar import options_text
from rave_jax.checkpoint.tiny import write_tiny
from rave_jax.data.synthetic import Synthetic
from rave_jax.evaluation.heads import blocks, head_stats, visual_mass, with_answer
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import Want
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.tools import source as sources
from rave_jax.tools.cli import main
from tests.tools.test_cli import SMALL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("heads") / "model", SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sads", "vhr", "rave"])
def test_what_is_found_goes_into_a_models_options(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    flags = {"sads": ["--start", "0", "--keep", "quarter"], "vhr": ["--alpha", "3"], "rave": ["--fraction", "0.25"]}
    assert main(["calibrate", name, str(folder), str(out), "--samples", "5", "--rows", "8", *flags[name]]) == 0
    said = capsys.readouterr().out
    assert "5 samples" in said and str(out) in said.replace("\n", "")
    found = machinery.loads(tuple[MechanismConfig, ...], out.read_text())
    assert all(isinstance(one, {"sads": Sads, "vhr": Vhr, "rave": Rave}[name]) for one in found)
    if name == "vhr":
        assert found and {one.alpha for one in found if isinstance(one, Vhr)} == {3.0}
    if name == "rave":
        count = sum(len(one.heads) * len(one.layers) for one in found if isinstance(one, Rave))
        assert count == round(0.25 * SMALL.num_layers * SMALL.num_heads)
    import_hf(folder, ModelOptions(mechanisms=found), make_mesh(MeshConfig()))


@pytest.mark.slow
def test_sink_dimensions_are_those_in_which_the_first_token_stands_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny(tmp_path / "model", dataclasses.replace(SMALL, num_layers=4))
    out, mesh = tmp_path / "found.json", make_mesh(MeshConfig())
    assert main(["calibrate", "var", str(folder), str(out), "--samples", "2", "--rows", "8", "--count", "3"]) == 0
    (found,) = machinery.loads(tuple[MechanismConfig, ...], out.read_text())
    # What enters the second and the third layer of the first token, which sees itself alone.
    processor, model = sources.processor_of(folder), import_hf(folder, ModelOptions(), mesh)
    (_, batch), *_ = blocks(processor, [with_answer(processor, Synthetic(split="heldout").build()[0])], mesh, 8)
    inputs = jax.jit(lambda model, batch: model.forward(batch, Want(inputs=True)).inputs)(model, batch)
    middle = np.asarray(inputs)[1:3, 0, 0]
    strength = np.mean(np.abs(middle) / np.sqrt(np.mean(middle**2, -1, keepdims=True)), 0)
    assert found == Var(tuple(np.argsort(-strength)[:3].tolist()))
    assert f"{found.dims[0]} ({strength.max():.1f})" in capsys.readouterr().out
    import_hf(folder, ModelOptions(mechanisms=(found,)), mesh)


@pytest.mark.slow
def test_blocks_of_samples_change_nothing(folder: Path) -> None:
    """What is measured of samples together is the mean of what is measured of each."""
    processor, mesh = sources.processor_of(folder), make_mesh(MeshConfig())
    source, model = Synthetic(split="heldout").build(), import_hf(folder, ModelOptions(), mesh)
    examples = [with_answer(processor, source[n]) for n in range(10)]
    whole = head_stats(model, processor, examples, mesh, 8)
    halves = [head_stats(model, processor, some, mesh, 8) for some in (examples[:5], examples[5:])]
    for name in HeadStats._fields:
        mean = np.mean([getattr(half, name) for half in halves], axis=0)
        np.testing.assert_allclose(getattr(whole, name), mean, rtol=1e-4, atol=1e-6)
    assert np.all((whole.peak > 0) & (whole.peak < 1)) and np.all((whole.entropy > 0) & (whole.entropy <= 1))
    assert np.all(whole.variance > 0) and np.all((whole.sparsity >= 0) & (whole.sparsity <= 1))
    masses = [visual_mass(model, processor, some, mesh, 8) for some in (examples, examples[:5], examples[5:])]
    np.testing.assert_allclose(masses[0], (masses[1] + masses[2]) / 2, rtol=1e-4)
    assert np.all((masses[0] > whole.peak) & (masses[0] < 1)), "a sum over visual tokens is more than the largest"
    sparsify(SadsSearch(start=0), whole, model.config.text.num_kv_heads)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sads", "--jump", "0.5"], "jump"),
        (["sads", "--keep", "all"], "all"),
        (["vhr", "--last", "-1"], "last"),
        (["rave", "--fraction", "0"], "fraction"),
        (["var", "--count", "0"], "count"),
        (["var"], "Var.layers is 'inner', all layers that attend but the first two and the last"),
        (["vhr", "--data", "{tmp}/text.jsonl"], "has no picture"),
    ],
)
def test_misuse_is_one_line(
    words: list[str], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.jsonl").write_text('{"question": "What?", "answers": ["This."]}\n')
    name, *given = words
    given = [word.format(tmp=tmp_path) for word in given]
    try:
        code = main(["calibrate", name, str(folder), str(tmp_path / "out.json"), *given])
    except SystemExit as stopped:
        code = stopped.code
    err = capsys.readouterr().err
    assert code == 2 and said in err and err.count("\n") == 1, err


def test_a_model_that_has_the_mechanism_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    has = tmp_path / "has"
    has.mkdir()
    for file in folder.iterdir():
        (has / file.name).symlink_to(file)
    (has / "rave_jax.json").unlink(missing_ok=True)
    (has / "rave_jax.json").write_text(options_text(ModelOptions(mechanisms=(Sads(heads=(1,)),))))
    assert main(["calibrate", "sads", str(has), str(tmp_path / "out.json")]) == 2
    assert "has Sads already" in capsys.readouterr().err
