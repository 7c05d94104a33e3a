"""Numbers of mechanisms that are found for each prompt: one pass over the prompts before they are read.

VHR chooses heads by what the prompt's last token makes of it with and without its pictures, layer by layer, where the
layers before are reinforced already (`attention/vhr.py`). GIFT reads by how much attention to visual tokens rises along
the question (`attention/gift.py`). All prompts of a group are one batch, a row each; for VHR those without pictures
stand behind them. What is found goes into a copy of the model while a program is traced.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.attention import Mechanism, WantedStatistics
from rave_jax.attention.base import overrides
from rave_jax.attention.calibrate.vhr import Reinforcing
from rave_jax.attention.checks import name_of
from rave_jax.attention.gift import GazeShift, question_rows, saliency_of
from rave_jax.attention.prompted import Prompted, PromptedHeads
from rave_jax.config import ConfigError
from rave_jax.models.decoder_layer import DecoderLayer
from rave_jax.models.forward import Chunk, ImageFeatures, Want
from rave_jax.models.vlm import Vlm
from rave_jax.typing import Array, Bool, Float


class PromptNumbers(NamedTuple):
    """Of each prompt or slot; L counts layers that attend, and S offsets. None where no mechanism asks.

    Fields:
        scales: what heads are multiplied by.
        saliency: of each token.
    """

    scales: Float[Array, "B L H"] | None = None
    saliency: Float[Array, "B S"] | None = None


class Asking(NamedTuple):
    """What the mechanisms of a model ask of a prompt."""

    blind: bool
    """Is the prompt without its pictures needed?"""
    gift: GazeShift | None

    @property
    def words(self) -> bool:
        """Is it needed which tokens belong to content words?"""
        return self.gift is not None and self.gift.config.words == "content"

    @property
    def anything(self) -> bool:
        """Is there something to be found?"""
        return self.blind or self.gift is not None


def asking(model: Vlm) -> Asking:
    """What has to be found for each prompt.

    Raises:
        ConfigError: something else scales heads beside VHR, two configs of GIFT differ in more than their layers, or
            its layer does not attend.
    """
    mechanisms = [m for _, mechanisms in _runs(model) for m in mechanisms]
    heads = [m for m in mechanisms if isinstance(m, PromptedHeads)]
    other = [m for m in mechanisms if overrides(m, "head_gate") and not isinstance(m, PromptedHeads)]
    if heads and other:
        raise ConfigError(
            f"{name_of(heads[0])} chooses heads for each prompt, and {name_of(other[0])} scales heads too: the model "
            "can have one of them"
        )
    shifts = [m for m in mechanisms if isinstance(m, GazeShift)]
    layers = {m.config.saliency_layer for m in shifts}
    for name in ("saliency_layer", "words"):
        given = {getattr(m.config, name) for m in shifts}
        if len(given) > 1:
            raise ConfigError(f"Gift.{name} is {sorted(given)} in several configs, expected one value for all")
    attending = model.config.text.attention_layers
    for layer in layers - {*attending}:
        named = f"{attending[0]} to {attending[-1]}" if len(attending) == model.config.text.num_layers else [*attending]
        raise ConfigError(f"Gift.saliency_layer is {layer}, expected one of the layers that attend, {named}")
    return Asking(bool(heads), shifts[0] if shifts else None)


def empty_numbers(model: Vlm, slots: int, size: int) -> PromptNumbers:
    """Numbers that change nothing, for slots of so many tokens."""
    asked, text = asking(model), model.config.text
    scales = jnp.ones((slots, len(text.attention_layers), text.num_heads), jnp.float32) if asked.blind else None
    return PromptNumbers(scales, None if asked.gift is None else jnp.zeros((slots, size), jnp.float32))


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
        size: S.
        content: which tokens belong to content words; None where `asking` does not ask for them.
    """
    asked, rows = asking(model), seen.tokens.shape[0]
    info, tokens, positions, index = seen.info, seen.tokens, seen.positions, seen.visual_index
    if blind is not None:
        info, tokens = (jax.tree.map(_behind, a, b) for a, b in ((info, blind.info), (tokens, blind.tokens)))
        positions = jnp.concatenate([positions, blind.positions], axis=1)
        assert index is not None and blind.visual_index is not None
        index = _behind(index, blind.visual_index)
        features = jax.tree.map(lambda x: _behind(x, jnp.zeros_like(x)), features)
    statistics = None
    if asked.gift is not None:
        words = question_rows(seen.info, content).astype(jnp.float32)
        statistics = WantedStatistics(words if blind is None else _behind(words, jnp.zeros_like(words)), rises=True)
    embedded = model.embed_tokens(tokens, info, features, index)
    out = _finding(model).decoder(embedded, info, positions, Want(gates=asked.blind, statistics=statistics))
    scales = saliency = None
    if out.gates is not None:
        scales = jnp.swapaxes(out.gates[:, :rows, 0], 0, 1)
    if asked.gift is not None:
        assert out.statistics is not None and out.statistics.rises is not None
        layer = model.config.text.attention_layers.index(asked.gift.config.saliency_layer)
        saliency = saliency_of(out.statistics.rises[layer, :rows], seen.info, size)
    return PromptNumbers(scales, saliency)


def with_numbers(model: Vlm, numbers: PromptNumbers) -> Vlm:
    """The model with the numbers of the prompts of its rows; to be called inside the program that uses it."""
    if numbers.scales is None and numbers.saliency is None:
        return model
    model, at = jax.tree.map(lambda x: x, model), 0
    for count, mechanisms in _runs(model):
        for mechanism in mechanisms:
            if isinstance(mechanism, PromptedHeads):
                assert numbers.scales is not None
                mechanism.given = jnp.swapaxes(numbers.scales[:, at : at + count], 0, 1)
            elif isinstance(mechanism, GazeShift):
                assert numbers.saliency is not None
                mechanism.given = jnp.broadcast_to(numbers.saliency, (count, *numbers.saliency.shape))
        at += count
    return model


def _finding(model: Vlm) -> Vlm:
    """The model that finds the numbers: VHR reinforces what it finds, and nothing else of a prompt acts."""
    model = jax.tree.map(lambda x: x, model)
    for count, mechanisms in _runs(model):
        for n, mechanism in enumerate(mechanisms):
            if isinstance(mechanism, PromptedHeads):
                mechanisms[n] = Reinforcing(mechanism.alpha, jnp.ones(count, bool))
            elif isinstance(mechanism, Prompted):
                mechanisms[n] = Mechanism()
    return model


def _runs(model: Vlm) -> Iterator[tuple[int, Any]]:
    """How many layers each run has that attends, and its list of mechanisms."""
    for run in model.decoder.layer_runs:
        if isinstance(run.layers, DecoderLayer):
            yield run.stop - run.start, run.layers.mechanisms


def _behind(x: Array, y: Array) -> Array:
    return jnp.concatenate([x, y], axis=0)
