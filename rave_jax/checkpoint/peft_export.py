"""LoRA out, as a PEFT adapter directory that PEFT loads on the base model.

What PEFT cannot hold of a model (mechanisms, context tokens) lies beside the adapter in our own files.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np

from rave_jax.checkpoint import sidecar
from rave_jax.checkpoint.card import Origin, adapter_card, notes, write_card
from rave_jax.checkpoint.hf_export import DTYPE_NAMES, Item, beside_items, gather, tensor_format, write_tensors
from rave_jax.checkpoint.hf_files import ADAPTER, ADAPTER_CONFIG, SIDECAR, SIDECAR_JSON
from rave_jax.checkpoint.hf_import import load_config
from rave_jax.checkpoint.merging import is_adapter
from rave_jax.checkpoint.naming import extra_parameters, locations, rules_of
from rave_jax.checkpoint.native import is_native
from rave_jax.checkpoint.parts import part_numbers, place_of
from rave_jax.checkpoint.peft_config import render
from rave_jax.checkpoint.peft_import import PREFIX
from rave_jax.checkpoint.peft_places import Pair, Part, Place, places_of
from rave_jax.checkpoint.safetensors_file import CheckpointError, Planned
from rave_jax.checkpoint.target import abstract_model
from rave_jax.checkpoint.verify import match
from rave_jax.checkpoint.written_whole import written_whole
from rave_jax.families import family_named
from rave_jax.models.parameters import Location, locate, named_parameters
from rave_jax.models.vlm import Vlm
from rave_jax.typing import NpArray

NAMED = 3
"""Differing weights that an error names."""


def export_peft(
    model: Vlm, destination: str | Path, base: str | Path, *, dtype: str | None = None, origin: Origin | None = None
) -> Path:
    """Write a model's LoRA as a PEFT adapter directory. Every process of a job calls it; the first one writes.

    Args:
        model: with LoRA in its options, on any mesh.
        destination: a directory to make; it must not exist or must be empty.
        base: HuggingFace directory of the model without its adapters; the adapter names it.
        dtype: number type of the adapters, "float32" or "bfloat16"; None writes them as they are.
        origin: what is known of the model's making, for its card.

    Returns:
        the destination.

    Raises:
        CheckpointError: the model has no LoRA, its other weights are not those of the base, or the destination cannot
            be written.
    """
    lora, destination, base = model.options.lora, Path(destination), Path(base)
    if lora is None:
        raise CheckpointError("the model has no LoRA, so there is no adapter to write")
    check_base(model, base)
    params = named_parameters(model)
    places = _adapted(model)
    outer = {place.layer for place, _ in places if place.kind == "down"}
    adapted, adapters = [], []
    for place, sources in places:
        rank = lora.rank * len(sources)
        adapted.append((place, rank))
        before = place.keys(inside=place.kind == "gate_up" and place.layer in outer)[0]
        factors_at = tuple(location for pair in sources.values() for location in pair)
        for number, (part, shape) in enumerate(zip("AB", place.shapes(rank), strict=True)):
            kind = np.dtype(params[factors_at[number].path].dtype) if dtype is None else DTYPE_NAMES[dtype]
            planned = Planned(f"{PREFIX}{before}.{place.suffix(part)}", kind, shape)
            join = functools.partial(_theirs, place, tuple(sources), number)
            adapters.append(Item(planned, factors_at[0], sources=factors_at, join=join))
    rest = [path for path in extra_parameters(model) if not is_adapter(path)]
    files = {ADAPTER: adapters} | ({SIDECAR: beside_items(model, rest)} if rest else {})
    with written_whole(destination, sum(i.planned.nbytes for items in files.values() for i in items)) as folder:
        for name, items in files.items():
            write_tensors(None if folder is None else folder / name, items, model)
        if folder is not None:
            config = render(lora, adapted, str(base.resolve()))
            (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            options = dataclasses.replace(model.options, lora=None)
            if sidecar.needs_sidecar(options):
                (folder / SIDECAR_JSON).write_text(sidecar.options_text(options))
            sentences = notes(options, lora, "peft", None)
            vision = model.config.vision is not None
            card = adapter_card(destination.name, sentences, origin or Origin(str(base)), vision=vision)
            write_card(folder, None, card)
    return destination


def _adapted(model: Vlm) -> list[tuple[Place, dict[Part, tuple[Location, Location]]]]:
    """Where the model has adapters, and where each of their factors, down and up, stands."""
    known, found = locations(model), []
    for place in places_of(family_named(model.config.family), model.config)[0]:
        names = {part: (f"{part.name}.adapter.down", f"{part.name}.adapter.up") for part in place.parts}
        own = {part: (known[down], known[up]) for part, (down, up) in names.items() if down in known}
        # Of experts the tensors are made of all at once.
        if own and place.kind != "expert":
            found.append((place, own))
    return found


def _theirs(place: Place, parts: tuple[Part, ...], number: int, *factors: NpArray) -> NpArray:
    """lora_A (0) or lora_B (1) of a place, from down and up of each part in turn."""
    pairs = map(Pair, factors[::2], factors[1::2])
    if not place.of_experts:
        pairs = (Pair(down.reshape(len(down), -1), up.reshape(-1, up.shape[-1])) for down, up in pairs)
    return place.theirs(dict(zip(parts, pairs, strict=True)))[number]


def check_base(model: Vlm, base: Path) -> None:
    """Refuse a base whose weights are not those that the model's adapters were trained on.

    Raises:
        CheckpointError: names weights that differ, or says that the base is another model.
    """
    advice = "give the directory that training began with (--base), or write the model with --lora merge"
    if is_native(base):
        raise CheckpointError(f"{base}: PEFT reads no native checkpoint as a base: {advice}")
    config, _ = load_config(base)
    if (config.text, config.vision) != (model.config.text, model.config.vision):
        raise CheckpointError(f"{base}: has other sizes than the model: {advice}")
    plain = abstract_model(
        config, dataclasses.replace(model.options, mechanisms=(), context=None, lora=None, extra_mlp=None)
    )
    found = match(base, plain, with_sidecar=False).sources
    sources = {(path, part.index): part for path, parts in found.items() for part in parts}
    params = named_parameters(model)
    differing = []
    for rule in rules_of(model, tensor_format(model, base)):
        location, there = locate(model, rule), locate(plain, rule)
        ours = gather(params[location.path][...], location.index, rule.entry)
        theirs = part_numbers(sources[there.path, place_of(there.index, rule.entry)], ours.shape).astype(ours.dtype)
        if not np.array_equal(ours, theirs):
            differing.append(rule.hf_key)
    if differing:
        named = ", ".join(differing[:NAMED]) + (f" and {len(differing) - NAMED} more" if len(differing) > NAMED else "")
        raise CheckpointError(
            f"{base}: its weights are not those of the model, so an adapter would not fit it; {named} differ (they "
            f"were trained beside the adapters, or belong to another model): {advice}"
        )
