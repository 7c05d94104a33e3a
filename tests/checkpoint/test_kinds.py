"""A path that is no model directory: what it is, and which command takes it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rave_jax.checkpoint.hf_files import hf_config, read_weights
from rave_jax.checkpoint.hf_import import load_config
from rave_jax.checkpoint.kinds import kind_of
from rave_jax.checkpoint.sidecar import saved_options
from rave_jax.config import ConfigError
from rave_jax.data.processor import Processor
from rave_jax.families import family_named
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.tools.source import is_run


@pytest.fixture
def home(tmp_path: Path) -> Path:
    files = {
        "run/config.json": '{"type": "TrainConfig"}',
        "run/checkpoints/100/x": "",
        "runs/a/config.json": "{}",
        "adapter/adapter_config.json": "{}",
        "gguf/model.gguf": "",
        "weights/model.safetensors": "",
        "other/readme": "",
        "pipeline/config.json": '{"_class_name": "UNet2DModel"}',
        "none/config.json": '{"model_type": null}',
        "list/config.json": "[]",
        "file": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("run", "run: is the directory of a training run, .* generate, logits, inspect and eval take a run as it is"),
        ("run", "`rave-jax convert to-hf .*run DIR` makes a model directory"),
        ("run/checkpoints", "is a part of the training run .*/run; give the run"),
        ("run/checkpoints/100", "is a part of the training run .*/run; give the run"),
        ("runs", "holds no config.json itself, but a inside does; give one of those"),
        ("adapter", "is a PEFT adapter and not a whole model"),
        ("gguf", "holds GGUF files; give a model directory that `rave-jax convert from-gguf FILE DIR` makes of one"),
        ("weights", "holds weights but no config.json"),
        ("other", "other: holds no config.json; expected a model directory in HuggingFace format, or a training run"),
        ("empty", "empty: is an empty directory; expected a model"),
        ("pipeline", "config.json: the key 'model_type' is missing; it is a UNet2DModel of diffusers"),
        ("none", "config.json: the key 'model_type' is missing"),
        ("list", "config.json: expected an object"),
        ("file", "file: is a file; expected the directory that holds config.json"),
        ("nowhere", "nowhere: no such directory$"),
    ],
)
def test_what_it_is_instead_is_said(name: str, says: str, home: Path) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        load_config(home / name)
    assert "\n" not in str(error.value)


def test_what_a_directory_is(home: Path) -> None:
    """By its files and by what its config.json says; whatever asks gets the same answer."""
    (home / "checkpoints" / "mine").mkdir(parents=True)
    for name, text in (
        ("begun/config.json", '{"type": "TrainConfig"}'),
        ("damaged/config.json", '{"type": "Tra'),
        ("damaged/checkpoints/1/x", ""),
        ("trainer/config.json", '{"model_type": "qwen2_5_vl"}'),
        ("trainer/checkpoints/1/x", ""),
        ("native/config.json", '{"model_type": "qwen2_5_vl"}'),
        ("native/native.json", "{}"),
        ("beside/config.json", '{"model_type": "qwen2_5_vl"}'),
        ("beside/adapter_config.json", "{}"),
    ):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    kinds = {
        "run": ("run", "begun", "damaged"),
        "native": ("native",),
        "model": ("trainer", "beside", "list", "pipeline"),
        "adapter": ("adapter",),
        "other": ("", "checkpoints", "checkpoints/mine", "run/checkpoints", "runs", "gguf", "empty", "file", "nowhere"),
    }
    for kind, names in kinds.items():
        assert {kind_of(home / name) for name in names} == {kind}
        for name in names:
            if kind in ("adapter", "other"):
                with pytest.raises(ConfigError):
                    is_run(home / name)
    assert is_run(home / "begun") and not is_run(home / "trainer") and not is_run(home / "native")


def test_the_model_folder_of_a_run_has_no_weights_of_its_own(home: Path) -> None:
    (home / "run" / "model").mkdir()
    with pytest.raises(ConfigError, match=r"run/model: holds no weights: it is a part of the training run .*/run, "):
        read_weights(home / "run" / "model")


def test_a_name_on_the_hub_is_no_directory() -> None:
    with pytest.raises(ConfigError, match="Qwen/Qwen2: no such directory; models are not downloaded"):
        hf_config(Path("Qwen/Qwen2"))


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "rave_jax.json",
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "pointer"])
def test_a_pipe_or_pointer_among_the_files_is_named_and_not_waited_on(kind: str, name: str, tmp_path: Path) -> None:
    config = tiny()
    (tmp_path / "config.json").write_text(json.dumps(family_named(config.family).render(config)))
    for other in ("preprocessor_config.json", "tokenizer.json"):
        (tmp_path / other).write_text('{"patch_size": 4}')
    (tmp_path / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ConfigError) as error:
        hf_config(tmp_path)
        saved_options(tmp_path)
        if name in ("model.safetensors", "model.safetensors.index.json"):
            problems = read_weights(tmp_path).problems
            raise ConfigError(problems[0])
        Processor.from_hf(tmp_path)
    assert name in str(error.value)
    assert ("named pipe" if kind == "pipe" else "git lfs pull") in str(error.value)
