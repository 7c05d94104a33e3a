"""Directories and keys that people meet and that are no sound checkpoint: one message on what it is and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from rave_jax.checkpoint.hf_import import import_hf, load_config
from rave_jax.checkpoint.safetensors_file import CheckpointError
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.tools.cli import main
from tests.checkpoint.conftest import Tensors, Write

POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12345\n"
)


def error_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        import_hf(folder)
    return str(error.value)


def with_config(folder: Path, **keys: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return folder


@pytest.mark.parametrize("names", [("model.safetensors",), ("config.json",), ("tokenizer.json", "model.safetensors")])
def test_pointers_of_git_lfs(write: Write, names: tuple[str, ...]) -> None:
    folder = write()
    for name in names:
        (folder / name).write_text(POINTER)
    message = error_of(folder)
    assert "git lfs pull" in message and all(name in message for name in names) and "\n" not in message


@pytest.mark.parametrize(
    ("stated", "method"),
    [
        ({"quant_method": "fp8", "fmt": "e4m3"}, "'fp8'"),
        ({"quant_method": "awq", "bits": 4}, "'awq'"),
        ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "'compressed-tensors'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "'bitsandbytes'"),
        ({"load_in_8bit": True}, "'bitsandbytes'"),
        ({"bits": 4}, "bits"),
    ],
)
def test_quantized_releases(write: Write, stated: dict, method: str) -> None:
    message = error_of(with_config(write(), quantization_config=stated))
    assert "quantization_config" in message and method in message and "bfloat16" in message and "\n" not in message


def test_a_config_that_names_no_quantization_is_read(write: Write) -> None:
    unused = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}
    for n, stated in enumerate((None, {}, unused)):
        load_config(with_config(write(name=f"folder{n}"), quantization_config=stated))


def test_quantized_weights_without_a_word_in_the_config(write: Write) -> None:
    def quantize(tensors: Tensors) -> None:
        for key in [key for key in tensors if "mlp.up_proj.weight" in key]:
            tensors[key] = tensors[key].astype(ml_dtypes.float8_e4m3fn)
            tensors[key.replace(".weight", ".weight_scale_inv")] = np.ones((1, 1), np.float32)

    message = error_of(write(quantize))
    assert "5 tensors belong to quantized weights" in message and "weight_scale_inv: no parameter" not in message


@pytest.mark.parametrize("other_style", [False, True])
@pytest.mark.parametrize(
    ("prefix", "why"),
    [
        ("_orig_mod.", "torch.compile"),
        ("module.", "DataParallel"),
        ("base_model.model.", "PEFT"),
        ("module._orig_mod.", "torch.compile"),
        ("net.", "without its wrapper"),
    ],
)
def test_keys_with_a_prefix_are_explained_once(write: Write, prefix: str, why: str, other_style: bool) -> None:
    folder = write(other_style=other_style)
    rename(folder, lambda key: prefix + key)
    message = error_of(folder)
    assert f"keys begin with {prefix!r}" in message and why in message and "\n" not in message


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Other keys in a file whose tensors stay."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    header = json.dumps({key if key == "__metadata__" else change(key): v for key, v in entries.items()}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def test_an_inner_part_of_a_model_is_explained_once(write: Write) -> None:
    folder = write(other_style=True)
    rename(folder, lambda key: key.removeprefix("model."))
    message = error_of(folder)
    assert "keys lack 'model.' in front" in message and "\n" not in message


def test_a_peft_adapter_is_not_taken_for_a_model(write: Write, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    message = error_of(adapter)
    assert "PEFT adapter" in message and "convert from-hf" in message and "--base" in message
    folder = write()
    (folder / "adapter_config.json").write_text("{}")
    message = error_of(folder)
    assert "beside a whole model" in message and "delete" in message and "--base" in message


def test_shards_without_their_index(write: Write) -> None:
    folder = write(shards=3)
    (folder / "model.safetensors.index.json").unlink()
    message = error_of(folder)
    assert "holds 3 of 3 shards" in message and "model.safetensors.index.json" in message
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "holds 2 of 3 shards" in error_of(folder)
    assert main(["inspect", str(folder)]) == 2
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "lists no tensors" in error_of(folder)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("pytorch_model.bin", "pickles"),
        ("model-q4_0.gguf", "GGUF"),
        ("flax_model.msgpack", "Flax"),
        ("tf_model.h5", "TensorFlow"),
        ("consolidated.safetensors", "Mistral"),
        ("weights/model.safetensors", "weights/model.safetensors"),
        ("diffusion_model.safetensors", "under the usual name"),
    ],
)
def test_weights_in_another_form_or_place(write: Write, name: str, kind: str) -> None:
    folder = write()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / "model.safetensors").rename(folder / name)
    message = error_of(folder)
    assert kind in message and str(folder) in message and "\n" not in message


def test_a_path_beside_the_model(write: Write, tmp_path: Path) -> None:
    folder = write(name="snapshots")
    assert f"{folder.name} inside does; give one of those" in error_of(folder.parent)
    assert "is a file; expected the directory that holds config.json" in error_of(folder / "model.safetensors")
    assert "hf download Qwen/Qwen2.5-VL-3B-Instruct" in error_of(Path("Qwen/Qwen2.5-VL-3B-Instruct"))
    assert "hf download" not in error_of(tmp_path / "nowhere")
    (folder / "config.json").write_text('{"type": "TrainConfig"}')
    assert "is the directory of a training run" in error_of(folder) and "convert to-hf" in error_of(folder)


def test_of_two_tied_tensors_either_may_be_stored(write: Write) -> None:
    def keep_the_head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    model = import_hf(write(keep_the_head, config=tiny(vocab_size=64, tie_embeddings=True)))
    assert model.lm_head is None and model.embed.weight.shape[0] == 64


def test_flags_that_contradict_the_tensors(write: Write) -> None:
    message = error_of(write(lambda tensors: tensors.pop("lm_head.weight"), name="untied"))
    assert "lm_head.weight: missing" in message and "tie_word_embeddings" in message and "\n" not in message
    nested = write(name="tied")
    hf = json.loads((nested / "config.json").read_text())
    vision = hf.pop("vision_config")
    text = hf | {"tie_word_embeddings": True}
    hf = {"model_type": "qwen2_5_vl", "vision_config": vision, "text_config": text, "tie_word_embeddings": False}
    (nested / "config.json").write_text(json.dumps(hf))
    message = error_of(nested)
    assert "tie_word_embeddings" in message and "the two differ" in message and "\n" not in message


@pytest.mark.parametrize(
    ("stated", "said"), [("torch.bfloat16", "bfloat16"), ("float16", "float16"), ("fp8", None), ([1], None)]
)
def test_inspect_knows_number_types_as_configs_write_them(
    write: Write, capsys: pytest.CaptureFixture[str], stated: object, said: str | None
) -> None:
    folder = with_config(write(), torch_dtype=stated)
    (folder / "model.safetensors").unlink()
    assert main(["inspect", str(folder)]) == (2 if said is None else 0)
    output = capsys.readouterr()
    assert f"bytes are for {said}, as in config.json" in output.out if said else "dtype is" in output.err
