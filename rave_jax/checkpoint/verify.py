"""Does a checkpoint fit a model? Every key, shape and number type is compared before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rave_jax.checkpoint import explain
from rave_jax.checkpoint.hf_files import SIDECAR, Weights, read_weights
from rave_jax.checkpoint.naming import extra_parameters, global_names, locations, rules_of
from rave_jax.checkpoint.parts import Source, place_of
from rave_jax.checkpoint.safetensors_file import DTYPES, CheckpointError, Slice, Stored, read_header, read_into
from rave_jax.families import family_named
from rave_jax.models.parameters import locate, named_parameters
from rave_jax.models.vlm import Vlm
from rave_jax.typing import NpArray

LISTED = 100
"""Problems that one error lists; more of them add no information."""
FILES = 4
HEAD, EMBEDDING = "lm_head.", "model.embed_tokens."
"""In the keys of the two tensors that may be one."""


class Match(NamedTuple):
    """Where every parameter's numbers are.

    Fields:
        sources: for each parameter the stored tensors, in the order of their places in it: one per layer of a stacked
            one, or several.
        fresh: parameters with no stored numbers, which begin at their start.
    """

    sources: dict[str, list[Source]]
    fresh: list[str]


def match(directory: Path, model: Vlm, with_sidecar: bool) -> Match:
    """Find each parameter of an abstract model in the directory.

    Args:
        directory: in HuggingFace format.
        model: from `jax.eval_shape`.
        with_sidecar: must parameters beyond the backbone be in the side-car? Otherwise they begin fresh.

    Raises:
        CheckpointError: lists everything that does not fit, with keys and files.
    """
    weights = read_weights(directory)
    problems = list(weights.problems)
    found = _by_canonical_key(weights, model, problems)
    sources: dict[str, list[Source]] = {}
    broken = _files_without_keys(weights)
    stored_shapes = {key: stored.shape for key, stored in found.items()}
    rules = rules_of(model, family_named(model.config.family).format_of(model.config, stored_shapes))
    embedding = next(rule.hf_key for rule in rules if rule.path == "embed.weight")
    head = found.pop(embedding.replace(EMBEDDING, HEAD), None) if model.config.text.tie_embeddings else None
    if head is not None and embedding not in found:
        # As in transformers: of two tied tensors either may be the one that is stored.
        found[embedding], head = head, None
    shapes = {rule.hf_key: rule.shape for rule in rules}
    known = {key: found.pop(key) for key in shapes if key in found}
    missing = [key for key in shapes if key not in known]
    problems += [line for key, stored in known.items() for line in _misfits(stored, shapes[key])]
    for rule in rules:
        path, layer = locate(model, rule)
        if rule.hf_key in known:
            place = place_of(layer, rule.entry)
            sources.setdefault(path, []).append(Source(known[rule.hf_key], place, rule.cut, rule.swapped))
    problems += _strangers(missing, found, weights, model, broken)
    extras = extra_parameters(model)
    if with_sidecar:
        problems += match_sidecar(directory / SIDECAR, model, extras, sources)
    if not problems and head is not None:
        problems += _differing_head(head, sources["embed.weight"][0].stored)
    if problems:
        raise CheckpointError(refusal(directory, problems))
    ordered = {path: sorted(parts, key=lambda part: part.index) for path, parts in sources.items()}
    return Match(ordered, [] if with_sidecar else extras)


def _strangers(missing: list[str], unknown: dict[str, Stored], weights: Weights, model: Vlm, broken: bool) -> list[str]:
    """What is said of keys that are missing, and of those that have no place."""
    lines = []
    prefix = explain.prefix_of(missing, unknown, family_named(model.config.family)) if missing and unknown else None
    if prefix is not None:
        lines.append(prefix[1])
        unknown = {key: stored for key, stored in unknown.items() if prefix[0] and not key.startswith(prefix[0])}
        missing = []
    quantized = explain.quantized_line(unknown)
    if quantized is not None:
        lines.append(quantized)
        unknown = {key: stored for key, stored in unknown.items() if not explain.QUANTIZED.fullmatch(key)}
    files = " or ".join(weights.files) if len(weights.files) <= FILES else f"{len(weights.files)} files"
    tie = {
        key: f". If {key.replace(HEAD, EMBEDDING)} is the head too, set tie_word_embeddings to true at the top of "
        "config.json; a checkpoint without any head, such as one that makes embeddings, writes no text"
        for key in missing
        if key.endswith(f"{HEAD}weight")
    }
    lines += [f"{key}: missing (not in {files}){tie.get(key, '')}" for key in missing if not broken]
    lines += [f"{s.key} ({s.file.name}): no parameter of the model belongs to it" for s in unknown.values()]
    return lines


def refusal(directory: Path, problems: list[str]) -> str:
    """One message that lists everything, up to a bound."""
    if len(problems) == 1:
        return f"{directory} does not fit: {problems[0]}"
    more = [f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
    return "\n  ".join([f"{directory} does not fit, {len(problems)} problems:", *problems[:LISTED], *more])


def _by_canonical_key(weights: Weights, model: Vlm, problems: list[str]) -> dict[str, Stored]:
    family = family_named(model.config.family)
    found: dict[str, Stored] = {}
    for key, stored in weights.tensors.items():
        name = family.canonical_key(key)
        if name.startswith(family.unread):
            continue
        if name in found:
            problems.append(
                f"{key} ({stored.file.name}): the same parameter as {found[name].key} ({found[name].file.name})"
            )
        found[name] = stored
    return found


def _files_without_keys(weights: Weights) -> bool:
    """Is there a file whose keys could not be read? Its problem is stated once, not once per missing key."""
    return {stored.file.name for stored in weights.tensors.values()} != set(weights.files)


def _misfits(stored: Stored, shape: tuple[int, ...]) -> list[str]:
    where = f"{stored.key} ({stored.file.name})"
    problems = []
    if stored.shape != shape:
        problems.append(f"{where}: its shape is {list(stored.shape)}, expected {list(shape)}")
    if stored.dtype not in DTYPES:
        problems.append(f"{where}: its number type is {stored.dtype}, expected {' or '.join(DTYPES)}")
    return problems


def match_sidecar(path: Path, model: Vlm, extras: list[str], sources: dict[str, list[Source]]) -> list[str]:
    """Find parameters beyond the backbone in the side-car.

    Args:
        path: of the side-car.
        model: abstract.
        extras: paths of the parameters.
        sources: gets where they are, by path.

    Returns:
        what does not fit.
    """
    if not extras and not path.is_file():
        return []
    found, problems = read_header(path)
    known = locations(model)
    shapes: Mapping[str, tuple[int, ...]] = {p: param.shape for p, param in named_parameters(model).items()}
    for name in [name for extra in extras for name in global_names(model, extra)]:
        location = known[name]
        stored = found.pop(name, None)
        if stored is None:
            problems.append(f"{name}: missing (not in {path.name})")
            continue
        shape = shapes[location.path]
        problems += _misfits(stored, shape if location.index is None else shape[1:])
        sources.setdefault(location.path, []).append(Source(stored, place_of(location.index, None)))
    return problems + [f"{key} ({path.name}): no parameter of the model belongs to it" for key in found]


def _differing_head(head: Stored, embedding: Stored) -> list[str]:
    """A checkpoint may repeat the tied embedding table as its head; another head would be lost silently."""
    where = f"{head.key} ({head.file.name})"
    if head.shape == embedding.shape and head.dtype == embedding.dtype:
        rows = max(1, (4 << 20) // max(1, head.shape[1] * DTYPES[head.dtype].itemsize))
        spans = [slice(n, min(n + rows, head.shape[0])) for n in range(0, head.shape[0], rows)]
        if all(np.array_equal(_rows(head, span), _rows(embedding, span)) for span in spans):
            return []
    return [
        f"{where}: config.json ties the head to {embedding.key} (tie_word_embeddings, at the top or in text_config), "
        "but the two differ: set it to false in both places if the head is one of its own"
    ]


def _rows(stored: Stored, span: slice) -> NpArray:
    out = np.empty((span.stop - span.start, stored.shape[1]), DTYPES[stored.dtype])
    read_into(stored, stored.shape, [Slice(out, (span, slice(None)))])
    return out.view(np.uint8)
