"""Import: right numbers in right places on any mesh, and one error that names everything that is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from rave_jax.attention import Rave
from rave_jax.checkpoint.hf_import import import_hf, load_config
from rave_jax.checkpoint.safetensors_file import CheckpointError
from rave_jax.checkpoint.tiny import Tiny, tiny_config, write_tiny_files
from rave_jax.config import ConfigError
from rave_jax.families import family_named
from rave_jax.families.config import VlmConfig
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import locate, named_parameters
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from tests.checkpoint.conftest import Tensors, Write, save
from tests.families.every import EVERY, OTHER, SIZES


def check_numbers(model: Vlm, tensors: Tensors) -> None:
    """Every tensor is where the table says, bit for bit."""
    params = named_parameters(model)
    for rule in family_named(model.config.family).tensors(model.config):
        path, index = locate(model, rule)
        value = np.asarray(params[path][...])
        ours = value if index is None else value[index]
        assert ours.dtype == tensors[rule.hf_key].dtype
        assert np.array_equal(ours.reshape(rule.shape).view(np.uint8), tensors[rule.hf_key].view(np.uint8)), rule


@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_tensor_arrives(write: Write, scan_layers: bool) -> None:
    folder = write()
    check_numbers(import_hf(folder, ModelOptions(scan_layers=scan_layers)), load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("other_style", [False, True])
def test_shards_and_both_styles_of_keys_give_the_same_model(write: Write, other_style: bool) -> None:
    plain = load_file(write() / "model.safetensors")
    check_numbers(import_hf(write(shards=3, other_style=other_style, name="other")), plain)


def test_a_mesh_gets_the_same_numbers_in_its_own_shards(write: Write) -> None:
    folder = write(shards=2)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model = import_hf(folder, mesh=mesh)
    check_numbers(model, {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()})
    query = named_parameters(model)["decoder.layer_runs.0.layers.attention.query.weight"][...]
    assert query.sharding.shard_shape(query.shape) == (3, 2, 8, 16)  # heads by tensor, width by fsdp


def test_layers_go_by_global_number_however_the_stack_is_cut(write: Write) -> None:
    folder = write()
    model = import_hf(folder, ModelOptions(mechanisms=(Rave(rank=2, layers=(1,)),)), key=jax.random.key(5))
    assert [(s.start, s.stop) for s in model.decoder.layer_runs] == [(0, 1), (1, 2), (2, 3)]
    check_numbers(model, load_file(folder / "model.safetensors"))
    start = jax.jit(lambda key: Vlm(model.config, model.options, key=key))
    fresh = named_parameters(start(jax.random.key(5)))
    ours = named_parameters(model)
    gates = [path for path in ours if ".mechanisms." in path]
    assert gates
    for path in gates:  # a compiled start may differ in the last bit
        np.testing.assert_allclose(np.asarray(ours[path][...]), np.asarray(fresh[path][...]), rtol=1e-6)


def test_number_types_by_option_or_as_stored(write: Write) -> None:
    folder = write(bfloat16=True)
    stored = load_file(folder / "model.safetensors")
    check_numbers(import_hf(folder, dtypes="stored"), stored)
    check_numbers(import_hf(folder, ModelOptions(param_dtype="bfloat16")), stored)
    check_numbers(import_hf(folder, ModelOptions()), {k: v.astype(np.float32) for k, v in stored.items()})


def test_layers_of_several_number_types_have_no_stored_type(write: Write) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    folder = write(lambda t: t.update({key: t[key].astype(np.float16)}))
    assert import_hf(folder).embed.weight.dtype == np.float32
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj\.weight.*F16, F32"):
        import_hf(folder, dtypes="stored")


def test_one_error_names_all_keys_and_files(write: Write) -> None:
    def damage(tensors: Tensors) -> None:
        tensors["model.layers.0.mlp.upp_proj.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
        del tensors["visual.merger.ln_q.weight"]
        tensors["model.norm.weight"] = np.zeros(7, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)

    with pytest.raises(CheckpointError) as error:
        import_hf(write(damage))
    lines = str(error.value).splitlines()
    assert "5 problems" in lines[0]
    expected = [
        "model.layers.0.mlp.up_proj.weight: missing",
        "visual.merger.ln_q.weight: missing",
        "model.norm.weight (model.safetensors): its shape is [7], expected [32]",
        "lm_head.weight (model.safetensors): its number type is I8",
        "model.layers.0.mlp.upp_proj.weight (model.safetensors): no parameter",
    ]
    assert all(any(line.strip().startswith(text) for line in lines[1:]) for text in expected), error.value


@pytest.mark.parametrize("keep", [3, 60, -1, -3000])
def test_a_truncated_file_is_named_and_nothing_else(write: Write, keep: int) -> None:
    folder = write(shards=2)
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors.*truncated") as error:
        import_hf(folder)
    assert "missing" not in str(error.value)


def test_a_corrupt_header_is_named(write: Write) -> None:
    folder = write()
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[8:20] = b"\xff" * 12
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its header is corrupt"):
        import_hf(folder)


@pytest.mark.parametrize("how", ["before the data", "over another", "bytes behind", "nested too deep"])
def test_tensors_lie_end_to_end(write: Write, how: str) -> None:
    file = write() / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    entry = entries["model.norm.weight"]
    begin, end = entry["data_offsets"]
    if how == "before the data":
        entry["data_offsets"] = [begin - end, 0]
    elif how == "over another":
        entry["data_offsets"] = [0, end - begin] if begin else [end, 2 * end]
    elif how == "bytes behind":
        rest += b"1234"
    header = b"[" * 200_000 if how == "nested too deep" else json.dumps(entries).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + rest)
    with pytest.raises(CheckpointError, match=r"corrupt|overlap, or leave unused bytes"):
        import_hf(file.parent)


def test_pixels_are_normalised_as_the_processor_files_say(write: Write) -> None:
    folder = write()
    assert load_config(folder)[0].vision.pixel_mean != (0.5, 0.5, 0.5)
    half = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(half))
    vision = import_hf(folder).config.vision
    assert (vision.pixel_mean, vision.pixel_std) == ((0.5,) * 3, (0.25,) * 3)
    (folder / "preprocessor_config.json").write_text(json.dumps({"merge_size": 1}))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: merge_size is 1, expected 2"):
        load_config(folder)


def test_what_ends_an_answer_is_said_by_the_generation_config(write: Write) -> None:
    folder = write()
    file = folder / "generation_config.json"
    stated = load_config(folder)[0].eos_token_ids
    for text, ids in (("{}", stated), ('{"eos_token_id": [7, 5]}', (7, 5)), ('{"eos_token_id": 7}', (7,))):
        file.write_text(text)
        assert import_hf(folder).config.eos_token_ids == ids
    for value in ("7", -1, True, 7.0, [7, None], {"a": 7}):
        file.write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(CheckpointError, match=r"generation_config\.json: 'eos_token_id' is .*, expected a tok"):
            load_config(folder)
    for text, wrong in (("[7]", "expected an object"), ("{", "not JSON")):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=rf"generation_config\.json: {wrong}"):
            load_config(folder)


def test_index_and_files_must_agree(write: Write) -> None:
    folder = write(shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    moved, dropped = sorted(index["weight_map"])[:2]
    index["weight_map"][moved] = "model-00002-of-00002.safetensors"
    del index["weight_map"][dropped]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="listed in") as error:
        import_hf(folder)
    assert moved in str(error.value)
    assert f"{dropped} (model-00002-of-00002.safetensors): the file holds it" in str(error.value)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"model-00001-of-00002.safetensors: no such file, but .* lists \d+ tensors"
    ):
        import_hf(folder)


def test_one_parameter_under_two_keys_is_refused(write: Write) -> None:
    def double(tensors: Tensors) -> None:
        tensors["model.language_model.norm.weight"] = tensors["model.norm.weight"]

    with pytest.raises(CheckpointError, match="the same parameter as"):
        import_hf(write(double))


def test_pickles_are_refused(write: Write) -> None:
    folder = write()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin.*never loaded"):
        import_hf(folder)


def test_a_tied_head_may_be_repeated_but_not_differ(write: Write) -> None:
    tied = tiny(vocab_size=64, tie_embeddings=True)

    def repeat(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    def differ(tensors: Tensors) -> None:
        repeat(tensors)
        tensors["lm_head.weight"][-1, -1] += 1

    assert import_hf(write(repeat, config=tied, name="same")).lm_head is None
    with pytest.raises(CheckpointError, match="the two differ"):
        import_hf(write(differ, config=tied, name="other"))


@pytest.mark.parametrize("name", EVERY)
def test_a_checkpoint_without_a_head_is_refused_until_its_config_ties_it(tmp_path: Path, name: str) -> None:
    """Where a config says nothing of the head, as released ones of InternVL, or denies that it is tied, as those of
    models that make embeddings."""
    sizes = Tiny(**{**SIZES, **OTHER.get(name, {}), "family": name})
    config, family = tiny_config(sizes), family_named(name)
    write_tiny_files(tmp_path, sizes)
    tensors = {rule.hf_key: np.zeros(rule.shape, np.float32) for rule in family.tensors(config)}
    head = next(key for key in tensors if key.endswith("lm_head.weight"))
    save(tmp_path, {key: tensor for key, tensor in tensors.items() if key != head})
    path = tmp_path / "config.json"
    stated = json.loads(path.read_text())
    said = rf"does not fit: {head}: missing \(not in model.safetensors\). If .*embed_tokens.weight is the head too, set"
    for tie in ({}, {"tie_word_embeddings": False}):
        silent = {key: value for key, value in stated.items() if key != "tie_word_embeddings"} | tie
        if "text_config" in silent:
            inner = {key: value for key, value in silent["text_config"].items() if key != "tie_word_embeddings"}
            silent["text_config"] = inner
        path.write_text(json.dumps(silent))
        with pytest.raises(CheckpointError, match=said):
            import_hf(tmp_path)
    path.write_text(json.dumps(silent | {"tie_word_embeddings": True}))
    assert import_hf(tmp_path).lm_head is None


def test_a_text_model_of_another_family(tmp_path: Path, config: VlmConfig) -> None:
    text = dataclasses.replace(config.text, qkv_bias=False, qk_norm=True, mrope_section=())
    qwen3 = VlmConfig(text=text, vision=None, family="qwen3")
    family = family_named("qwen3")
    tensors = {r.hf_key: np.full(r.shape, n, np.float32) for n, r in enumerate(family.tensors(qwen3))}
    (tmp_path / "config.json").write_text(json.dumps(family.render(qwen3)))
    save(tmp_path, tensors)
    check_numbers(import_hf(tmp_path), tensors)


def test_what_is_no_model_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is an empty directory"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="'bert'"):
        load_config(tmp_path)
