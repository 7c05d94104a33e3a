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

from rave_jax.checkpoint.hf_files import ADAPTER, ADAPTER_CONFIG, SIDECAR
from rave_jax.checkpoint.hf_import import Dtypes, import_hf, load_config
from rave_jax.checkpoint.naming import locations
from rave_jax.checkpoint.native import is_native
from rave_jax.checkpoint.parts import Source
from rave_jax.checkpoint.peft_config import MERGE_ADVICE, AdapterConfig, module_names
from rave_jax.checkpoint.safetensors_file import DTYPES, CheckpointError, Slice, Stored, read_header, read_into
from rave_jax.checkpoint.sidecar import saved_options
from rave_jax.checkpoint.target import parameter_shardings
from rave_jax.checkpoint.verify import match_sidecar, refusal
from rave_jax.families import TensorRule, family_named
from rave_jax.families.config import VlmConfig
from rave_jax.models.config import Lora, ModelOptions
from rave_jax.models.lora import is_projector
from rave_jax.models.parameters import named_parameters, with_values
from rave_jax.models.vlm import Vlm
from rave_jax.typing import NpArray

PREFIX = "base_model.model."
PART = re.compile(r"(.+)\.lora_([AB])\.weight")

ROUTER = "mlp.router.weight"


class Linear(NamedTuple):
    """One adapted linear of the checkpoint: its weight's rule, a [r,in], b [out,r] and the scale of their product."""

    rule: TensorRule
    a: Stored
    b: Stored
    scale: float


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
        self.linears = self._linears(config)
        rank = max(linear.a.shape[0] for linear in self.linears)
        self._scale = self.config.scale or 1.0
        same = rank == self.config.rank and not self.config.data.get("use_rslora") and self.config.scale
        alpha = float(self.config.alpha) if same else self._scale * rank
        targets = dict.fromkeys(_target(linear.rule) for linear in self.linears)
        self.lora = Lora(rank, alpha, tuple(targets))
        beside = saved_options(directory)
        self.options = dataclasses.replace(beside or ModelOptions(), lora=self.lora)
        """What the directory asks for, with the mechanisms that lie beside the adapter."""

    def _linears(self, config: VlmConfig) -> list[Linear]:
        family = family_named(config.family)
        tensors, problems = read_header(self.directory / ADAPTER)
        found: dict[tuple[str, str], Stored] = {}
        for key, stored in tensors.items():
            part = PART.fullmatch(key.removeprefix(PREFIX))
            if part is None or not key.startswith(PREFIX):
                problems.append(f"{key} ({ADAPTER}): not a LoRA weight; {MERGE_ADVICE}")
            else:
                found[family.canonical_key(part[1]), part[2]] = stored
        linears = []
        rules = [r for r in family.tensors(config) if r.hf_key.endswith(".weight") and len(r.shape) == 2]
        for rule in rules:
            names = module_names(family, rule)
            a, b = (found.pop((names[1], part), None) for part in "AB")
            wanted = any(self.config.targets(name, rule.layer) for name in names)
            if rule.entry is not None or rule.path == ROUTER:
                # PEFT adapts linear layers. In transformers 5 these are none, so targets that name them match nothing.
                problems += [f"{names[1]}: adapters of experts are not computed; {MERGE_ADVICE}"] if a or b else []
            elif rule.stack is None and not is_projector(rule.path):
                if wanted or a or b:
                    problems.append(
                        f"{names[0]}: adapters are read on linears of layers and projectors alone; {MERGE_ADVICE}"
                    )
            elif a is None or b is None:
                if wanted or a or b:
                    missing = [f"lora_{part}" for part, x in (("A", a), ("B", b)) if x is None]
                    problems.append(f"{names[0]}: {' and '.join(missing)} missing (not in {ADAPTER})")
            else:
                problems += self._misfits(rule, a, b)
                linears.append(Linear(rule, a, b, self.config.scale_of(names[0])))
        problems += [f"{s.key} ({ADAPTER}): the base model has no such linear" for s in found.values()]
        if not linears and not problems:
            problems.append(f"{ADAPTER}: holds no LoRA weights")
        if problems:
            raise CheckpointError(refusal(self.directory, problems))
        return linears

    def _misfits(self, rule: TensorRule, a: Stored, b: Stored) -> list[str]:
        out, into = rule.shape
        rank = a.shape[0] if a.shape else 0
        wrong = [f"{s.key} ({ADAPTER}): its number type is {s.dtype}" for s in (a, b) if s.dtype not in DTYPES]
        for stored, shape in ((a, (rank, into)), (b, (out, rank))):
            if stored.shape != shape or not rank:
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

        kind = np.result_type(*(_wide(s) for linear in self.linears for s in (linear.a, linear.b)))
        for stack, layers in (("decoder", model.config.text.num_layers), ("vision", _depth(model.config))):
            for target in self.lora.targets if layers else ():
                if target.startswith(stack):
                    for n in range(layers):
                        for part in ("down", "up"):
                            name = f"{stack}.layers.{n}.{target.removeprefix(stack + '.')}.adapter.{part}"
                            if name in known:  # not every kind of layer has the linear
                                layer_of(name, kind)
        for rule, a, b, scale in self.linears:
            place = "" if rule.stack is None else f"{rule.stack}.layers.{rule.layer}."
            name = f"{place}{rule.path.removesuffix('.weight')}.adapter"
            down, up = layer_of(f"{name}.down", kind), layer_of(f"{name}.up", kind)
            rank = a.shape[0]
            down[:rank] = numbers(a).reshape(rank, *down.shape[1:])
            factor = np.float32(scale / self._scale)
            up[..., :rank] = (numbers(b).astype(np.float32) * factor).reshape(*up.shape[:-1], rank)
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
    placed = {}
    for path, value in adapter.values(model).items():
        whole = value if dtypes == "stored" else value.astype(params[path].dtype)
        placed[path] = jax.make_array_from_callback(whole.shape, where[path], whole.__getitem__)
    return with_values(model, placed)


def _target(rule: TensorRule) -> str:
    path = rule.path.removesuffix(".weight")
    return path if rule.stack is None else f"{rule.stack}.{path}"


def _depth(config: VlmConfig) -> int:
    return 0 if config.vision is None else config.vision.depth


def _wide(stored: Stored) -> np.dtype:
    """float16 has no place in a model of ours; it goes into float32 without loss."""
    dtype = DTYPES[stored.dtype]
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
