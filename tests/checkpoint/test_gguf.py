"""GGUF files: built here number by number, as llama.cpp writes them, and read as HuggingFace directories."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from rave_jax.checkpoint.gguf_file import GgufData, GgufFile, open_gguf
from rave_jax.checkpoint.gguf_import import write_hf
from rave_jax.checkpoint.hf_import import import_hf, load_config
from rave_jax.checkpoint.safetensors_file import CheckpointError
from rave_jax.checkpoint.sentencepiece import pieces_of
from rave_jax.families.config import LinearRope, TextConfig, VlmConfig
from rave_jax.models.parameters import named_parameters
from rave_jax.models.vlm import Vlm
from tests.data.llama import llama_tokenizer
from tests.models.made import model as made

TOKENS = ["<|end|>", "<think>", *(chr(n) for n in range(33, 127)), "Ġ", "Ċ", "th", "the", "Ġthe"]
TEXT = TextConfig(
    vocab_size=len(TOKENS),
    hidden_size=24,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    mlp_size=20,
    rms_norm_eps=1e-5,
    rope_theta=1e5,
    qkv_bias=False,
    tie_embeddings=True,
    max_position=64,
)
CONFIG = VlmConfig(text=TEXT, eos_token_ids=(0,), family="llama")
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "A model",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 24,
    "llama.feed_forward_length": 20,
    "llama.attention.head_count": 6,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "llama.rope.freq_base": 1e5,
    "llama.rope.dimension_count": 4,
    "llama.vocab_size": len(TOKENS),
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 4] + [1] * (len(TOKENS) - 2),
    "tokenizer.ggml.merges": ["t h", "th e", "Ġ the"],
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.chat_template": "{{ messages[0].content }}",
}


def side_by_side(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head in the order of llama.cpp: those that turn together are neighbours."""
    half = weight.shape[0] // heads // 2
    rows = [head * 2 * half + n + part * half for head in range(heads) for n in range(half) for part in range(2)]
    return weight[rows]


def tensors_of(model: Vlm, tied: bool = True) -> dict[str, np.ndarray]:
    params = {path: np.asarray(x[...]) for path, x in named_parameters(model).items()}
    found = {"token_embd.weight": params["embed.weight"], "output_norm.weight": params["decoder.norm.weight"]}
    if not tied:
        found["output.weight"] = params["lm_head.weight"]
    names = {
        "attn_norm": "attention_norm",
        "ffn_norm": "mlp_norm",
        "ffn_gate": "mlp.gate",
        "ffn_up": "mlp.up",
        "ffn_down": "mlp.down",
    }
    for n in range(2):
        layer = {k.removeprefix("decoder.layer_runs.0.layers."): v[n] for k, v in params.items() if ".layers." in k}
        found |= {f"blk.{n}.{ours}.weight": layer[f"{theirs}.weight"] for ours, theirs in names.items()}
        for name, heads in (("query", 6), ("key", 2), ("value", 0)):
            flat = layer[f"attention.{name}.weight"].reshape(-1, 24)
            found[f"blk.{n}.attn_{name[0]}.weight"] = side_by_side(flat, heads) if heads else flat
        found[f"blk.{n}.attn_output.weight"] = layer["attention.output.weight"].reshape(24, -1)
    return found


def a_file(metadata: dict[str, Any] = METADATA, tensors: dict[str, np.ndarray] | None = None) -> GgufFile:
    tensors = tensors_of(made(CONFIG)) if tensors is None else tensors
    held = {name: GgufData(x.shape, "F32", lambda x=x: x) for name, x in tensors.items()}
    return GgufFile(Path("model.gguf"), {k: v for k, v in metadata.items() if v is not None}, held)


def same_model(directory: Path, wanted: Vlm) -> None:
    found = named_parameters(import_hf(directory))
    for path, param in named_parameters(wanted).items():
        np.testing.assert_array_equal(found[path][...], param[...], err_msg=path)


def test_a_file_becomes_the_directory_of_its_model(tmp_path: Path) -> None:
    assert write_hf(a_file(), tmp_path / "hf") == 1
    config, _ = load_config(tmp_path / "hf")
    assert config == CONFIG
    same_model(tmp_path / "hf", made(CONFIG))


def test_a_head_of_its_own_and_scaled_positions(tmp_path: Path) -> None:
    text = {**vars(TEXT), "tie_embeddings": False, "rope_scaling": LinearRope(4.0)}
    wanted = VlmConfig(text=TextConfig(**text), eos_token_ids=(0, 1), family="llama")
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0, "tokenizer.ggml.eot_token_id": 1}
    write_hf(a_file(METADATA | scaling, tensors_of(made(wanted), tied=False)), tmp_path / "hf", max_shard_bytes=4000)
    assert load_config(tmp_path / "hf")[0] == wanted
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    same_model(tmp_path / "hf", made(wanted))


def test_weights_in_half_precision(tmp_path: Path) -> None:
    write_hf(a_file(), tmp_path / "hf", dtype="bfloat16")
    found = named_parameters(import_hf(tmp_path / "hf", dtypes="stored"))
    for path, param in named_parameters(made(CONFIG)).items():
        np.testing.assert_array_equal(found[path][...], param[...].astype(jax.numpy.bfloat16), err_msg=path)


def test_the_tokenizer_cuts_digits_and_knows_marked_tokens(tmp_path: Path) -> None:
    write_hf(a_file(), tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    found = tokenizer.convert_ids_to_tokens(tokenizer.encode("in the <think>12<|end|>\n", add_special_tokens=True))
    assert found == ["i", "n", "Ġthe", "Ġ", "<think>", "1", "2", "<|end|>", "Ċ"]
    assert tokenizer.decode([2 + ord("a") - 33, TOKENS.index("Ġthe"), 0], skip_special_tokens=True) == "a the"
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|end|>", "<|end|>", None)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_the_tokenizer_of_llama_2_is_made_from_scores(tmp_path: Path, shared_data: Path) -> None:
    file = shared_data / "tokenizer_llama" / "tokenizer.model"
    pieces = pieces_of(file)
    tokens = [piece for piece, _, _ in pieces]
    text = TextConfig(**{**vars(TEXT), "vocab_size": len(tokens)})
    config = VlmConfig(text=text, eos_token_ids=(2,), family="llama")
    metadata = {k: v for k, v in METADATA.items() if not k.startswith("tokenizer.")} | {
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [score for _, score, _ in pieces],
        "tokenizer.ggml.token_type": [kind for _, _, kind in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    write_hf(a_file(metadata, tensors_of(made(config))), tmp_path / "hf")
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "hf"), llama_tokenizer(file, legacy=True)
    for text in ("Hello, world! 1234", "  two  blanks ", "日本語 and ☃ \U0001f9ff", "a</s> b"):
        wanted = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == wanted
        assert ours.encode(text) == [1, *wanted]
        assert ours.decode(wanted, skip_special_tokens=True) == theirs.decode(wanted, skip_special_tokens=True)


Q = "blk.1.attn_q.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": None}, "model.gguf: GGUF metadata: 'general.architecture' is missing"),
        ({"general.architecture": "gptneox"}, "'general.architecture' is 'gptneox', expected 'llama'"),
        ({"llama.block_count": None}, "'llama.block_count' is missing"),
        ({"llama.block_count": "2"}, "'llama.block_count' is '2', expected an integer"),
        ({"llama.block_count": 3}, "blk.2.attn_q.weight: missing"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "'llama.attention.layer_norm_rms_epsilon' is missing"),
        ({"llama.attention.head_count": [6, 6]}, r"'llama.attention.head_count' is \[6, 6\], expected an integer"),
        ({"llama.expert_count": 8}, "'llama.expert_count' is 8, expected 0"),
        ({"llama.rope.scaling.type": "yarn"}, "'llama.rope.scaling.type' is 'yarn', expected 'none' or 'linear'"),
        ({"llama.rope.dimension_count": 2}, "'llama.rope.dimension_count' is 2, expected 4"),
        ({"llama.logit_scale": 2.0}, "llama.logit_scale: not known"),
        ({"tokenizer.ggml.model": None}, "'tokenizer.ggml.model' is missing"),
        ({"tokenizer.ggml.model": "bert"}, "'tokenizer.ggml.model' is 'bert', expected 'gpt2' or 'llama'"),
        ({"tokenizer.ggml.pre": "falcon"}, "'tokenizer.ggml.pre' is 'falcon', expected 'gpt-2' or"),
        ({"tokenizer.ggml.merges": ["th e x"]}, "'tokenizer.ggml.merges' has 'th e x'"),
        ({"tokenizer.ggml.tokens": [*TOKENS, "more"]}, "has 102 tokens, expected at most 101"),
        ({"tokenizer.ggml.tokens": 5}, "'tokenizer.ggml.tokens' is no list of strings"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "'tokenizer.ggml.eos_token_id' is 1000000, expected an integer"),
    ],
)
def test_metadata_that_make_no_model_of_ours_are_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        write_hf(a_file(METADATA | change), tmp_path / "hf")
    assert str(error.value).startswith("model.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({Q: None}, f"{Q}: missing"),
        ({Q: (24, 20)}, rf"{Q}: its shape is \[24, 20\], expected \[24, 24\]"),
        ({"blk.0.attn_q.bias": (24,)}, "blk.0.attn_q.bias: no parameter of the model belongs to it"),
        ({"rope_freqs.weight": (2,)}, "rope_freqs.weight: no parameter .*; take the release in safetensors"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    tensors = tensors_of(made(CONFIG))
    for name, shape in change.items():
        tensors.pop(name, None)
        tensors |= {} if shape is None else {name: np.zeros(shape, np.float32)}
    with pytest.raises(CheckpointError, match=message):
        write_hf(a_file(tensors=tensors), tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_no_gguf_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").write_bytes(b"PK\3\4")
    with pytest.raises(CheckpointError, match="other: is no GGUF file: it begins with"):
        open_gguf(tmp_path / "other")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"is no file, expected a GGUF file; it holds model\.gguf"):
        open_gguf(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match="the package gguf reads such files, and it is missing: pip install"):
        open_gguf(tmp_path / "model.gguf")


def test_quantized_tensors_are_dequantized(tmp_path: Path) -> None:
    """By the package itself, from a file that it wrote."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is an extra")
    file, rng = tmp_path / "model.gguf", np.random.default_rng(0)
    x = rng.standard_normal((6, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    quantized = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("exact", x)
    writer.add_tensor("half", x.astype(np.float16))
    writer.add_tensor("eight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    found = open_gguf(file)
    assert (found.metadata["llama.block_count"], found.metadata["tokenizer.ggml.tokens"]) == (2, ["a", "b"])
    assert {name: (t.shape, t.kind) for name, t in found.tensors.items()} == {
        "exact": ((6, 64), "F32"),
        "half": ((6, 64), "F16"),
        "eight": ((6, 64), "Q8_0"),
    }
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:-900])
    with pytest.raises(CheckpointError, match=r"cut\.gguf: is truncated or damaged"):
        open_gguf(tmp_path / "cut.gguf")
    np.testing.assert_array_equal(found.tensors["exact"].read(), x)
    np.testing.assert_array_equal(found.tensors["half"].read(), x.astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(found.tensors["eight"].read(), x, atol=np.abs(x).max() / 127)
    assert json.dumps(found.metadata["general.architecture"]) == '"llama"'
