"""What a model family is: how to read its config, and which checkpoint tensor is which parameter."""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rave_jax.config import ConfigError
from rave_jax.families.config import VlmConfig
from rave_jax.families.gguf import GgufModels
from rave_jax.families.hf import HfConfig
from rave_jax.families.joining import Join
from rave_jax.families.pictures import PictureRules, ProcessorFiles
from rave_jax.families.small import SmallModels


class Cut(NamedTuple):
    """Which part of a tensor a parameter is, where several of one size lie side by side in it.

    Fields:
        axis: of the tensor, along which they lie.
        number: of the part, from 0.
        count: of parts.
    """

    axis: int
    number: int
    count: int


class TensorRule(NamedTuple):
    """One tensor of a checkpoint, or a part of one: the parts of a tensor have rules of their own, in order.

    Fields:
        hf_key: its canonical key in the checkpoint.
        path: the parameter's path; inside the layer (`attention.query.weight`) for tensors of a stack.
        layer: global number of the layer, None outside stacks.
        stack: which stack of layers, None outside.
        shape: in the checkpoint. The same numbers in the same order, reshaped, are the parameter (of one layer), if
            the fields below say nothing else.
        entry: the tensor is this entry of the (layer's) parameter, as of one expert; None: all of it.
        cut: the part of the tensor that is the parameter; None: all of it.
        swapped: are the last two axes of the tensor those of the parameter in the other order? Then, and with a cut,
            the axes are the parameter's own.
    """

    hf_key: str
    path: str
    layer: int | None
    stack: Literal["decoder", "vision"] | None
    shape: tuple[int, ...]
    entry: int | None = None
    cut: Cut | None = None
    swapped: bool = False


class LayerTensor(NamedTuple):
    """A tensor of a layer: `key` is what stands behind the layer in its key, and the other fields are those of
    `TensorRule`."""

    key: str
    path: str
    shape: tuple[int, ...]
    entry: int | None = None
    cut: Cut | None = None
    swapped: bool = False

    def rule(self, before: str, layer: int, stack: Literal["decoder", "vision"]) -> TensorRule:
        """The rule of a layer whose keys begin with `before`."""
        key, path, shape, entry, cut, swapped = self
        return TensorRule(before + key, path, layer, stack, shape, entry, cut, swapped)


class TensorSource(NamedTuple):
    """Where a tensor is in an original checkpoint: its key, and whether it lies in the tower's directory."""

    key: str
    in_tower: bool


class Original(NamedTuple):
    """How checkpoints in the format of a model's authors become HuggingFace's (`checkpoint/original.py`).

    Fields:
        recognises: is this the config of one?
        tower_key: key of its config that names the tower, whose directory is given apart.
        config: (its config, the tower's, id of the first token that is added) to the HF config. Raises ConfigError for
            what is not computed.
        sources: (config, keys of the checkpoint's tensors, keys of the tower's) to where each tensor is, by canonical
            key.
        ignored: keys of the checkpoint that are no parameters.
        files: (config, its config) to what the settings files hold that it lacks, by name.
        tokens: special tokens that are added to the tokenizer; the last one pads.
        template: the chat template.
    """

    recognises: Callable[[HfConfig], bool]
    tower_key: str
    config: Callable[[HfConfig, HfConfig, int], dict[str, Any]]
    sources: Callable[[VlmConfig, Collection[str], Collection[str]], dict[str, TensorSource]]
    ignored: re.Pattern[str]
    files: Callable[[VlmConfig, HfConfig], dict[str, dict[str, Any]]]
    tokens: tuple[str, ...]
    template: str


@dataclass(frozen=True)
class Family:
    """One record per family; nothing else in the library knows a family's name."""

    model_type: str
    """`model_type` of its HF config."""
    architecture: str
    """Class name in `architectures` of its HF config."""
    parse: Callable[[HfConfig], VlmConfig]
    """HF config to ours; raises ConfigError for what we do not compute."""
    render: Callable[[VlmConfig], dict[str, Any]]
    """Our config to an HF config that `parse` and transformers read."""
    tensors: Callable[[VlmConfig], tuple[TensorRule, ...]]
    """Every tensor of a checkpoint of this config."""
    other_tensors: tuple[Callable[[VlmConfig], tuple[TensorRule, ...]], ...] = ()
    """The same of checkpoints that hold the parameters in other tensors: they load too."""
    pictures: Callable[[VlmConfig, ProcessorFiles], PictureRules] = lambda config, files: PictureRules(config)
    """The rules of a model's pictures, videos and positions, from its config and the files of its processors."""
    image_processors: tuple[str, ...] = ()
    """Names in transformers, without `Fast` and `Pil`, of the image processors that `pictures` computes. A model whose
    files name another is refused."""
    video_processors: tuple[str, ...] = ()
    """The same of videos; empty where the family takes none."""
    tower: str = ""
    """Name of the module that has its `Tower`; empty for text families. The module imports jax, so it is imported when
    a model is built."""
    small: SmallModels | None = None
    """What makes a small random model of the family a whole HF directory (`checkpoint/tiny.py`); None: nothing does."""
    join: Join | None = None
    """How a vision tower and a text model become a model of the family (`checkpoint/join.py`); None: they do not."""
    gguf: GgufModels | None = None
    """GGUF files of its models, which `rave-jax convert from-gguf` reads; None: it reads none."""
    prefixes: tuple[tuple[str, str], ...] = ()
    """(other, canonical) beginnings of keys: checkpoints in the other style load too. Where there are several other
    styles, this is the one in which transformers 5 names its modules."""
    more_prefixes: tuple[tuple[tuple[str, str], ...], ...] = ()
    """The same of further styles."""
    original: Original | None = None
    """How checkpoints in the format of the model's authors become HuggingFace's; None: there is no other format."""
    unread: tuple[str, ...] = ()
    """Beginnings of keys of tensors that a checkpoint may hold and that are no part of the model: they are not read,
    and not exported."""

    def load_tower(self) -> Callable[..., Any]:
        """Its class of towers (`models.tower.Tower`).

        Raises:
            ConfigError: the family has none.
        """
        if not self.tower:
            raise ConfigError(f"vision is given, expected None: {self.model_type} is a text model and has no tower")
        return importlib.import_module(self.tower).Tower

    def canonical_key(self, key: str) -> str:
        """The key in canonical style, whichever style it has."""
        for other, canonical in itertools.chain(*self.styles):
            if key.startswith(other):
                return canonical + key.removeprefix(other)
        return key

    def other_key(self, key: str, style: int = 1) -> str:
        """A canonical key in another style; 0 is the canonical one."""
        for other, canonical in self.styles[style]:
            if key.startswith(canonical):
                return other + key.removeprefix(canonical)
        return key

    @property
    def formats(self) -> tuple[Callable[[VlmConfig], tuple[TensorRule, ...]], ...]:
        """Tensors of a checkpoint in each format: `tensors` is format 0."""
        return (self.tensors, *self.other_tensors)

    def format_of(self, config: VlmConfig, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The format that most of these tensors belong to, by canonical key and shape; of several the first."""
        if len(self.formats) == 1:
            return 0

        def fitting(format: Callable[[VlmConfig], tuple[TensorRule, ...]]) -> int:
            wanted = {rule.hf_key: rule.shape for rule in format(config)}
            return sum((key in shapes) + (shapes.get(key) == shape) for key, shape in wanted.items())

        counts = [fitting(format) for format in self.formats]
        return counts.index(max(counts))

    @property
    def styles(self) -> tuple[tuple[tuple[str, str], ...], ...]:
        """Beginnings of keys that each style changes: the canonical one changes none, `prefixes` is style 1."""
        return ((), self.prefixes, *self.more_prefixes)

    def style_of(self, keys: Collection[str]) -> int:
        """The style that most of these keys have; of several the first."""
        bare = [(key, self.canonical_key(key)) for key in keys]
        counts = [sum(self.other_key(name, n) == key for key, name in bare) for n in range(len(self.styles))]
        return counts.index(max(counts))
