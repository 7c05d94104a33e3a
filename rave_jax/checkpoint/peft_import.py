"""A PEFT adapter directory in: its LoRA becomes ours, on the model of its base directory."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rave_jax.checkpoint.hf_export import gather
from rave_jax.checkpoint.hf_files import ADAPTER, ADAPTER_CONFIG, SIDECAR
from rave_jax.checkpoint.hf_import import Dtypes, import_hf, load_config
from rave_jax.checkpoint.naming import locations
from rave_jax.checkpoint.native import is_native
from rave_jax.checkpoint.parts import Source
from rave_jax.checkpoint.peft_config import MERGE_ADVICE, AdapterConfig
from rave_jax.checkpoint.peft_places import EMBEDDING, HEAD, TIED_HEAD, Pair, Part, Place, name_of, places_of
from rave_jax.checkpoint.safetensors_file import DTYPES, CheckpointError, Slice, Stored, read_header, read_into
from rave_jax.checkpoint.sidecar import saved_options
from rave_jax.checkpoint.target import parameter_shardings
from rave_jax.checkpoint.verify import match_sidecar, refusal
from rave_jax.families import family_named
from rave_jax.families.config import VlmConfig
from rave_jax.models.config import Lora, ModelOptions
from rave_jax.models.parameters import named_parameters, with_values
from rave_jax.models.vlm import Vlm
from rave_jax.typing import NpArray

PREFIX = "base_model.model."
PART = re.compile(r"(.+)\.(?:lora_(?:embedding_)?([AB])(?:\.weight)?|base_layer\.weight)")


class Adapted(NamedTuple):
    """One adapted matrix of ours: its factors, and the scale of their product."""

    part: Part
    pair: Pair
    scale: float

    @property
    def rank(self) -> int:
        """Of the factors."""
        return self.pair.up.shape[-1]


class PeftAdapter:
    """An adapter directory, read against the config of its base model."""

    def __init__(self, directory: Path, config: VlmConfig):
        """
        Args:
            directory: with adapter_config.json and adapter_model.safetensors.
            config: of the base model.

        Raises:
            CheckpointError: lists everything that does not fit.
        """
        self.directory = directory
        self.config = AdapterConfig(directory)
        if not (directory / ADAPTER).is_file():
            raise CheckpointError(f"{directory}: holds {ADAPTER_CONFIG}, but no {ADAPTER}")
        self.base_weights: dict[str, Stored] = {}
        """Weights of the base that PEFT writes beside adapters of the embedding and of the head, by our path."""
        self.adapted = self._adapted(config)
        rank = max(one.rank for one in self.adapted)
        self._scale = self.config.scale or 1.0
        same = rank == self.config.rank and not self.config.data.get("use_rslora") and self.config.scale
        alpha = float(self.config.alpha) if same else self._scale * rank
        self.lora = Lora(rank, alpha, tuple(dict.fromkeys(one.part.target for one in self.adapted)))
        beside = saved_options(directory)
        self.options = dataclasses.replace(beside or ModelOptions(), lora=self.lora)
        """What the directory asks for, with the mechanisms that lie beside the adapter."""

    def _adapted(self, config: VlmConfig) -> list[Adapted]:
        family = family_named(config.family)
        tensors, problems = read_header(self.directory / ADAPTER)
        found: dict[tuple[str, str], Stored] = {}
        for key, stored in tensors.items():
            part = PART.fullmatch(key.removeprefix(PREFIX))
            if part is None or not key.startswith(PREFIX):
                problems.append(f"{key} ({ADAPTER}): not a LoRA weight; {MERGE_ADVICE}")
            else:
                found[family.canonical_key(part[1]), part[2] or "base"] = stored
        adapted: list[Adapted] = []
        places, others = places_of(family, config)
        for place in places:
            key = _key(place, found)
            own = _weight_of(place)
            if own is not None and (key, "base") in found:
                self.base_weights[own] = found.pop((key, "base"))
            a, b = (found.pop((key, part), None) for part in "AB")
            if a is None or b is None:
                if self._wanted(place) or a or b:
                    missing = [f"lora_{part}" for part, x in (("A", a), ("B", b)) if x is None]
                    problems.append(f"{place.names[0]}: {' and '.join(missing)} missing (not in {ADAPTER})")
                continue
            wrong = self._misfits(place, a, b)
            problems += wrong
            if not wrong:
                scale = self.config.scale_of(place.names[0])
                pairs = place.ours(numbers(a), numbers(b))
                adapted += [Adapted(part, pair, scale) for part, pair in pairs.items()]
        for rule in others:
            names = family.other_key(name_of(rule)), name_of(rule)
            a, b = (found.pop((names[1], part), None) for part in "AB")
            if a or b or any(self.config.targets(name, rule.layer) for name in names):
                problems.append(
                    f"{names[0]}: adapters are read on linears of layers and projectors, on experts, the embedding and "
                    f"the head alone; {MERGE_ADVICE}"
                )
        problems += [f"{s.key} ({ADAPTER}): the base model has no such linear" for s in found.values()]
        if not adapted and not problems:
            problems.append(f"{ADAPTER}: holds no LoRA weights")
        if problems:
            raise CheckpointError(refusal(self.directory, problems))
        return adapted

    def _wanted(self, place: Place) -> bool:
        """Does the config say that this has an adapter?"""
        if place.kind == "expert" or (place.kind == "embedding" and self.config.data["target_modules"] == "all-linear"):
            # Neither is a linear. In transformers 5 targets that name one expert match nothing.
            return False
        if place.parameter is None:
            return any(self.config.targets(name, place.layer) for name in place.names)
        suffix = ".weight" if place.kind == "router" else ""
        return any(self.config.targets_parameter(f"{name}{suffix}") for name in place.names)

    def _misfits(self, place: Place, a: Stored, b: Stored) -> list[str]:
        wrong = [f"{s.key} ({ADAPTER}): its number type is {s.dtype}" for s in (a, b) if s.dtype not in DTYPES]
        if place.rank(a.shape, b.shape) is not None:
            return wrong
        rank = a.shape[0] // place.experts if a.shape else 0
        for stored, shape in zip((a, b), place.shapes(max(rank, 1)), strict=True):
            if stored.shape != shape:
                wrong.append(f"{stored.key} ({ADAPTER}): its shape is {list(stored.shape)}, expected {list(shape)}")
        return wrong

    def values(self, model: Vlm) -> dict[str, NpArray]:
        """The adapters' parameters, and those of mechanisms that lie beside them, by path.

        Layers without an adapter get zeros, which add nothing. Where ranks differ, the smaller ones are filled up with
        zeros; where scales differ, they go into `up`.

        Args:
            model: abstract, made with `options`.

        Raises:
            CheckpointError: the side-car does not fit.
        """
        params, known = named_parameters(model), locations(model)
        values: dict[str, NpArray] = {}

        def layer_of(name: str, dtype: np.dtype) -> NpArray:
            path, index = known[name]
            whole = values.setdefault(path, np.zeros(params[path].shape, dtype))
            return whole if index is None else whole[index]

        kind = np.result_type(*(_wide(x.dtype) for one in self.adapted for x in one.pair))
        for stack, layers in (("decoder", model.config.text.num_layers), ("vision", _depth(model.config))):
            for target in self.lora.targets if layers else ():
                if target.startswith(stack):
                    for n in range(layers):
                        for part in ("down", "up"):
                            name = f"{stack}.layers.{n}.{target.removeprefix(stack + '.')}.adapter.{part}"
                            if name in known:  # not every kind of layer has the linear
                                layer_of(name, kind)
        for (name, _, entry), pair, scale in self.adapted:
            down, up = (layer_of(f"{name}.adapter.{part}", kind) for part in ("down", "up"))
            if entry is not None:
                down, up = down[entry], up[entry]
            rank, factor = pair.up.shape[-1], np.float32(scale / self._scale)
            # The rank is the first axis of `down`, or the second behind that of experts.
            some = down[:, :rank] if pair.down.ndim == 3 else down[:rank]
            some[...] = pair.down.reshape(some.shape)
            up[..., :rank] = (pair.up.astype(np.float32) * factor).reshape(*up.shape[:-1], rank)
        extras = [p for p in params if ".mechanisms." in p or p.startswith("context.")]
        sources: dict[str, list[Source]] = {}
        problems = match_sidecar(self.directory / SIDECAR, model, extras, sources)
        if problems:
            raise CheckpointError(refusal(self.directory, problems))
        for path, layers in sources.items():
            parts = [numbers(part.stored) for part in sorted(layers, key=lambda part: part.index)]
            values[path] = np.stack(parts) if layers[0].index else parts[0]
        return values


def import_peft(
    directory: Path,
    base: Path,
    mesh: Mesh | None = None,
    key: jax.Array | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    dtypes: Dtypes = "options",
) -> Vlm:
    """The model of an adapter directory on its base, with LoRA in its options; arguments as those of `import_hf`.

    Args:
        directory: with adapter_config.json and adapter_model.safetensors.
        base: in HuggingFace format, or native.
        changes: of the options that the directory asks for.

    Raises:
        CheckpointError: base or adapter cannot be read, or they do not fit.
    """
    config, _ = load_config(base)
    if is_native(base) and saved_options(base) is not None:
        raise CheckpointError(f"{base}: expected a plain model, but it has mechanisms or adapters of its own")
    adapter = PeftAdapter(directory, config)
    options = dataclasses.replace(adapter.options, **(changes or {}))
    # As PEFT reads it: what lies beside the base's weights is not the adapter's.
    model = import_hf(base, options, mesh, key, dtypes=dtypes, backbone_alone=True)
    params, where = named_parameters(model), parameter_shardings(model, mesh)
    _check_base_weights(adapter, params)
    placed = {}
    for path, value in adapter.values(model).items():
        whole = value if dtypes == "stored" else value.astype(params[path].dtype)
        placed[path] = jax.make_array_from_callback(whole.shape, where[path], whole.__getitem__)
    return with_values(model, placed)


def _key(place: Place, found: Mapping[tuple[str, str], Stored]) -> str:
    """Under which name an adapter file has the pair of a place: gate_up_proj stands inside where both parameters of
    experts have a pair, and one alone is known by its shapes."""
    inside, outside = place.keys(True)[1], place.keys(False)[1]
    if not place.of_experts:
        return outside
    if any((inside, part) in found for part in "AB"):
        return inside if place.kind == "gate_up" else outside
    a, b = (found.get((outside, part)) for part in "AB")
    alone = a is not None and b is not None and place.rank(a.shape, b.shape) is not None
    return outside if alone or place.kind == "down" else inside


def _weight_of(place: Place) -> str | None:
    """The path of a weight that PEFT writes beside its adapter; None of all but the embedding and the head."""
    return {"embed": EMBEDDING, "lm_head": HEAD, TIED_HEAD: EMBEDDING}.get(place.parts[0].name)


def _check_base_weights(adapter: PeftAdapter, params: Mapping[str, Any]) -> None:
    """Refuse an adapter beside weights of another base.

    Raises:
        CheckpointError: names those that differ.
    """
    for path, stored in adapter.base_weights.items():
        ours = params[path][...]
        if not np.array_equal(np.asarray(numbers(stored).astype(ours.dtype)), gather(ours, None)):
            raise CheckpointError(
                f"{stored.key} ({adapter.directory / ADAPTER}): differs from {path} of the base, so it was trained or "
                f"belongs to another base; {MERGE_ADVICE}"
            )


def _depth(config: VlmConfig) -> int:
    return 0 if config.vision is None else config.vision.depth


def _wide(dtype: np.dtype) -> np.dtype:
    """float16 has no place in a model of ours; it goes into float32 without loss."""
    return np.dtype(np.float32) if dtype == np.float16 else dtype


def numbers(stored: Stored) -> NpArray:
    """A whole tensor."""
    out = np.empty(stored.shape, DTYPES[stored.dtype])
    read_into(stored, stored.shape, [Slice(out, tuple(slice(None) for _ in stored.shape))])
    return out


def base_of(directory: Path, given: Path | None) -> Path:
    """The directory of an adapter's base model.

    Args:
        directory: of the adapter.
        given: by the user, or None to follow what the adapter says.

    Raises:
        CheckpointError: it is no directory here.
    """
    if given is not None:
        return given
    stated = AdapterConfig(directory).base
    for path in (Path(stated).expanduser(), directory / stated) if stated else ():
        if path.is_dir():
            return path
    what = f"{stated!r}, which is not a directory here" if stated else "not stated"
    raise CheckpointError(
        f"{directory / ADAPTER_CONFIG}: base_model_name_or_path is {what}: give the base model's directory (--base)"
    )
