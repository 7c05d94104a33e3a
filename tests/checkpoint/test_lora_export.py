"""LoRA out and in: merged into the weights, as a PEFT adapter, or beside them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rave_jax.attention import Rave
from rave_jax.checkpoint.hf_export import export_hf
from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.checkpoint.peft_export import export_peft
from rave_jax.checkpoint.peft_import import base_of, import_peft
from rave_jax.checkpoint.safetensors_file import CheckpointError
from rave_jax.layout import ContextTokens
from rave_jax.models.config import Lora, ModelOptions
from rave_jax.models.parameters import named_parameters, with_values
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.tools.convert import from_hf
from tests.checkpoint.conftest import Write

LORA = Lora(
    rank=2,
    alpha=3.0,
    targets=("vision.attention.qkv", "vision.merger.second", "decoder.attention.output", "decoder.mlp.up"),
)
OPTIONS = ModelOptions(mechanisms=(Rave(rank=2, layers=(0, 2)),), context=ContextTokens(3), lora=LORA)
UP = "model.layers.{}.mlp.up_proj"
IN_TREE = "base_model.model.model.language_model.layers.{}.mlp.up_proj.lora_{}.weight"


def trained(model: Vlm) -> Vlm:
    """Other numbers beyond the backbone, as training would leave them."""
    rng = np.random.default_rng(5)
    params = named_parameters(model)
    kinds = (".adapter.", ".mechanisms.", "context.")
    values = {p: rng.standard_normal(v.shape).astype(v.dtype) for p, v in params.items() if any(k in p for k in kinds)}
    return with_values(model, {p: jax.device_put(value, params[p][...].sharding) for p, value in values.items()})


def assert_same(one: Vlm, other: Vlm) -> None:
    ours, theirs = named_parameters(one), named_parameters(other)
    assert ours.keys() == theirs.keys()
    for path in ours:
        assert np.array_equal(np.asarray(ours[path][...]), np.asarray(theirs[path][...])), path


@pytest.fixture
def source(write: Write) -> Path:
    return write()


@pytest.fixture
def model(source: Path) -> Vlm:
    return trained(import_hf(source, OPTIONS, make_mesh(MeshConfig(fsdp=4, tensor=2))))


def test_lora_is_merged_and_reads_again_as_a_plain_model(source: Path, model: Vlm, tmp_path: Path) -> None:
    out = export_hf(model, tmp_path / "out", source)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    params = named_parameters(model)
    assert before.keys() == after.keys()
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    assert {key.split(".", 3)[-1] for key in changed if "layers" in key} == {
        "mlp.up_proj.weight",
        "self_attn.o_proj.weight",
    }
    assert len(changed) == 3 * 2 + 2 + 1
    for n in range(3):
        down, up = (params[f"decoder.layer_runs.{n}.layers.mlp.up.adapter.{p}"][0] for p in ("down", "up"))
        expected = before[UP.format(n) + ".weight"] + 1.5 * np.asarray(up) @ np.asarray(down)
        np.testing.assert_allclose(after[UP.format(n) + ".weight"], expected, rtol=1e-5, atol=1e-5)
    again = import_hf(out)
    assert again.options == dataclasses.replace(OPTIONS, lora=None)
    assert not any(".adapter." in name for name in load_file(out / "rave_jax.safetensors"))
    # Merged in float32 and rounded once.
    half = load_file(export_hf(model, tmp_path / "half", source, dtype="bfloat16") / "model.safetensors")
    for key, value in after.items():
        assert half[key].tobytes() == value.astype(half[key].dtype).tobytes(), key


def test_an_adapter_directory_comes_back_on_its_base(source: Path, model: Vlm, tmp_path: Path) -> None:
    out = export_peft(model, tmp_path / "adapter", source)
    assert not (out / "config.json").exists()
    assert base_of(out, None) == source
    again = import_peft(out, source)
    assert again.options == OPTIONS
    assert_same(again, model)
    text = (out / "README.md").read_text()
    assert 'library_name: "peft"' in text and "without Rave" in text


@pytest.mark.slow
def test_an_adapter_directory_comes_back_on_a_mesh_and_on_a_base_with_more(
    source: Path, model: Vlm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = export_peft(model, tmp_path / "adapter", source)
    beside = export_hf(model, tmp_path / "beside", source, lora="beside")
    for base, changes in ((beside, {}), (source, {"scan_layers": False})):
        assert_same_numbers(import_peft(out, base, make_mesh(MeshConfig()), changes=changes), model)
    from_hf(out, tmp_path / "native", base=beside)
    assert f"{beside}: Rave in layers 0, 2; 3 context tokens" in (said := capsys.readouterr().out)
    assert "is left out" in said


def assert_same_numbers(one: Vlm, other: Vlm) -> None:
    """However their stacks are cut."""
    for key, value in named_parameters(one).items():
        assert np.isfinite(np.asarray(value[...])).all(), key
    sums = [sum(float(np.abs(np.asarray(v[...])).sum()) for v in named_parameters(m).values()) for m in (one, other)]
    np.testing.assert_allclose(*sums, rtol=1e-6)


def test_an_adapter_is_not_written_for_a_base_with_other_weights(source: Path, model: Vlm, tmp_path: Path) -> None:
    other = with_values(model, {"decoder.norm.weight": named_parameters(model)["decoder.norm.weight"][...] + 1})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight differ .* --lora merge"):
        export_peft(other, tmp_path / "adapter", source)
    with pytest.raises(CheckpointError, match="the model has no LoRA"):
        export_peft(import_hf(source), tmp_path / "adapter", source)
    assert not (tmp_path / "adapter").exists()


def adapter(
    folder: Path, config: dict[str, Any] | None = None, layers: tuple[int, ...] = (0, 1, 2), ranks: tuple = (2, 2, 2)
) -> Path:
    """An adapter of the decoder's up projections, as PEFT writes it."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    tensors = {}
    for n in layers:
        tensors[IN_TREE.format(n, "A")] = rng.standard_normal((ranks[n], 32), np.float32)
        tensors[IN_TREE.format(n, "B")] = rng.standard_normal((64, ranks[n]), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    stated = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["up_proj"],
        "exclude_modules": ".*visual.*",
    }
    (folder / "adapter_config.json").write_text(json.dumps(stated | (config or {})))
    return folder


@pytest.mark.parametrize(
    ("stated", "layers", "ranks", "scales"),
    [
        ({}, (0, 1, 2), (2, 2, 2), (3, 3, 3)),
        ({"use_rslora": True, "r": 4}, (0, 1, 2), (4, 4, 4), (3, 3, 3)),
        ({"layers_to_transform": [2]}, (2,), (2, 2, 2), (0, 0, 3)),
        ({"rank_pattern": {"layers.1.mlp.up_proj": 3}}, (0, 1, 2), (2, 3, 2), (3, 2, 3)),
        ({"alpha_pattern": {"layers\\.0\\..*": 8}}, (0, 1, 2), (2, 2, 2), (4, 3, 3)),
        ({"target_modules": r".*layers\.(0|1)\..*up_proj"}, (0, 1), (2, 2, 2), (3, 3, 0)),
    ],
)
def test_ranks_scales_and_layers_as_peft_has_them(
    source: Path, tmp_path: Path, stated: dict, layers: tuple, ranks: tuple, scales: tuple
) -> None:
    folder = adapter(tmp_path / "adapter", stated, layers, ranks)
    stored = load_file(folder / "adapter_model.safetensors")
    out = export_hf(import_peft(folder, source), tmp_path / "merged", source)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    for n, scale in enumerate(scales):
        key = UP.format(n) + ".weight"
        update = scale * stored[IN_TREE.format(n, "B")] @ stored[IN_TREE.format(n, "A")] if scale else 0
        np.testing.assert_allclose(after[key], before[key] + update, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type is 'IA3', expected 'LORA'.*merge_and_unload"),
        ({"use_dora": True}, "use_dora is True, expected False"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], expected None"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying is True, expected False"),
        ({"target_parameters": "experts"}, "target_parameters is 'experts', expected names of parameters"),
        ({"r": "8"}, "r is '8', expected an integer"),
        ({"lora_alpha": None}, "lora_alpha is None, expected a number"),
        ({"target_modules": "("}, r"'\(' is not a valid regex"),
        ({"target_modules": 3}, "target_modules is 3, expected names"),
        ({"rank_pattern": [3]}, r"rank_pattern is \[3\]"),
        ({"exclude_modules": []}, r"model\.visual\.blocks\.0\.mlp\.up_proj: lora_A and lora_B missing"),
        (
            {"target_modules": ["up_proj", "lm_head"]},
            "lm_head: lora_A and lora_B missing",
        ),
    ],
)
def test_adapters_that_are_not_read_are_refused_by_name(
    source: Path, tmp_path: Path, stated: dict, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        import_peft(adapter(tmp_path / "adapter", stated), source)


def test_an_adapter_that_does_not_fit_its_base_lists_what_does_not(source: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[IN_TREE.format(0, "A")] = np.zeros((2, 31), np.float32)
    del tensors[IN_TREE.format(1, "B")]
    tensors[IN_TREE.format(9, "A")] = tensors[IN_TREE.format(2, "A")]
    tensors["base_model.model.lm_head.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="does not fit, 4 problems") as error:
        import_peft(folder, source)
    for text in ("its shape is [2, 31], expected [2, 32]", "lora_B missing", "no such linear", "not a LoRA weight"):
        assert text in str(error.value)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        import_peft(folder, source)
    with pytest.raises(CheckpointError, match=r"base_model_name_or_path is not stated.*--base"):
        base_of(folder, None)
