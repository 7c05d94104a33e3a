"""A small random model as a complete HuggingFace directory, through the exporter.

Start of the weights, as `Vlm` makes them: linears normal with standard deviation 1/sqrt(fan_in), which keeps the size
of activations at any width (HF's fixed 0.02 is a quarter of that at a width of 128); the embedding table normal with
0.02, and apart from the head, since that learns sooner (docs/results.md); biases zero, norms one.

The tokenizer is byte-level BPE: every byte is a token, so it reads any text, and a few merges make the
words of the chat format and of the synthetic questions short.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from rave_jax.checkpoint.hf_export import export_hf
from rave_jax.checkpoint.target import abstract_model, check_room, parameter_shardings
from rave_jax.config import check_fields, require
from rave_jax.families import FAMILIES, family_named
from rave_jax.families.config import VlmConfig
from rave_jax.families.small import SmallModels
from rave_jax.models.config import ModelOptions
from rave_jax.models.vlm import Vlm

BYTES = 256
VOCAB_SIZE = 448
"""Rows of the embedding table: 256 bytes, special tokens, and room for merges; a number that devices can share."""
WORDS = (
    "system user assistant Which What digit number is the value total price of in on at cell bar row column and "
    "How many shapes are there there? cell? bar? shapes? red green blue yellow orange purple pink cyan brown gray "
    "circle circles square squares triangle triangles cross crosses"
)
"""What the merges are learned from, each word with and without a blank before it."""


@dataclass(frozen=True)
class Tiny:
    """A small random model with a byte-level tokenizer, written into the run directory in HuggingFace format."""

    family: str = next(iter(FAMILIES))
    """Model family, by its HF `model_type` (docs/families.md). Sizes that its models do not have are ignored."""
    seed: int = 0
    """Seed of the weights."""
    hidden_size: int = 128
    """Width of the decoder."""
    num_layers: int = 4
    """Decoder layers."""
    num_heads: int = 4
    """Query heads of the decoder."""
    num_kv_heads: int = 2
    """Key/value heads of the decoder."""
    mlp_size: int = 256
    """Mlp width of the decoder."""
    vision_hidden_size: int = 128
    """Width of the tower."""
    vision_layers: int = 2
    """Blocks of the tower."""
    vision_heads: int = 4
    """Heads of the tower."""
    vision_mlp_size: int = 256
    """Mlp width of the tower."""
    window_size: int = 112
    """Side of the tower's attention windows in pixels."""
    patch_size: int = 14
    """Side of a patch in pixels."""
    merge_size: int = 2
    """Side, in patches, of the square that becomes one visual token."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2^32 - 1")
        small_models(self.family)
        sizes = [f.name for f in dataclasses.fields(self) if f.name not in ("family", "seed")]
        for name in sizes:
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        ok = self.hidden_size % self.num_heads == 0 and self.hidden_size // self.num_heads % 2 == 0
        require(ok, "hidden_size", self.hidden_size, f"num_heads {self.num_heads} times an even number")
        tiny_config(self)  # it checks the rest


def tiny_config(sizes: Tiny) -> VlmConfig:
    """The config of a model of these sizes.

    Raises:
        ConfigError: sizes that make no model.
    """
    small = small_models(sizes.family)
    return small.config(sizes, VOCAB_SIZE, token_ids(small))


def small_models(family: str) -> SmallModels:
    """How small models of this family are made.

    Raises:
        ConfigError: there is no such family, or nothing makes small models of it.
    """
    known = [name for name, one in FAMILIES.items() if one.small is not None]
    require(family in known, "family", family, " or ".join(known))
    small = family_named(family).small
    assert small is not None
    return small


def token_ids(small: SmallModels) -> dict[str, int]:
    """Ids of the special tokens."""
    return {token: BYTES + n for n, token in enumerate(small.special_tokens)}


def byte_tokenizer(family: str = Tiny.family) -> Tokenizer:
    """Byte-level BPE over UTF-8, and the special tokens of the family's chat format. The same at every call."""
    small = small_models(family)
    ids = token_ids(small)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(alphabet) == BYTES
    vocab = {char: n for n, char in enumerate(alphabet)} | ids
    merges = learned_merges(VOCAB_SIZE - len(vocab))
    vocab |= {left + right: len(vocab) + n for n, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if small.leading:
        pair = [(small.leading, ids[small.leading])]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{small.leading} $A", special_tokens=pair)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ids])
    return tokenizer


def learned_merges(limit: int) -> list[tuple[str, str]]:
    """At most `limit` merges that make tokens of `WORDS`."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=BYTES + limit, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator([word for plain in WORDS.split() for word in (plain, " " + plain)], trainer)
    return [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]


def write_tiny(destination: str | Path, sizes: Tiny = Tiny()) -> Path:
    """Write the model, its tokenizer and its processor settings.

    Args:
        destination: a directory to make; it must not exist or must be empty.
        sizes: of the model, and its seed.

    Raises:
        ConfigError: sizes that make no model, or a destination that cannot be written.
    """
    config = tiny_config(sizes)
    options = ModelOptions(param_dtype="float32")
    abstract = abstract_model(config, options)
    check_room(abstract, parameter_shardings(abstract, None))
    model = jax.jit(lambda key: Vlm(config, options, key=key))(jax.random.key(sizes.seed))
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_files(Path(folder), sizes)
        return export_hf(model, destination, folder)


def write_tiny_files(folder: Path, sizes: Tiny) -> None:
    """Write what a model directory holds beside its weights into a folder that is there."""
    small = small_models(sizes.family)
    byte_tokenizer(sizes.family).save(str(folder / "tokenizer.json"))
    for name, data in small.files(tiny_config(sizes), token_ids(small)).items():
        (folder / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
