"""Export: byte-equal, whole or not at all, and everything comes back with the side-car."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from rave_jax.attention import Rave
from rave_jax.checkpoint import native
from rave_jax.checkpoint.card import Origin
from rave_jax.checkpoint.hf_export import copy_small_files, export_hf, number_type
from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.checkpoint.safetensors_file import CheckpointError, Planned
from rave_jax.checkpoint.written_whole import written_whole
from rave_jax.layout import ContextTokens
from rave_jax.models.config import Lora, ModelOptions
from rave_jax.models.parameters import named_parameters, with_values
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from tests.checkpoint.conftest import Tensors, Write

OPTIONS = ModelOptions(
    mechanisms=(Rave(rank=2, layers=(0, 2)),),
    context=ContextTokens(3),
    lora=Lora(rank=2, targets=("decoder.mlp.up", "vision.attention.qkv")),
)


def all_tensors(folder: Path) -> Tensors:
    return {key: value for file in folder.glob("model*.safetensors") for key, value in load_file(file).items()}


def assert_same_bytes(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and ours[key].shape == value.shape
        assert ours[key].tobytes() == value.tobytes(), key


def shaken(model: Vlm) -> Vlm:
    """Other numbers in every parameter, as training would leave them."""
    params = named_parameters(model)
    values = {p: np.asarray(v[...]) + np.float32(0.25 + n) for n, (p, v) in enumerate(params.items())}
    return with_values(model, {p: jax.device_put(value, params[p][...].sharding) for p, value in values.items()})


def assert_same_models(one: Vlm, other: Vlm) -> None:
    ours, theirs = named_parameters(one), named_parameters(other)
    assert ours.keys() == theirs.keys()
    for path in ours:
        assert np.array_equal(np.asarray(ours[path][...]), np.asarray(theirs[path][...])), path


@pytest.mark.parametrize(
    ("bfloat16", "other_style"),
    [
        (False, False),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
        (True, True),
    ],
)
def test_an_unchanged_import_is_written_byte_equal(
    write: Write, tmp_path: Path, other_style: bool, bfloat16: bool
) -> None:
    source = write(shards=2, bfloat16=bfloat16, other_style=other_style)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    (source / "generation_config.json").write_text('{ "eos_token_id": [5, 3]}')
    model = import_hf(source, mesh=mesh, dtypes="stored")
    out = export_hf(model, tmp_path / "out", source, max_shard_bytes=20_000)
    assert_same_bytes(all_tensors(out), all_tensors(source))
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {name: (out / name).stat().st_size for name in set(index["weight_map"].values())}
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in all_tensors(out).values())
    assert not (out / "rave_jax.json").exists() and not (out / "rave_jax.safetensors").exists()


def test_a_cast_there_and_back_loses_nothing(write: Write, tmp_path: Path) -> None:
    source = write(bfloat16=True)
    out = export_hf(import_hf(source, ModelOptions()), tmp_path / "out", source, dtype="bfloat16")
    assert_same_bytes(all_tensors(out), all_tensors(source))


def test_the_config_states_the_number_type_of_what_is_written(write: Write, tmp_path: Path) -> None:
    """transformers rounds to what is stated, for which older configs have another name, and parts one of their own."""
    source = write(bfloat16=True)
    config = json.loads((source / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    config["vision_config"]["dtype"] = "bfloat16"
    (source / "config.json").write_text(json.dumps(config))
    out = export_hf(import_hf(source, ModelOptions()), tmp_path / "out", source)
    says = json.loads((out / "config.json").read_text())
    assert says["torch_dtype"] == says["vision_config"]["dtype"] == "float32"
    few, many = (Planned("key", np.dtype(kind), (n,)) for kind, n in (("float32", 3), (ml_dtypes.bfloat16, 300)))
    assert number_type([few, many]) == "bfloat16" and number_type([few, many, few]) == "float32"


def test_the_sidecar_brings_everything_back(write: Write, tmp_path: Path) -> None:
    source = write()
    model = shaken(import_hf(source, OPTIONS))
    out = export_hf(model, tmp_path / "out", source, lora="beside")
    names = set(load_file(out / "rave_jax.safetensors"))
    assert "decoder.layers.2.mechanisms.0.key_proj" in names
    assert "vision.layers.1.attention.qkv.adapter.up" in names and "context.weight" in names
    assert not any(name.startswith("decoder.layers.1.mechanisms") for name in names)
    again = import_hf(out, mesh=make_mesh(MeshConfig(fsdp=4, tensor=2)))
    assert again.options == OPTIONS
    assert_same_models(again, model)
    second = export_hf(again, tmp_path / "second", out, lora="beside")
    for name in ("model.safetensors", "rave_jax.safetensors", "rave_jax.json", "config.json"):
        assert (second / name).read_bytes() == (out / name).read_bytes()


def test_a_sidecar_serves_only_what_it_was_written_for(write: Write, tmp_path: Path) -> None:
    source = write()
    out = export_hf(import_hf(source, OPTIONS), tmp_path / "out", source, lora="beside")
    with pytest.raises(CheckpointError, match="was written with mechanisms"):
        import_hf(out, ModelOptions())
    with pytest.raises(CheckpointError, match=r"was written with context .*count=3.* None is asked for"):
        import_hf(out, dataclasses.replace(OPTIONS, context=None))
    (out / "rave_jax.safetensors").write_bytes((out / "rave_jax.safetensors").read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"\(rave_jax.safetensors\): truncated"):
        import_hf(out)
    (out / "rave_jax.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rave_jax\.safetensors: cannot be read"):
        import_hf(out)
    (out / "rave_jax.json").unlink()
    with pytest.raises(CheckpointError, match=r"'rave_jax' says that the model has more .* rave_jax\.json is missing"):
        import_hf(out)
    config = json.loads((out / "config.json").read_text())
    assert config["rave_jax"]["context"]["count"] == 3
    del config["rave_jax"]
    (out / "config.json").write_text(json.dumps(config))
    assert import_hf(out, ModelOptions()).options == ModelOptions()


def test_the_config_names_the_sidecar_that_belongs_to_it(write: Write, tmp_path: Path) -> None:
    source = write()
    out = export_hf(import_hf(source, ModelOptions(context=ContextTokens(3))), tmp_path / "out", source)
    other = export_hf(import_hf(source, ModelOptions(context=ContextTokens(2))), tmp_path / "other", source)
    for name in ("rave_jax.json", "rave_jax.safetensors"):
        (out / name).write_bytes((other / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"'rave_jax' says context .*'count': 3.*the files are of two models"):
        import_hf(out)
    # What was written before the key was: the side-car alone decides.
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    assert import_hf(out).options.context == ContextTokens(2)


def test_what_transformers_leaves_out_is_said_in_the_card(write: Write, tmp_path: Path) -> None:
    source = write()
    (source / "README.md").write_text("---\nlicense: other\n---\n# Base\n")
    out = export_hf(import_hf(source, OPTIONS), tmp_path / "out", source, origin=Origin("a: b", "Trained for 7 steps"))
    front, _, text = (out / "README.md").read_text().removeprefix("---\n").partition("---\n")
    rows = dict(line.split(": ", 1) for line in front.splitlines())
    assert json.loads(rows["base_model"]) == "a: b" and json.loads(rows["library_name"]) == "rave_jax"
    assert "Trained for 7 steps" in text and "Rave in layers 0, 2; 3 context tokens" in text and "is merged" in text
    assert "license: other" in (out / "BASE_README.md").read_text()
    second = export_hf(import_hf(out), tmp_path / "second", out)
    assert "license: other" in (second / "BASE_README.md").read_text()
    # A plain model has nothing to say, and keeps its own card byte for byte.
    plain = export_hf(import_hf(source), tmp_path / "plain", source)
    assert (plain / "README.md").read_bytes() == (source / "README.md").read_bytes()
    assert "rave_jax" not in json.loads((plain / "config.json").read_text())


def test_context_tokens_alone_make_a_sidecar_and_begin_from_the_seed(write: Write, tmp_path: Path) -> None:
    source, options = write(), ModelOptions(context=ContextTokens(2))
    one, other = (import_hf(source, options, key=jax.random.key(seed)) for seed in (0, 1))
    tables = [np.asarray(named_parameters(model)["context.weight"][...]) for model in (one, other)]
    assert not np.array_equal(*tables)
    again = import_hf(export_hf(one, tmp_path / "out", source))
    assert again.options == options
    np.testing.assert_array_equal(np.asarray(named_parameters(again)["context.weight"][...]), tables[0])
    with written_whole(tmp_path / "native", 0) as folder:
        assert folder is not None
        copy_small_files(source, folder, one.options)
        native.write_into(folder, one, other_key_style=False)
    assert_same_models(import_hf(tmp_path / "native"), again)


def test_a_native_checkpoint_goes_there_and_back(write: Write, tmp_path: Path) -> None:
    source = write(bfloat16=True, other_style=True)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    model = import_hf(source, dtypes="stored")
    with written_whole(tmp_path / "native", 0) as folder:
        assert folder is not None
        copy_small_files(source, folder, model.options)
        native.write_into(folder, model, other_key_style=True)
    again = import_hf(tmp_path / "native", mesh=mesh, dtypes="stored")
    assert_same_models(again, model)
    out = export_hf(again, tmp_path / "out", tmp_path / "native")
    assert_same_bytes(all_tensors(out), all_tensors(source))


@pytest.mark.slow
def test_a_native_checkpoint_comes_back_in_another_cut_of_the_stack(write: Write, tmp_path: Path) -> None:
    """With mechanisms that begin fresh, and in float32."""
    source = write(bfloat16=True, other_style=True)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    model = import_hf(source, dtypes="stored")
    with written_whole(tmp_path / "native", 0) as folder:
        assert folder is not None
        copy_small_files(source, folder, model.options)
        native.write_into(folder, model, other_key_style=True)
    gated = import_hf(tmp_path / "native", OPTIONS, mesh)
    assert_same_models(gated, import_hf(source, OPTIONS, mesh))


def test_a_damaged_native_checkpoint_is_one_line_that_names_the_file(write: Write, tmp_path: Path) -> None:
    source, folder = write(), tmp_path / "native"
    model = import_hf(source)
    with written_whole(folder, 0) as made:
        assert made is not None
        copy_small_files(source, made, model.options)
        native.write_into(made, model, other_key_style=False)
    files = [f for f in (folder / "parameters").rglob("*") if f.is_file()]
    largest = max(files, key=lambda f: f.stat().st_size)
    whole = largest.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (bytes(flipped), whole[:-7], b"", None):
        largest.unlink()
        if damaged is not None:
            largest.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{largest.name} .*convert the model again") as error:
            import_hf(folder)
        assert "\n" not in str(error.value)
    largest.write_bytes(whole)
    for file in files:
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(CheckpointError, match="missing"):
            import_hf(folder)
        file.write_bytes(content)
    assert_same_models(import_hf(folder), model)


def test_without_a_source_the_config_is_ours(write: Write, tmp_path: Path) -> None:
    source = write()
    (source / "generation_config.json").write_text('{"eos_token_id": [5, 3]}')
    model = import_hf(source)
    out = export_hf(model, tmp_path / "out")
    assert import_hf(out).config == model.config
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_a_destination_that_is_taken(write: Write, tmp_path: Path) -> None:
    source = write()
    model = import_hf(source)
    with pytest.raises(CheckpointError, match="not empty"):
        export_hf(model, source, source)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="not a directory"):
        export_hf(model, tmp_path / "file", source)
    with pytest.raises(CheckpointError, match="file is not a directory"):
        export_hf(model, tmp_path / "file" / "below", source)
    (tmp_path / "empty").mkdir()
    export_hf(model, tmp_path / "empty", source)


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_refuses_leaves_nothing(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    source = write()
    model = import_hf(source)

    def refuse(_: int) -> None:
        raise OSError(code, os.strerror(code))

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match=f"cannot write .*out: {os.strerror(code)}"):
        export_hf(model, tmp_path / "out", source)
    assert sorted(tmp_path.iterdir()) == before


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="bytes are needed"), written_whole(tmp_path / "out", 10**18):
        raise AssertionError("nothing may be written")
    assert list(tmp_path.iterdir()) == []
