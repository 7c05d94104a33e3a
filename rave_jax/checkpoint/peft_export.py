"""LoRA out, as a PEFT adapter directory that PEFT loads on the base model.

What PEFT cannot hold of a model (mechanisms, context tokens) lies beside the adapter in our own files.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from rave_jax.checkpoint import sidecar
from rave_jax.checkpoint.card import Origin, adapter_card, notes, write_card
from rave_jax.checkpoint.hf_export import DTYPE_NAMES, Item, beside_items, gather, tensor_format, write_tensors
from rave_jax.checkpoint.hf_files import ADAPTER, ADAPTER_CONFIG, SIDECAR, SIDECAR_JSON
from rave_jax.checkpoint.hf_import import load_config
from rave_jax.checkpoint.merging import adapter_of, is_adapter
from rave_jax.checkpoint.naming import extra_parameters, rules_of
from rave_jax.checkpoint.native import is_native
from rave_jax.checkpoint.parts import part_numbers, place_of
from rave_jax.checkpoint.peft_config import module_names, render
from rave_jax.checkpoint.peft_import import PREFIX
from rave_jax.checkpoint.safetensors_file import CheckpointError, Planned
from rave_jax.checkpoint.target import abstract_model
from rave_jax.checkpoint.verify import match
from rave_jax.checkpoint.written_whole import written_whole
from rave_jax.families import family_named
from rave_jax.models.parameters import Location, locate, named_parameters
from rave_jax.models.vlm import Vlm

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
    params, family = named_parameters(model), family_named(model.config.family)
    adapted, adapters = [], []
    for rule in rules_of(model):
        location = locate(model, rule)
        paths = adapter_of(location.path, params)
        if paths is None:
            continue
        adapted.append(rule)
        out, into = rule.shape
        for path, name, shape in zip(paths, "AB", ((lora.rank, into), (out, lora.rank)), strict=True):
            kind = np.dtype(params[path].dtype) if dtype is None else DTYPE_NAMES[dtype]
            key = f"{PREFIX}{module_names(family, rule)[0]}.lora_{name}.weight"
            adapters.append(Item(Planned(key, kind, shape), Location(path, location.index)))
    rest = [path for path in extra_parameters(model) if not is_adapter(path)]
    files = {ADAPTER: adapters} | ({SIDECAR: beside_items(model, rest)} if rest else {})
    with written_whole(destination, sum(i.planned.nbytes for items in files.values() for i in items)) as folder:
        for name, items in files.items():
            write_tensors(None if folder is None else folder / name, items, model)
        if folder is not None:
            config = render(lora, family, adapted, str(base.resolve()))
            (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            options = dataclasses.replace(model.options, lora=None)
            if sidecar.needs_sidecar(options):
                (folder / SIDECAR_JSON).write_text(sidecar.options_text(options))
            sentences = notes(options, lora, "peft", None)
            vision = model.config.vision is not None
            card = adapter_card(destination.name, sentences, origin or Origin(str(base)), vision=vision)
            write_card(folder, None, card)
    return destination


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
