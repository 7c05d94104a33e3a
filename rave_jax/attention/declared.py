"""What the config of a mechanism says of itself: its layers, its modules, and what it asks of the rest of the model.

A mechanism of a user's own is a frozen dataclass that derives from `MechanismConfig`. Only `build` has to be written;
each other declaration has a default that fits a mechanism which asks for nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import jax

from rave_jax.attention.base import AttentionDims, Mechanism
from rave_jax.attention.cost import LayerReading, PicturesBefore
from rave_jax.config import ConfigError
from rave_jax.layout import VisualLayout
from rave_jax.open_union import OpenUnion

Layers = Literal["all"] | tuple[int, ...]


class NamedLayers(NamedTuple):
    """What a word of `layers` means: a part of the layers that attend, and that part in words."""

    part: slice
    said: str


ALL = NamedLayers(slice(None), "all layers that attend")
ALL_BUT_LAST = NamedLayers(slice(-1), "all layers that attend but the last")


class LayeredConfig(ABC):
    """What stands in some layers of a decoder."""

    WORDS: ClassVar[Mapping[str, NamedLayers]] = {"all": ALL}
    """What `layers` may be beside numbers."""

    @property
    def layers(self) -> str | tuple[int, ...]:
        """Global numbers of the decoder layers that use it, or one of `WORDS`; most configs have a field of this
        name."""
        return "all"

    def layers_of(self, attending: Sequence[int]) -> Sequence[int]:
        """Those layers by global number, in a decoder whose layers `attending` attend. Read by `plan_layer_runs`.

        Raises:
            ConfigError: no such word, or the model has none of the layers that it means.
        """
        if not isinstance(self.layers, str):
            return self.layers
        if self.layers not in self.WORDS:
            raise ConfigError(
                f"{self.called}.layers is {self.layers!r}, expected numbers of layers or one of {', '.join(self.WORDS)}"
            )
        part, said = self.WORDS[self.layers]
        if attending and not attending[part]:
            raise ConfigError(
                f"{self.called}.layers is {self.layers!r}, {said}, and the model has only {len(attending)} of them; "
                "expected numbers of layers"
            )
        return attending[part]

    @property
    def other_layers(self) -> Mapping[str, int]:
        """Fields that name one more layer each, where something is read or found, with its global number. Read by
        `plan_layer_runs`, which refuses a layer that does not attend."""
        return {}

    @abstractmethod
    def build(self, dims: AttentionDims, key: jax.Array) -> Mechanism:
        """The mechanism of one layer; called by `build_mechanisms`."""
        ...

    @property
    def called(self) -> str:
        """How errors name it: by the class that stands in the config."""
        return type(self).__name__

    @property
    def apart(self) -> str | None:
        """What a user can do where it cannot share a layer with another; None: give them different layers."""
        return None

    @property
    def looks_ahead(self) -> bool:
        """May a token see later ones, or do later ones decide what it sees? Generation then reads each prompt in one
        piece (`Decoder.looks_ahead`)."""
        return False

    @property
    def needs_order(self) -> bool:
        """Does it look keys up by their place in the row, and not by their order? A cache that keeps keys by region
        cannot serve it, so `ModelOptions` refuses it beside a mechanism whose `layout` has regions."""
        return False

    def stays(self, visual: int, pictures: int) -> tuple[int, ...] | None:
        """How many of so many visual tokens of a prompt, in so many pictures, can be left behind one of its layers:
        bounds in ascending order, the last the most there can be. Generation has a shorter program for each. None: no
        token leaves. Always as many bounds, whatever the prompt."""
        return None

    @property
    def drops(self) -> bool:
        """Do tokens leave after its layers? Each such layer ends a layer run."""
        return self.stays(0, 0) is not None

    @property
    def needs_all(self) -> bool:
        """Does it count on every token of a document in its layers? `ModelOptions` refuses it beside one that drops
        tokens."""
        return False

    @property
    def skips_keys(self) -> bool:
        """May a decoding step leave out the keys of regions that were not chosen? So where all that is added to scores
        is a pair term, or regions are ranked without their keys' scores. `score` is then called with the keys of no
        region and with those of regions apart. Read by `region_cache.against_gathering`."""
        return False

    @property
    def reads_class_token(self) -> bool:
        """Does it read what the vision tower's class token looks at (`PromptPass.looks`)? Models whose tower has none
        refuse it."""
        return False

    @property
    def of_prompt(self) -> bool:
        """Are its numbers found for each prompt before it is read? Its module then is a `Prompted`
        (`attention/prompted.py`). Generation finds them, and evaluations with it; training and other passes over whole
        rows refuse it."""
        return False


class MechanismConfig(LayeredConfig, OpenUnion):
    """What a config names among `ModelOptions.mechanisms`: a union of all frozen dataclasses that derive from it, those
    of a user's own files among them (`rave_jax/open_union.py`)."""

    @property
    def layout(self) -> VisualLayout:
        """The regions that it wants visual tokens grouped in; the default asks for none. `ModelOptions.layout` has them
        for data, cache and kernels. Context tokens are an option of the model and stay None here."""
        return VisualLayout()

    def in_layout(self, layout: VisualLayout) -> LayeredConfig:
        """What builds its layers in a model of this layout, that of the first mechanism with regions; the default
        reads the regions of the layout alone, and is refused where it wants others.

        Raises:
            ConfigError: names both layouts.
        """
        if self.layout.regions is not None and self.layout != layout:
            raise ConfigError(
                f"mechanisms: {self.called} asks for other regions than the model's layout ({self.layout.regions}, "
                f"max_regions {self.layout.max_regions}, and {layout.regions}, max_regions {layout.max_regions}), and "
                f"reads those of the layout alone; give it the same regions and max_regions, or put it first among the "
                "mechanisms, where the other is a Gaze"
            )
        return self

    @property
    def against_kernels(self) -> str | None:
        """Why the fused kernels ("pallas_tpu") cannot serve it, as a sentence; None where they can. `ModelOptions`
        refuses that backend with it."""
        return None

    def reading(self, pictures: PicturesBefore, dims: AttentionDims, number_bytes: int) -> LayerReading | None:
        """What queries read of pictures in one of its layers, and what that costs; None: all keys, as plain attention.
        Read by `evaluation/accounting.py`."""
        return None
