"""The `rave-jax` command: what it prints and writes, and one line with exit code 2 for input it cannot use."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from rave_jax.checkpoint.tiny import VOCAB_SIZE, Tiny, write_tiny
from rave_jax.tools.cli import main

SMALL = Tiny(hidden_size=32, num_layers=2, mlp_size=48, vision_hidden_size=16, vision_heads=2, vision_mlp_size=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model", SMALL)


def request_file(tmp_path: Path, messages: object) -> Path:
    picture = np.random.default_rng(0).integers(0, 256, (97, 151, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    path = tmp_path / "request.json"
    path.write_text(json.dumps(messages))
    return path


def asked(*parts: dict) -> list[dict]:
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "7"}]


def test_convert_there_and_back(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, back, half = tmp_path / "native", tmp_path / "back", tmp_path / "half"
    assert main(["convert", "from-hf", str(folder), str(there)]) == 0
    assert main(["convert", "to-hf", str(there), str(back)]) == 0
    ours, theirs = ({f.name: f.read_bytes() for f in d.iterdir()} for d in (back, folder))
    assert ours == theirs
    assert main(["convert", "to-hf", str(there), str(half), "--dtype", "bfloat16", "--max-shard-size", "20KB"]) == 0
    files = list(half.glob("*.safetensors"))
    assert len(files) > 1 and all(str(v.dtype) == "bfloat16" for f in files for v in load_file(f).values())
    assert capsys.readouterr().err == ""


def test_logits_of_directory_and_native_checkpoint(folder: Path, tmp_path: Path) -> None:
    picture, text = {"type": "image", "image": "picture.png"}, {"type": "text", "text": "What?"}
    request = request_file(tmp_path, asked(picture, text, picture))
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "native")]) == 0
    for source, name in ((folder, "one.npz"), (tmp_path / "native", "two.npz")):
        assert main(["logits", str(source), str(request), str(tmp_path / name)]) == 0
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert one["logits"].dtype == np.float32 and one["logits"].shape == (len(one["input_ids"]), VOCAB_SIZE)
    assert np.isfinite(one["logits"]).all() and np.array_equal(one["logits"], two["logits"])
    assert (one["input_ids"] == 261).sum() == 2 * 3 * 5  # 97 x 151 becomes 84 x 140: 3 x 5 merge units


def test_inspect_counts_every_byte(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    size = sum(value.nbytes for value in load_file(folder / "model.safetensors").values())
    assert f"{size:,} bytes" in out
    assert "decoder.layer_runs.0.layers.attention.query.weight" in out and "2 x 4 x 8 x 32" in out


def test_inspect_of_a_bare_config(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(shared_data / "configs" / "qwen2.5-vl-7b-instruct")]) == 0
    assert "16,584,333,312 bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["convertt"],
        ["convert", "from-hf"],
        ["convert", "to-hf", "{folder}", "{tmp}/out", "--max-shard-size", "5XB"],
        ["convert", "to-hf", "{folder}", "{tmp}/out", "--step", "3"],
        ["convert", "from-hf", "{tmp}/nowhere", "{tmp}/out"],
        ["convert", "from-hf", "{folder}", "{folder}"],
        ["inspect", "{tmp}"],
        ["logits", "{folder}", "{tmp}/nowhere.json", "{tmp}/out.npz"],
        ["logits", "{folder}", "{folder}/config.json", "{tmp}/out.npz"],
    ],
)
def test_misuse_is_one_line(
    arguments: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [text.format(folder=folder, tmp=tmp_path) for text in arguments]
    try:
        code = main(given)
    except SystemExit as stopped:
        code = stopped.code
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("rave-jax") and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == []


def test_a_conversation_of_more_tokens_than_positions_is_refused_before_it_is_computed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rave_jax.inference.forward.collate", None)  # what comes before anything is computed
    small = tmp_path / "small"
    shutil.copytree(folder, small)
    config = json.loads((small / "config.json").read_text())
    (config.get("text_config") or config)["max_position_embeddings"] = 50
    config["max_position_embeddings"] = 50
    (small / "config.json").write_text(json.dumps(config))
    for text, said in (("a " * 60, "the conversation has "), ("a" * 3_000_000, "the text has 3000000 characters")):
        request = request_file(tmp_path, [{"role": "user", "content": text}])
        assert main(["logits", str(small), str(request), str(tmp_path / "out.npz")]) == 2
        err = capsys.readouterr().err
        assert said in err and "the model has 50 positions" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "missing.png"},
        {"type": "image", "image": "request.json"},
        {"type": "image", "image": "https://example.com/a.png"},
        {"type": "image"},
        {"type": "sound", "sound": "a.wav"},
        {"type": "text", "text": 3},
        {"type": "video", "video": "a.mp4"},
        "words",
    ],
)
def test_requests_that_cannot_be_used(
    part: dict, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = request_file(tmp_path, [{"role": "user", "content": [part]}])
    assert main(["logits", str(folder), str(request), str(tmp_path / "out.npz")]) == 2
    err = capsys.readouterr().err
    assert str(request) in err and err.count("\n") == 1
    assert not (tmp_path / "out.npz").exists()


def test_an_output_that_cannot_be_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = request_file(tmp_path, asked({"type": "text", "text": "a"}))
    assert main(["logits", str(folder), str(request), str(request / "below.npz")]) == 2
    assert "cannot write" in capsys.readouterr().err
    pipe, link, file = (tmp_path / name for name in ("pipe", "link.npz", "file.npz"))
    os.mkfifo(pipe)
    assert main(["logits", str(folder), str(request), str(pipe)]) == 2
    assert "is not a file" in capsys.readouterr().err and pipe.is_fifo()
    link.symlink_to(file)
    assert main(["logits", str(folder), str(request), str(link)]) == 0
    assert link.is_symlink() and "logits" in np.load(file)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("config.json", "num_attention_heads", 0),
        ("config.json", "hidden_size", "32"),
        ("config.json", "num_hidden_layers", 2.5),
        ("config.json", "rope_scaling", "default"),
        ("config.json", "model_type", ["qwen2_5_vl"]),
        ("config.json", "vision_config", [1]),
        ("preprocessor_config.json", "min_pixels", "5"),
        ("preprocessor_config.json", "image_mean", 5),
        ("preprocessor_config.json", "rescale_factor", "x"),
        ("preprocessor_config.json", "patch_size", 0),
        ("preprocessor_config.json", "merge_size", 1),
        ("tokenizer_config.json", "chat_template", "{% if %}"),
        ("tokenizer_config.json", "chat_template", "{{ raise_exception('no') }}"),
        ("tokenizer.json", "model", None),
    ],
)
def test_a_model_directory_with_a_bad_value_is_one_line(
    name: str, key: str, value: object, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    file = broken / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    request = request_file(tmp_path, asked({"type": "text", "text": "a"}, {"type": "image", "image": "picture.png"}))
    assert main(["logits", str(broken), str(request), str(tmp_path / "out.npz")]) == 2
    err = capsys.readouterr().err
    assert str(broken) in err or "chat template" in err or "tokenizer" in err
    assert "Traceback" not in err and not (tmp_path / "out.npz").exists()
