"""Experts in checkpoints: a tensor for each expert, or two for all of them in either order of axes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rave_jax.checkpoint import native
from rave_jax.checkpoint.hf_export import export_hf
from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.checkpoint.parts import Source, read_part
from rave_jax.checkpoint.peft_export import export_peft
from rave_jax.checkpoint.peft_import import import_peft
from rave_jax.checkpoint.safetensors_file import CheckpointError, Slice, read_header
from rave_jax.families import FAMILIES
from rave_jax.families.base import Cut, TensorRule
from rave_jax.families.config import ExpertsConfig, TextConfig, VlmConfig
from rave_jax.families.shared.decoder import decoder_tensors
from rave_jax.families.shared.experts import fused_swapped
from rave_jax.models.config import Lora, ModelOptions
from rave_jax.models.parameters import named_parameters, with_values
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.tools.convert import from_hf
from tests.models.made import model as made

E, F, D = 4, 6, 16
TEXT = TextConfig(
    vocab_size=32,
    hidden_size=D,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_size=20,
    qkv_bias=False,
    qk_norm=True,
    experts=ExpertsConfig(count=E, chosen=2, mlp_size=F, dense_layers=(1,)),
)
FAMILY = FAMILIES["qwen3_moe"]
CONFIG = VlmConfig(text=TEXT, eos_token_ids=(3,), family="qwen3_moe")
GATE, UP, DOWN = (f"decoder.layer_runs.0.layers.mlp.{name}.weight" for name in ("gate", "up", "down"))
LAYER = "model.layers.0.mlp.experts"
PARTS = ("gate", "up", "down", "router")


def weights_of(model: Vlm) -> dict[str, jax.Array]:
    return {path: x[...] for path, x in named_parameters(model).items()}


@pytest.fixture
def format(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A format that the family reads; the third is that of another family."""
    if request.param == "fused_swapped":
        swapped = dataclasses.replace(FAMILY, other_tensors=(swapped_tensors,))
        monkeypatch.setitem(FAMILIES, "qwen3_moe", swapped)
    return request.param


def swapped_tensors(config: VlmConfig) -> tuple[TensorRule, ...]:
    return tuple(decoder_tensors(config.text, fused_swapped))


@pytest.fixture
def released(tmp_path: Path) -> Path:
    return export_hf(made(CONFIG), tmp_path / "released")


def layer_in(format: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A checkpoint with a tensor for each expert in another format, by numpy."""
    found = {key: value for key, value in tensors.items() if ".experts." not in key}
    for n in (0, 2):
        key = f"model.layers.{n}.mlp.experts"
        each = {
            name: np.stack([tensors[f"{key}.{e}.{name}_proj.weight"] for e in range(E)])
            for name in ("gate", "up", "down")
        }
        both, down = np.concatenate([each["gate"], each["up"]], axis=1), each["down"]
        swap = format == "fused_swapped"
        found[f"{key}.gate_up_proj"] = np.ascontiguousarray(both.swapaxes(1, 2) if swap else both)
        found[f"{key}.down_proj"] = np.ascontiguousarray(down.swapaxes(1, 2) if swap else down)
    return found


def directory(folder: Path, released: Path, format: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text((released / "config.json").read_text())
    tensors = load_file(released / "model.safetensors")
    tensors = tensors if format == "separate" else layer_in(format, tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


FORMATS = pytest.mark.parametrize("format", ["separate", "fused", "fused_swapped"], indirect=True)


@FORMATS
def test_every_format_is_read_as_the_same_model_and_written_as_it_was(
    tmp_path: Path, released: Path, format: str
) -> None:
    given = directory(tmp_path / format, released, format)
    model = import_hf(given)
    for path, param in named_parameters(made(CONFIG)).items():
        np.testing.assert_array_equal(named_parameters(model)[path][...], param[...])
    written = export_hf(model, tmp_path / "written", given)
    before, after = load_file(given / "model.safetensors"), load_file(written / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(after[key].tobytes() == value.tobytes() for key, value in before.items())


@FORMATS
def test_a_native_checkpoint_knows_the_format_it_came_from(tmp_path: Path, released: Path, format: str) -> None:
    given = directory(tmp_path / format, released, format)
    from_hf(given, tmp_path / "native")
    stated = json.loads((tmp_path / "native/native.json").read_text())
    number = int(format != "separate")
    assert stated.get("tensor_format", 0) == native.tensor_format(tmp_path / "native") == number
    written = export_hf(import_hf(tmp_path / "native"), tmp_path / "written", tmp_path / "native")
    before, after = load_file(given / "model.safetensors"), load_file(written / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(after[key].tobytes() == value.tobytes() for key, value in before.items())


@FORMATS
def test_a_mesh_takes_its_own_experts(tmp_path: Path, released: Path, format: str) -> None:
    given = directory(tmp_path / format, released, format)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4), jax.devices()[:8])
    whole, split = (named_parameters(m) for m in (made(CONFIG), import_hf(given, mesh=mesh)))
    assert split[GATE][...].addressable_shards[0].data.shape == (1, 1, F, D // 2)
    for path in (GATE, UP, DOWN):
        np.testing.assert_array_equal(split[path][...], whole[path][...])


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("number", [0, 1])
def test_a_part_of_a_tensor_is_read_by_slices(tmp_path: Path, swapped: bool, number: int) -> None:
    whole = np.arange(E * 2 * F * D, dtype=np.float32).reshape(E, 2 * F, D)
    half = whole[:, number * F : (number + 1) * F]
    stored = whole.swapaxes(1, 2) if swapped else whole
    save_file({"x": np.ascontiguousarray(stored)}, tmp_path / "x.safetensors")
    tensor = read_header(tmp_path / "x.safetensors")[0]["x"]
    span = (slice(1, 3), slice(2, 5), slice(0, D, None))
    out = np.zeros((2, 3, D), np.float32)
    read_part(Source(tensor, (), Cut(2 if swapped else 1, number, 2), swapped), (E, F, D), [Slice(out, span)])
    np.testing.assert_array_equal(out, half[span])


@pytest.mark.parametrize(
    ("made_as", "change", "message"),
    [
        ("separate", {f"{LAYER}.2.up_proj.weight": None}, rf"{LAYER}\.2\.up_proj\.weight: missing"),
        (
            "separate",
            {f"{LAYER}.4.up_proj.weight": (F, D)},
            rf"{LAYER}\.4\.up_proj\.weight .*: no parameter of the model",
        ),
        (
            "separate",
            {f"{LAYER}.0.up_proj.weight": (D, F)},
            rf"{LAYER}\.0\.up_proj\.weight .*\[16, 6\], expected \[6, 16\]",
        ),
        ("separate", {"model.layers.0.mlp.gate.weight": None}, r"model\.layers\.0\.mlp\.gate\.weight: missing"),
        ("fused", {f"{LAYER}.gate_up_proj": None}, rf"does not fit: {LAYER}\.gate_up_proj: missing"),
        ("fused", {f"{LAYER}.gate_up_proj": (E, D, 2 * F)}, r"does not fit: .*\[4, 16, 12\], expected \[4, 12, 16\]"),
        ("fused", {f"{LAYER}.0.up_proj.weight": (F, D)}, rf"{LAYER}\.0\.up_proj\.weight .*: no parameter of the model"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, released: Path, made_as: str, change: dict[str, Any], message: str
) -> None:
    given = directory(tmp_path / made_as, released, made_as)
    tensors = load_file(given / "model.safetensors")
    for key, shape in change.items():
        tensors.pop(key, None)
        tensors |= {} if shape is None else {key: np.zeros(shape, np.float32)}
    save_file(tensors, given / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        import_hf(given)


def test_adapters_are_merged_and_written_beside_experts(tmp_path: Path, released: Path) -> None:
    """Those of attention; the base may have either format."""
    options = ModelOptions(lora=Lora(rank=2, targets=("decoder.attention.query",)))
    adapters = {path: x[...] for path, x in named_parameters(made(CONFIG, options)).items() if ".adapter." in path}
    for made_as in ("separate", "fused"):
        given = directory(tmp_path / made_as, released, made_as)
        model = with_values(import_hf(given, options), adapters)
        merged = export_hf(model, tmp_path / f"{made_as}_merged", given)
        before, after = load_file(given / "model.safetensors"), load_file(merged / "model.safetensors")
        changed = {key for key, value in before.items() if after[key].tobytes() != value.tobytes()}
        assert changed == {f"model.layers.{n}.self_attn.q_proj.weight" for n in range(3)}
        beside = export_peft(model, tmp_path / f"{made_as}_adapter", given)
        again = import_peft(beside, given)
        for path, value in adapters.items():
            np.testing.assert_array_equal(named_parameters(again)[path][...], value)


EVERYTHING = Lora(rank=2, alpha=3.0, targets=(r"decoder\.mlp\..*", "lm_head", "embed"))
UNTIED = dataclasses.replace(CONFIG, text=dataclasses.replace(TEXT, tie_embeddings=False))


@pytest.mark.parametrize(("config", "made_as"), [(CONFIG, "separate"), (UNTIED, "fused")])
def test_adapters_of_experts_head_and_embedding_are_merged_and_come_back(
    tmp_path: Path, config: VlmConfig, made_as: str
) -> None:
    """A tied head and the embedding are two tensors once an adapter is in one of them."""
    plain = export_hf(made(config), tmp_path / "plain")
    given = directory(tmp_path / made_as, plain, made_as)
    model = import_hf(given, ModelOptions(lora=EVERYTHING))
    rng, known = np.random.default_rng(2), named_parameters(model)
    adapters = {path: rng.standard_normal(x.shape, np.float32) for path, x in known.items() if ".adapter." in path}
    model = with_values(model, {path: jnp.asarray(x) for path, x in adapters.items()})
    values = {path: np.asarray(x[...]) for path, x in named_parameters(made(config)).items()}
    values.setdefault("lm_head.weight", values["embed.weight"])
    for down in [path for path in adapters if path.endswith("down")]:
        weight, up = down.replace("adapter.down", "weight").replace("tied", "lm"), f"{down.removesuffix('down')}up"
        update = 1.5 * np.einsum("...or,...ri->...oi", adapters[up], adapters[down])
        values[weight] = values[weight] + update
    merged = named_parameters(import_hf(export_hf(model, tmp_path / "merged", given)))
    assert merged.keys() == values.keys()
    for path, value in values.items():
        np.testing.assert_allclose(merged[path][...], value, rtol=1e-5, atol=1e-5, err_msg=path)

    again = import_peft(export_peft(model, tmp_path / "adapter", given), given)
    beside = import_hf(export_hf(model, tmp_path / "beside", given, lora="beside"), model.options)
    assert set(again.options.lora.targets) == {*(f"decoder.mlp.{x}" for x in PARTS), "lm_head", "embed"}
    assert (again.options.lora.rank, again.options.lora.alpha) == (2, 3.0)
    for path, value in adapters.items():
        for found in (again, beside):
            np.testing.assert_array_equal(named_parameters(found)[path][...], value)


def test_an_adapter_of_the_gates_alone_leaves_the_other_half(tmp_path: Path, released: Path) -> None:
    model = made(CONFIG, ModelOptions(lora=Lora(rank=2, targets=("decoder.mlp.gate",))))
    beside = export_peft(with_values(model, weights_of(import_hf(released))), tmp_path / "adapter", released)
    assert json.loads((beside / "adapter_config.json").read_text())["target_parameters"] == ["mlp.experts.gate_up_proj"]
    stored = load_file(beside / "adapter_model.safetensors")
    assert stored[f"base_model.model.{LAYER}.lora_A.weight"].shape == (E * 2, D)
    assert not stored[f"base_model.model.{LAYER}.lora_B.weight"][F:].any()
    again = named_parameters(import_peft(beside, released))
    for part in ("down", "up"):
        path = GATE.replace("weight", f"adapter.{part}")
        np.testing.assert_array_equal(again[path][...], named_parameters(model)[path][...])
    assert not again[UP.replace("weight", "adapter.up")][...].any()


def test_adapters_of_single_experts_are_read(tmp_path: Path, released: Path) -> None:
    """As older releases of transformers have them: a linear for each expert."""
    options = ModelOptions(lora=Lora(rank=2, targets=("decoder.attention.query",)))
    beside = export_peft(import_hf(released, options), tmp_path / "adapter", released)
    adapter, rng = beside / "adapter_model.safetensors", np.random.default_rng(3)
    a, b = rng.standard_normal((2, D), np.float32), rng.standard_normal((F, 2), np.float32)
    key = f"base_model.model.{LAYER}.2.gate_proj"
    save_file(load_file(adapter) | {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, adapter)
    params = named_parameters(import_peft(beside, released))
    for path, value in {"down": a, "up": b}.items():
        found = np.asarray(params[GATE.replace("weight", f"adapter.{path}")][...])
        np.testing.assert_array_equal(found[0, 2], value)
        assert not np.delete(found[0], 2, axis=0).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{LAYER}.lora_A.weight": (E * 2, F + 1)}, rf"{LAYER}\.lora_A.* \[8, 7\], expected \[8, 6\]"),
        ({f"{LAYER}.lora_B.weight": None}, rf"{LAYER}\.down_proj: lora_B missing"),
        ({"lm_head.base_layer.weight": (32, D)}, r"lm_head\.base_layer\.weight .*: differs from embed\.weight"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, released: Path, change: dict[str, Any], message: str
) -> None:
    model = with_values(made(CONFIG, ModelOptions(lora=EVERYTHING)), weights_of(import_hf(released)))
    beside = export_peft(model, tmp_path / "adapter", released)
    tensors = load_file(beside / "adapter_model.safetensors")
    for key, shape in change.items():
        tensors.pop(f"base_model.model.{key}", None)
        tensors |= {} if shape is None else {f"base_model.model.{key}": np.ones(shape, np.float32)}
    save_file(tensors, beside / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        import_peft(beside, released)
