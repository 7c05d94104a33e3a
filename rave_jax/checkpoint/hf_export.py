"""HuggingFace directory out: files and keys that transformers loads, written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from rave_jax.checkpoint import native, sidecar
from rave_jax.checkpoint.card import Origin, model_card, notes, with_stated, write_card
from rave_jax.checkpoint.hf_files import (
    CONFIG,
    INDEX,
    SIDECAR,
    SIDECAR_JSON,
    SINGLE,
    carried_files,
    has_weights,
    index_of,
    read_json,
    read_weights,
)
from rave_jax.checkpoint.merging import adapter_of, is_adapter, merged
from rave_jax.checkpoint.naming import extra_parameters, global_names
from rave_jax.checkpoint.parts import joined, place_of
from rave_jax.checkpoint.safetensors_file import Planned, write_header, write_tensor
from rave_jax.checkpoint.written_whole import written_whole
from rave_jax.families import TensorRule, family_named
from rave_jax.families.config import VlmConfig
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import Location, locate, named_parameters
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.sharding import replicated
from rave_jax.typing import NpArray

MAX_SHARD_BYTES = 5_000_000_000
EMBEDDING, HEAD, TIED_HEAD = "embed.weight", "lm_head.weight", "tied_head.weight"
DTYPE_NAMES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Written(Protocol):
    """Something that says of a tensor how it is written."""

    @property
    def planned(self) -> Planned: ...


class Item(NamedTuple):
    """A tensor to be written and where its numbers are.

    Fields:
        planned: the tensor.
        location: of its numbers.
        merges: are adapters merged into them?
        rules: how several parameters make the tensor, or how it stands in one; () where it is one layer of a
            parameter, or all of it.
        sources, join: parameters, or one layer of each, and what makes the tensor of them all; None where the fields
            before say it.
    """

    planned: Planned
    location: Location
    merges: bool = False
    rules: tuple[TensorRule, ...] = ()
    sources: tuple[Location, ...] = ()
    join: Callable[..., NpArray] | None = None


def export_hf(
    model: Vlm,
    destination: str | Path,
    source: str | Path | None = None,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    lora: Literal["merge", "beside"] = "merge",
    origin: Origin | None = None,
) -> Path:
    """Write a model as a HuggingFace directory. Every process of a job calls it; the first one writes.

    Args:
        model: with parameters on any mesh.
        destination: a directory to make; it must not exist or must be empty.
        source: the directory that the model came from: its config, tokenizer and processor files are carried along
            byte for byte, and its style of keys is kept. None writes a config made from ours, and no tokenizer.
        dtype: number type of what is written, "float32" or "bfloat16"; None writes each parameter as it is, and what
            adapters are merged into in the wider of both types.
        max_shard_bytes: a file takes no more, unless one tensor alone does.
        lora: adapters are merged into the weights, or written beside weights that they leave as they are.
        origin: what is known of the model's making, for its card.

    Returns:
        the destination.

    Raises:
        CheckpointError: the destination is not free, cannot be written or has too little room. Nothing is left there.
    """
    source = None if source is None else Path(source)
    target = None if dtype is None else DTYPE_NAMES[dtype]
    family = family_named(model.config.family)
    rename = functools.partial(family.other_key, style=key_style(model, source))
    params = named_parameters(model)
    merges = lora == "merge"

    def item(rules: tuple[TensorRule, ...]) -> Item:
        first = rules[0]
        weights = [weight_of(model, rule) for rule in rules]
        adapters = [adapter_of(path, params) or () for _, path in weights] if merges else []
        stored = _widest(params, (weights[0][0].path, *itertools.chain(*adapters)))
        planned = Planned(rename(first.hf_key), stored if target is None else target, first.shape)
        return Item(planned, weights[0][0], merges, rules)

    extras = [path for path in extra_parameters(model) if not (merges and is_adapter(path))]
    config = merged_config(model) if merges else model.config
    rules = family.formats[tensor_format(model, source)](config)
    backbone = [item(tuple(group)) for _, group in itertools.groupby(rules, lambda rule: rule.hf_key)]
    beside = beside_items(model, extras)
    files = divide(backbone, max_shard_bytes) | ({SIDECAR: beside} if beside else {})
    total = sum(i.planned.nbytes for items in files.values() for i in items)
    with written_whole(Path(destination), total) as folder:
        for name, items in files.items():
            write_tensors(None if folder is None else folder / name, items, model)
        if folder is not None:
            write_index(folder, {name: items for name, items in files.items() if name != SIDECAR})
            options = dataclasses.replace(model.options, lora=None) if merges else model.options
            number = number_type([item.planned for item in backbone])
            _write_config(folder, model, config, source, options, number)
            sentences = notes(options, model.options.lora, lora, rounding(model, dtype))
            if sentences or origin is not None:
                vision, name = model.config.vision is not None, Path(destination).name
                card = model_card(name, options, sentences, origin or Origin(), vision=vision)
                write_card(folder, source, card)
    return Path(destination)


def key_style(model: Vlm, source: Path | None) -> int:
    """Number of the style (`Family.styles`) of the keys in the directory that the model came from."""
    if source is not None and native.is_native(source):
        return native.key_style(source)
    if source is None or not has_weights(source):
        return 0
    return family_named(model.config.family).style_of(index_of(source) or read_weights(source).tensors)


def tensor_format(model: Vlm, source: Path | None) -> int:
    """Number of the format (`Family.formats`) of the tensors in the directory that the model came from."""
    if source is not None and native.is_native(source):
        return native.tensor_format(source)
    family = family_named(model.config.family)
    if source is None or len(family.formats) == 1 or not has_weights(source):
        return 0
    # From the headers of all files: tensors of two formats may differ in nothing but their shapes.
    shapes = {family.canonical_key(key): stored.shape for key, stored in read_weights(source).tensors.items()}
    return family.format_of(model.config, shapes)


def beside_items(model: Vlm, paths: list[str]) -> list[Item]:
    """Parameters beyond the backbone as the side-car holds them: by layer, under names that no cut of the stack
    changes."""
    params = named_parameters(model)
    return [
        Item(Planned(name, np.dtype(params[p].dtype), _layer_shape(params[p].shape, n)), Location(p, n))
        for p in paths
        for name, n in _layers(model, p)
    ]


def _layers(model: Vlm, path: str) -> list[tuple[str, int | None]]:
    names = global_names(model, path)
    return [(names[0], None)] if names == [path] else [(name, n) for n, name in enumerate(names)]


def _layer_shape(shape: tuple[int, ...], index: int | None) -> tuple[int, ...]:
    return shape if index is None else shape[1:]


def divide[T: Written](items: list[T], limit: int) -> dict[str, list[T]]:
    """Files in order, none above the limit unless for one tensor."""
    groups: list[list[T]] = [[]]
    size = 0
    for item in items:
        if groups[-1] and size + item.planned.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.planned.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {f"model-{n:05d}-of-{count:05d}.safetensors": group for n, group in enumerate(groups, start=1)}


def rounding(model: Vlm, dtype: str | None) -> str | None:
    """The number type below float32 that merged weights are rounded to, or None."""
    if dtype is not None:
        return None if dtype == "float32" else dtype
    params = named_parameters(model)
    weights = [(path, path) for path in params] + [(EMBEDDING, TIED_HEAD)]
    merges = [(path, *adapter) for path, known_as in weights if (adapter := adapter_of(known_as, params))]
    kinds = {str(_widest(params, paths)) for paths in merges}
    return next((name for name in sorted(kinds) if name != "float32"), None)


def _widest(params: Mapping[str, nnx.Param], paths: Iterable[str]) -> np.dtype:
    """The number type that holds all of these parameters: an adapter's master copy in float32 is finer than the weight
    that it is merged into."""
    return functools.reduce(np.promote_types, (np.dtype(params[path].dtype) for path in paths))


def write_tensors(path: Path | None, items: list[Item], model: Vlm) -> None:
    """A safetensors file. Every process calls it; those without a path only help to gather.

    Args:
        path: of the file, None in processes that do not write.
        items: its tensors.
        model: with their numbers.
    """
    params = named_parameters(model)
    # Wide types first: then every tensor starts at a multiple of its number's size.
    items = sorted(items, key=lambda i: -i.planned.dtype.itemsize)
    with contextlib.ExitStack() as stack:
        file = None if path is None else stack.enter_context(path.open("wb"))
        if file is not None:
            write_header(file, [i.planned for i in items])
        for item in items:
            planned, value = item.planned, _value(model, params, item)
            if file is not None:
                write_tensor(file, value.reshape(planned.shape).astype(planned.dtype, copy=False))
        if file is not None:
            file.flush()
            os.fsync(file.fileno())


def _value(model: Vlm, params: Mapping[str, nnx.Param], item: Item) -> NpArray:
    """The numbers of a tensor on the host; each process gathers the same ones."""
    if item.join is not None:
        return item.join(*(gather(params[path][...], n) for path, n in item.sources))
    if not item.rules:
        return gather(params[item.location.path][...], item.location.index)

    def of_rule(rule: TensorRule) -> NpArray:
        (path, n), known_as = weight_of(model, rule)
        value = gather(params[path][...], n, rule.entry)
        adapter = adapter_of(known_as, params) if item.merges else None
        if adapter is None or model.options.lora is None:
            return value
        return merged(value, *(gather(params[p][...], n, rule.entry) for p in adapter), model.options.lora)

    return joined([of_rule(rule) for rule in item.rules], item.rules)


def weight_of(model: Vlm, rule: TensorRule) -> tuple[Location, str]:
    """Where the numbers of a tensor are, and by which path an adapter of it is found: a tied head has the numbers of
    the embedding and an adapter of its own."""
    location = locate(model, rule)
    if rule.path == HEAD and model.lm_head is None:
        return Location(EMBEDDING, None), TIED_HEAD
    return location, location.path


def merged_config(model: Vlm) -> VlmConfig:
    """The config of a model whose adapters are merged: an embedding and a head that one of them changes are no longer
    tied."""
    config = model.config
    changed = any(f"{name}.adapter.down" in named_parameters(model) for name in ("tied_head", "embed"))
    if not (config.text.tie_embeddings and changed):
        return config
    return dataclasses.replace(config, text=dataclasses.replace(config.text, tie_embeddings=False))


def write_index[T: Written](folder: Path, files: dict[str, list[T]]) -> None:
    """The index of several files; one file alone has none."""
    if len(files) > 1:
        total = sum(i.planned.nbytes for items in files.values() for i in items)
        where = {i.planned.key: name for name, items in files.items() for i in items}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_config(
    folder: Path, model: Vlm, written: VlmConfig, source: Path | None, options: ModelOptions, dtype: str
) -> None:
    """config.json and its like, and the side-car's options. `written` is what the weights are of."""
    if source is None:
        config = family_named(model.config.family).render(written) | {"dtype": dtype}
        (folder / CONFIG).write_text(json.dumps(with_stated(config, options), indent=2) + "\n", encoding="utf-8")
    else:
        copy_small_files(source, folder, options, dtype)
        if written.text.tie_embeddings != model.config.text.tie_embeddings:
            _untie(folder / CONFIG)
    if sidecar.needs_sidecar(options):
        (folder / SIDECAR_JSON).write_text(sidecar.options_text(options))


def _untie(file: Path) -> None:
    config = read_json(file)
    config["tie_word_embeddings"] = False
    if isinstance(config.get("text_config"), dict):
        config["text_config"]["tie_word_embeddings"] = False
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def number_type(tensors: Sequence[Planned]) -> str:
    """The number type that config.json states, in which transformers then loads all of the weights: the widest that
    more than a hundredth of the numbers have. A few vectors are often kept wider than the rest."""
    counts: dict[np.dtype, int] = {}
    for one in tensors:
        counts[one.dtype] = counts.get(one.dtype, 0) + math.prod(one.shape)
    common = [dtype for dtype, count in counts.items() if 100 * count > sum(counts.values())]
    return str(max(common, key=lambda dtype: dtype.itemsize))


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The same where it states one, under both of its names, for the whole and for parts such as the tower."""

    def said(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _with_dtype(value, dtype)
        return dtype if key in ("dtype", "torch_dtype") and isinstance(value, str) else value

    return {key: said(key, value) for key, value in config.items()}


def copy_small_files(source: Path, folder: Path, options: ModelOptions, dtype: str | None = None) -> None:
    """Config, tokenizer, processor and licence files, byte for byte; but config.json says what these options add to the
    backbone, and the number type of its weights where one is given."""
    for file in carried_files(source):
        shutil.copyfile(file, folder / file.name)
    config = read_json(source / CONFIG)
    says = with_stated(config if dtype is None else _with_dtype(config, dtype), options)
    if says != config:
        (folder / CONFIG).write_text(json.dumps(says, indent=2) + "\n", encoding="utf-8")


@functools.partial(jax.jit, static_argnames="where")
def _part(x: jax.Array, index: tuple[int, ...], where: NamedSharding | None) -> jax.Array:
    for n in index:
        x = jax.lax.dynamic_index_in_dim(x, n, keepdims=False)
    return x if where is None else jax.lax.with_sharding_constraint(x, where)


@functools.partial(jax.jit, static_argnames="where")
def _whole(x: jax.Array, where: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, where)


def gather(x: jax.Array, layer: int | None, entry: int | None = None) -> NpArray:
    """One tensor on the host: all of x, one layer of it, or one entry of a layer. Devices hold one tensor more while it
    runs."""
    index = place_of(layer, entry)
    where = replicated(x.sharding.mesh) if isinstance(x.sharding, NamedSharding) else None
    if index:
        x = _part(x, index, where)
    elif where is not None and not x.is_fully_addressable:
        x = _whole(x, where)
    return np.asarray(x if x.is_fully_addressable else x.addressable_data(0))
