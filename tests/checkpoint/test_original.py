"""LLaVA-1.5 in the layout of its authors becomes a HuggingFace directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rave_jax.batch import Kind
from rave_jax.checkpoint.hf_import import import_hf, load_config
from rave_jax.checkpoint.original import convert_original
from rave_jax.checkpoint.safetensors_file import CheckpointError
from rave_jax.config import ConfigError
from rave_jax.data.processor import Processor
from rave_jax.families.config import VlmConfig, tower_of
from rave_jax.families.llava.config import parse, render
from rave_jax.families.llava.presets import llava_1_5_7b
from rave_jax.families.llava.tensors import tensors
from rave_jax.families.shared.vit import VitConfig
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import named_parameters
from rave_jax.tools import cli
from tests.data.pictures import noise

ROWS, SPACE = 32000, 32064
PAIRS = (
    ("vision_tower.vision_model.", "vision_model."),
    ("multi_modal_projector.linear_1", "model.mm_projector.0"),
    ("multi_modal_projector.linear_2", "model.mm_projector.2"),
    ("language_model.", ""),
)
Directories = tuple[Path, Path]


def small() -> VlmConfig:
    """A model of this shape, with Llama's vocabulary."""
    hf = render(llava_1_5_7b())
    hf["text_config"] |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    hf["text_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    hf["vision_config"] |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "image_size": 28}
    hf["vision_config"] |= {"num_attention_heads": 2}
    return parse(hf)


@pytest.fixture
def directories(shared_data: Path, tmp_path: Path) -> Directories:
    """The checkpoint and its tower, with random weights in float16."""
    source, tower = tmp_path / "llava-v1.5", tmp_path / "clip"
    source.mkdir()
    tower.mkdir()
    config = small()
    rng = np.random.default_rng(0)
    own, beside = {}, {}
    for rule in tensors(config):
        rows = (ROWS, *rule.shape[1:]) if rule.path in ("embed.weight", "lm_head.weight") else rule.shape
        key = rule.hf_key
        for ours, theirs in PAIRS:
            key = theirs + key.removeprefix(ours) if key.startswith(ours) else key
        (beside if key.startswith("vision_model.") else own)[key] = rng.normal(size=rows).astype(np.float16)
    own["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    beside["text_model.final_layer_norm.weight"] = np.ones(4, np.float16)
    save_file(own, source / "model.safetensors")
    save_file(beside, tower / "model.safetensors")
    hf = json.loads((shared_data / "configs/llava-v1.5-7b-original/config.json").read_text())
    text = render(config)["text_config"]
    hf |= {key: text[key] for key in hf.keys() & text.keys() - {"model_type", "vocab_size", "eos_token_id"}}
    hf["mm_hidden_size"] = 16
    (source / "config.json").write_text(json.dumps(hf))
    (source / "tokenizer_config.json").write_text(json.dumps({"legacy": False}))
    shutil.copyfile(
        shared_data / "configs/llava-v1.5-7b-original/generation_config.json", source / "generation_config.json"
    )
    shutil.copyfile(shared_data / "tokenizer_llama/tokenizer.model", source / "tokenizer.model")
    vision = render(config)["vision_config"]
    (tower / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    return source, tower


def test_it_becomes_a_directory_that_everything_reads(directories: Directories, tmp_path: Path) -> None:
    source, tower = directories
    made = tmp_path / "made"
    assert cli.main(["convert", "from-original", str(source), str(made), "--tower", str(tower)]) == 0
    config, _ = load_config(made)
    assert config.text.vocab_size == SPACE and config.image_token_id == ROWS and config.eos_token_ids == (2,)
    assert tower_of(config, VitConfig).feature_layers == (1,)
    params = named_parameters(import_hf(made, ModelOptions()))
    own, beside = (load_file(folder / "model.safetensors") for folder in directories)
    rows = np.asarray(params["embed.weight"][...])
    np.testing.assert_array_equal(rows[:ROWS], own["model.embed_tokens.weight"].astype(np.float32))
    np.testing.assert_allclose(rows[ROWS:], np.tile(rows[:ROWS].mean(axis=0), (SPACE - ROWS, 1)), atol=1e-3)
    copied = {
        "vision.projector.second.weight": "model.mm_projector.2.weight",
        "decoder.norm.weight": "model.norm.weight",
    }
    for path, key in copied.items():
        np.testing.assert_array_equal(params[path][...], own[key].astype(np.float32))
    table = beside["vision_model.embeddings.position_embedding.weight"]
    np.testing.assert_array_equal(params["vision.position"][...], table.astype(np.float32))


def test_its_prompts_are_those_of_its_authors(directories: Directories, tmp_path: Path) -> None:
    source, tower = directories
    processor = Processor.from_hf(convert_original(source, tower, tmp_path / "made"))
    asked = [
        {"role": "user", "content": [{"type": "image", "image": noise(20, 40)}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    example = processor.encode(asked, add_generation_prompt=True)
    ids = example.tokens[(example.info.kind != Kind.VISUAL)]
    assert processor.tokenizer.decode(ids) == (
        "<s> A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: \nWhat? ASSISTANT: A cat.</s>USER: Sure? "
        "ASSISTANT:"
    )
    assert (example.tokens == ROWS).sum() == 4
    assert processor.rules.squared, "image_aspect_ratio is pad"
    learned = processor.encode(asked[:2])
    assert processor.tokenizer.decode(learned.tokens[learned.loss_mask > 0]) == "A cat.</s>"


def change(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s, t: change(s / "config.json", image_aspect_ratio="anyres"), "'image_aspect_ratio' is 'anyres'"),
        (
            lambda s, t: change(s / "config.json", mm_projector_type="linear"),
            "'mm_projector_type' is 'linear'",
        ),
        (lambda s, t: change(s / "config.json", mm_use_im_start_end=True), "'mm_use_im_start_end' is True"),
        (lambda s, t: change(s / "config.json", mm_hidden_size=17), "of the tower: 'hidden_size' is 16, expected 17"),
        (
            lambda s, t: change(s / "config.json", model_type="mpt"),
            "'model_type' is 'mpt': no checkpoint in",
        ),
        (
            lambda s, t: change(t / "config.json", model_type="siglip"),
            "of the tower: 'model_type' is 'siglip'",
        ),
        (lambda s, t: change(s / "config.json", num_hidden_layers=2), "9 problems:\n.*model.layers.1.* missing"),
        (
            lambda s, t: (s / "tokenizer.model").write_bytes(b"no"),
            "expected a SentencePiece file of byte",
        ),
        (lambda s, t: (s / "tokenizer.model").unlink(), "holds neither tokenizer.json nor tokenizer.model"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    directories: Directories, tmp_path: Path, spoil: Callable[[Path, Path], object], message: str
) -> None:
    spoil(*directories)
    with pytest.raises(CheckpointError, match=message):
        convert_original(*directories, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_the_tower_has_to_be_given(directories: Directories, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, _ = directories
    assert cli.main(["convert", "from-original", str(source), str(tmp_path / "made")]) == cli.EXIT_INPUT
    said = capsys.readouterr().err
    assert "'mm_vision_tower' is 'openai/clip-vit-large-patch14-336', and the tower's weights are not in this" in said
    assert "(--tower)" in said and said.count("\n") == 1


def test_commands_that_read_models_name_the_conversion(directories: Directories) -> None:
    with pytest.raises(ConfigError, match="layout of its authors; `rave-jax convert from-original` makes"):
        load_config(directories[0])
