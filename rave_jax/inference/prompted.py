"""Numbers of mechanisms that are found for each prompt: one pass over the prompts before they are read.

What a mechanism asks of the pass, and what it makes of it, it says itself (`attention/prompted.py`). All prompts of a
group are one batch, a row each; where a mechanism asks for them, those without pictures stand behind them. What is
found goes into a copy of the model while a program is traced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.attention import Prompted, PromptPass, PromptSizes, WantedStatistics
from rave_jax.attention.base import overrides
from rave_jax.attention.checks import name_of
from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import ConfigError, shown
from rave_jax.models.decoder_layer import DecoderLayer
from rave_jax.models.forward import Chunk, ImageFeatures, Want
from rave_jax.models.vlm import Vlm
from rave_jax.typing import Array, Bool, Float

PromptNumbers = tuple[Any, ...]
"""Of each prompt or slot: what each class of mechanisms found, arrays [B,...], in the order of `askers`."""


class Asking(NamedTuple):
    """What the mechanisms of a model ask of a prompt.

    Fields:
        blind: is the prompt without its pictures needed?
        words: is it needed which tokens belong to content words?
        anything: is there something to be found?
    """

    blind: bool
    words: bool
    anything: bool


def asking(model: Vlm) -> Asking:
    """What has to be found for each prompt.

    Raises:
        ConfigError: something else scales heads beside a mechanism that reads gates (as VHR), or two configs of one
            mechanism differ in what all of its layers share (as GIFT).
    """
    mechanisms = [m for _, mechanisms in _runs(model) for m in mechanisms]
    gates = [m for m in mechanisms if isinstance(m, Prompted) and m.GATES]
    other = [m for m in mechanisms if overrides(m, "head_gate") and not isinstance(m, type(gates[0]))] if gates else []
    if other:
        raise ConfigError(
            f"{name_of(gates[0])} chooses heads for each prompt, and {name_of(other[0])} scales heads too: the model "
            "can have one of them"
        )
    askers = _askers(model)
    for kind in askers:
        same = [m for m in mechanisms if isinstance(m, Prompted) and type(m) is type(kind)]
        for name in kind.shared:
            given = {m.shared[name] for m in same}
            if len(given) > 1:
                raise ConfigError(
                    f"{name_of(kind)}.{name} is {sorted(given)} in several configs, expected one value for all"
                )
    return Asking(any(m.BLIND for m in askers), any(m.words for m in askers), bool(askers))


def empty_numbers(model: Vlm, slots: int, size: int) -> PromptNumbers:
    """Numbers that change nothing, for slots of so many tokens."""
    sizes = _sizes(model, size)
    return tuple(m.neutral(slots, sizes) for m in _askers(model))


def found_numbers(
    model: Vlm,
    seen: Chunk,
    blind: Chunk | None,
    features: ImageFeatures | None,
    size: int,
    content: Bool[Array, "B T"] | None = None,
) -> PromptNumbers:
    """The numbers of whole prompts.

    Args:
        model: as built.
        seen: the prompts, one a row, padding on the right.
        blind: the same without their pictures; None where `asking` does not ask for them.
        features: of the prompts' pictures; None for a model without.
        size: tokens of a prompt and its answer, at most.
        content: which tokens belong to content words; None where `asking` does not ask for them.

    Raises:
        ConfigError: two kinds of mechanisms want statistics, or one finds other numbers than those of its `neutral`.
    """
    askers, rows = _askers(model), seen.tokens.shape[0]
    info, tokens, positions, index = seen.info, seen.tokens, seen.positions, seen.visual_index
    wanted, looks = _wanted(askers, seen.info, content), _looks(seen, features)
    if blind is not None:
        info, tokens = (jax.tree.map(_behind, a, b) for a, b in ((info, blind.info), (tokens, blind.tokens)))
        positions = jnp.concatenate([positions, blind.positions], axis=1)
        assert index is not None and blind.visual_index is not None
        index = _behind(index, blind.visual_index)
        features = jax.tree.map(lambda x: _behind(x, jnp.zeros_like(x)), features)
        if wanted is not None:
            wanted = dataclasses.replace(wanted, weights=_behind(wanted.weights, jnp.zeros_like(wanted.weights)))
    embedded = model.embed_tokens(tokens, info, features, index)
    want = Want(gates=any(m.GATES for m in askers), statistics=wanted)
    out = _finding(model).decoder(embedded, info, positions, want)
    gates, statistics = jax.tree.map(lambda x: x[:, :rows], (out.gates, out.statistics))
    found, sizes = PromptPass(seen.info, out.hidden[:rows], gates, statistics, looks), _sizes(model, size)
    return tuple(_fitting(m, m.found(found, sizes), m.neutral(rows, sizes)) for m in askers)


def with_numbers(model: Vlm, numbers: PromptNumbers) -> Vlm:
    """The model with the numbers of the prompts of its rows; to be called inside the program that uses it."""
    if not numbers:
        return model
    of_kind = {type(m): found for m, found in zip(_askers(model), numbers, strict=True)}
    model, at = jax.tree.map(lambda x: x, model), 0
    for count, mechanisms in _runs(model):
        for mechanism in mechanisms:
            if isinstance(mechanism, Prompted):
                mechanism.given = mechanism.of_layers(of_kind[type(mechanism)], at, count)
        at += count
    return model


def _askers(model: Vlm) -> Sequence[Prompted]:
    """One mechanism of each class that asks, in the order of layers."""
    found: dict[type, Prompted] = {}
    for _, mechanisms in _runs(model):
        for mechanism in mechanisms:
            if isinstance(mechanism, Prompted):
                found.setdefault(type(mechanism), mechanism)
    return [*found.values()]


def _looks(seen: Chunk, features: ImageFeatures | None) -> Float[Array, "N T 2"] | None:
    """What the class token of the tower looks at, token by token."""
    if features is None or features.looks is None or seen.visual_index is None:
        return None
    of_tokens = jnp.take_along_axis(features.looks, seen.visual_index[..., None], axis=1, mode="clip")
    return jnp.where((seen.info.kind == Kind.VISUAL)[..., None], of_tokens, 0.0)


def _fitting(mechanism: Prompted, found: Any, neutral: Any) -> Any:
    """What was found, if slots can hold it: they are made of what changes nothing."""
    of_found, of_neutral = (jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree) for tree in (found, neutral))
    if of_found != of_neutral:
        raise ConfigError(
            f"{name_of(mechanism)}: the hook `found` gave {shown(of_found)}, expected the arrays of its `neutral`, "
            f"{shown(of_neutral)}"
        )
    return found


def _wanted(askers: Sequence[Prompted], info: TokenInfo, content: Bool[Array, "B T"] | None) -> WantedStatistics | None:
    wanted = [(m, m.wanted(info, content)) for m in askers]
    wanting = [(m, statistics) for m, statistics in wanted if statistics is not None]
    if len(wanting) > 1:
        names = " and ".join(name_of(m) for m, _ in wanting)
        raise ConfigError(
            f"{names} each want statistics of a prompt's attention, and the pass gives those of one: the model can "
            "have one of them"
        )
    return wanting[0][1] if wanting else None


def _sizes(model: Vlm, tokens: int) -> PromptSizes:
    text = model.config.text
    return PromptSizes(tuple(text.attention_layers), text.num_heads, tokens)


def _finding(model: Vlm) -> Vlm:
    """The model that finds the numbers: of what is found for a prompt, only the finders act."""
    model = jax.tree.map(lambda x: x, model)
    for count, mechanisms in _runs(model):
        for n, mechanism in enumerate(mechanisms):
            if isinstance(mechanism, Prompted):
                mechanisms[n] = mechanism.finder(count)
    return model


def _runs(model: Vlm) -> Iterator[tuple[int, Any]]:
    """How many layers each run has that attends, and its list of mechanisms."""
    for run in model.decoder.layer_runs:
        if isinstance(run.layers, DecoderLayer):
            yield run.stop - run.start, run.layers.mechanisms


def _behind(x: Array, y: Array) -> Array:
    return jnp.concatenate([x, y], axis=0)
