"""A tower and a text model become one model: every number of both, and a projector from a seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from rave_jax.checkpoint.hf_import import import_hf, load_config
from rave_jax.checkpoint.join import join
from rave_jax.checkpoint.safetensors_file import CheckpointError
from rave_jax.checkpoint.tiny import Tiny, byte_tokenizer, write_tiny
from rave_jax.data.processor import Processor
from rave_jax.families.shared.vit import VitConfig, vit_tensors
from rave_jax.inference import Completion, Generator, Request, Sampling, SlotConfig
from rave_jax.models.parameters import named_parameters
from rave_jax.tools.cli import main
from tests.data.pictures import noise

TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 30,
    "patch_size": 7,
}
VIT = VitConfig(
    depth=2,
    hidden_size=16,
    num_heads=2,
    mlp_size=24,
    patch_size=7,
    image_size=30,
    kind="siglip",
    activation="gelu_pytorch_tanh",
    out_size=32,
)
SETTINGS = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 30, "width": 30},
    "resample": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def write_tower(folder: Path, **extra: np.ndarray) -> Path:
    """A checkpoint of both of SigLIP's encoders, of which only the tower matters."""
    rng = np.random.default_rng(5)
    folder.mkdir()
    rules = vit_tensors(VIT, "vision_model.")
    tensors = {rule.hf_key: rng.normal(size=rule.shape).astype(np.float32) for rule in rules}
    tensors |= {"logit_scale": np.zeros(1, np.float32), "vision_model.head.probe": np.zeros((1, 1, 16), np.float32)}
    save_file(tensors | extra, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": TOWER, "text_config": {}}))
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 whose tokenizer has the special tokens of pictures, as the released ones have."""
    folder = tmp_path_factory.mktemp("text") / "qwen3"
    write_tiny(folder, Tiny(family="qwen3", hidden_size=32, num_layers=2, mlp_size=48))
    byte_tokenizer("qwen2_5_vl").save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Path, Path, Path]:
    """The tower, the text model, and both in one."""
    folder = tmp_path_factory.mktemp("joined")
    tower, both = write_tower(folder / "siglip"), folder / "both"
    join(tower, text, both, seed=3)
    return tower, text, both


def test_the_command_writes_one_directory(
    parts: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tower, text, _), both = parts, tmp_path / "both"
    assert main(["convert", "join", str(tower), str(text), str(both), "--seed", "3"]) == 0
    said = capsys.readouterr().out
    assert f"{both}: llava in HuggingFace format, with the tower of {tower} and the decoder of {text}" in said
    assert "multi_modal_projector.linear_1.weight" in said and "random numbers of seed 3" in said
    assert "left out of the two, since the model does not compute it: 2 tensors" in said

    stored = load_file(both / "model.safetensors")
    for folder, prefix in ((tower, "vision_tower."), (text, "language_model.")):
        for key, value in load_file(folder / "model.safetensors").items():
            if key not in ("logit_scale", "vision_model.head.probe"):
                assert stored.pop(prefix + key).tobytes() == value.tobytes(), key
    assert sorted(stored) == [f"multi_modal_projector.linear_{n}.{name}" for n in (1, 2) for name in ("bias", "weight")]
    assert 0.5 < stored["multi_modal_projector.linear_1.weight"].std() * 16**0.5 < 2


def test_the_directory_is_a_model_with_pictures(parts: tuple[Path, Path, Path]) -> None:
    """Its tower reads pictures of one size, 4 x 4 patches and no class token; the answer comes from both."""
    both = parts[2]
    config, family = load_config(both)
    assert (family.model_type, config.text.family, config.text.qk_norm) == ("llava", "qwen3", True)
    processor, model = Processor.from_hf(both), import_hf(both)
    assert processor.count_tokens(80, 20) == processor.count_tokens(30, 30) == 16
    picture = Image.fromarray(noise(40, 55))
    parts_of = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": parts_of}]
    example = processor.encode(messages)
    theirs = np.asarray(picture.resize((30, 30), Image.Resampling.BILINEAR))[:7, :7].transpose(2, 0, 1)
    np.testing.assert_array_equal(example.patches.pixels[0].reshape(3, 7, 7), theirs)
    slots = SlotConfig(slots=1, max_length=128, smallest=64)
    (end,) = Generator(model, processor, slots).answers([Request(messages, Sampling(4))])
    assert isinstance(end, Completion)


def test_the_seed_decides_what_is_fresh_and_nothing_else(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    tower, text, both = parts
    join(tower, text, tmp_path / "other", seed=4)
    join(tower, text, tmp_path / "again", seed=3, max_shard_bytes=30_000)
    first, other, again = (named_parameters(import_hf(p)) for p in (both, tmp_path / "other", tmp_path / "again"))
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    for path, param in first.items():
        same = np.array_equal(param[...], other[path][...])
        assert same == (path not in ("vision.projector.first.weight", "vision.projector.second.weight")), path
        np.testing.assert_array_equal(param[...], again[path][...])


def test_what_makes_no_model_is_refused_whole(text: Path, tmp_path: Path) -> None:
    tower = write_tower(tmp_path / "siglip", **{"vision_model.extra": np.zeros(2, np.float32)})
    destination = tmp_path / "both"
    with pytest.raises(CheckpointError, match=r"vision_model.extra \(model.safetensors\): no parameter of the joined"):
        join(tower, text, destination)
    narrow = write_tower(tmp_path / "narrow", **{"vision_model.post_layernorm.bias": np.zeros(8, np.float32)})
    with pytest.raises(CheckpointError, match=r"vision_model.post_layernorm.bias .*: shape \[8\], expected \[16\]"):
        join(narrow, text, destination)
    with pytest.raises(CheckpointError, match=r"the tower's config.json: 'model_type' is 'qwen3', expected 'siglip'"):
        join(text, text, destination)
    with pytest.raises(CheckpointError, match=r"the text model's config.json: 'model_type' is 'siglip', expected"):
        (tower / "tokenizer.json").write_bytes((text / "tokenizer.json").read_bytes())
        join(tower, tower, destination)
    plain = tmp_path / "plain"
    write_tiny(plain, Tiny(family="qwen3", hidden_size=32, num_layers=1, mlp_size=48))
    with pytest.raises(CheckpointError, match=r"has no special tokens <\|vision_start\|>, <\|image_pad\|>"):
        join(tower, plain, destination)
    assert main(["convert", "join", str(tower), str(text), str(destination), "--seed", "-1"]) == 2
    assert not destination.exists()
