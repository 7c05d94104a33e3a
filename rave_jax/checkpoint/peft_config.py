"""adapter_config.json of PEFT (https://github.com/huggingface/peft): which linears a LoRA adapts, and how strongly.

PEFT names linears by their place in transformers' module tree (`model.language_model.layers.0.self_attn.q_proj`), ours
are named by layer-independent paths (`decoder.attention.query`). What we do not compute is refused by name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rave_jax.checkpoint.hf_files import ADAPTER_CONFIG, read_json
from rave_jax.checkpoint.peft_places import Place
from rave_jax.checkpoint.safetensors_file import CheckpointError
from rave_jax.models.config import MAX_RANK, Lora

MERGE_ADVICE = "merge it with PEFT (`merge_and_unload()`, `save_pretrained`) and read the merged directory"

# Keys of other kinds of adapters, and what they say where there is nothing of the kind.
ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "ensure_weight_tying": (False, None),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    # Others change the base's own weights when PEFT loads them.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


class AdapterConfig:
    """A PEFT config that we compute."""

    def __init__(self, directory: Path):
        """
        Raises:
            CheckpointError: it is no LoRA, or one of a kind that we do not compute.
        """
        self.file = directory / ADAPTER_CONFIG
        data = read_json(self.file)
        if not isinstance(data, dict):
            raise CheckpointError(f"{self.file}: expected an object")
        self.data: dict[str, Any] = data
        for key, allowed in ONLY.items():
            value = data.get(key, allowed[0])
            if value not in allowed:
                raise CheckpointError(f"{self.file}: {key} is {value!r}, expected {allowed[0]!r}: or {MERGE_ADVICE}")
        targets = data.get("target_modules")
        names = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
        if not (isinstance(targets, str) or names):
            raise CheckpointError(f"{self.file}: target_modules is {targets!r}, expected names of linears or a regex")
        parameters = data.get("target_parameters") or []
        if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
            raise CheckpointError(f"{self.file}: target_parameters is {parameters!r}, expected names of parameters")
        for key in ("rank_pattern", "alpha_pattern"):
            pattern = data.get(key) or {}
            if not isinstance(pattern, dict) or not all(type(n) in (int, float) for n in pattern.values()):
                raise CheckpointError(f"{self.file}: {key} is {pattern!r}, expected numbers by the names of linears")
            self._compiled(*(f"(.*\\.)?({name})$" for name in pattern))
        self._compiled(*(r for r in (targets, data.get("exclude_modules")) if isinstance(r, str)))
        self.rank = self._number("r", 8, whole=True)
        self.alpha = self._number("lora_alpha", 8)

    def _number(self, key: str, default: float, whole: bool = False) -> Any:
        value = self.data.get(key, default)
        good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not good or not (1 <= value <= MAX_RANK if whole else abs(value) <= 1e6):
            what = f"an integer from 1 to {MAX_RANK:,}" if whole else "a number"
            raise CheckpointError(f"{self.file}: {key} is {value!r}, expected {what}")
        return value

    def _compiled(self, *patterns: str) -> None:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise CheckpointError(f"{self.file}: {pattern!r} is not a valid regex: {error}") from error

    @property
    def base(self) -> str:
        """The base model's directory or name; "" where it says none."""
        value = self.data.get("base_model_name_or_path")
        return value if isinstance(value, str) else ""

    @property
    def scale(self) -> float:
        """Of the output of an adapter that no pattern names."""
        return self._scale(self.rank, self.alpha)

    def _scale(self, rank: float, alpha: float) -> float:
        return alpha / (rank**0.5 if self.data.get("use_rslora") else rank)

    def scale_of(self, name: str) -> float:
        """Of the output of one linear's adapter, by its place in the module tree."""
        rank = _by_pattern(self.data.get("rank_pattern"), name, self.rank)
        return self._scale(rank, _by_pattern(self.data.get("alpha_pattern"), name, self.alpha))

    def targets(self, name: str, layer: int | None) -> bool:
        """Does the config put an adapter on this linear?"""
        layers = self.data.get("layers_to_transform")
        if layers is not None and layer not in (layers if isinstance(layers, list) else [layers]):
            return False
        if _named(self.data.get("exclude_modules"), name):
            return False
        return _named(self.data["target_modules"], name)

    def targets_parameter(self, name: str) -> bool:
        """Does the config put an adapter on this parameter, by its place in the module tree?"""
        return any(name == one or name.endswith(f".{one}") for one in self.data.get("target_parameters") or ())


def _named(wanted: Any, name: str) -> bool:
    if wanted == "all-linear":
        return not name.endswith("lm_head")
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in wanted or ())


def _by_pattern(patterns: Any, name: str, default: float) -> float:
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def render(lora: Lora, adapted: list[tuple[Place, int]], base: str) -> dict[str, Any]:
    """adapter_config.json of an adapter on these places.

    Args:
        lora: the adapter.
        adapted: what it adapts, in every layer, and the rank there.
        base: where PEFT finds the model.
    """
    modules, parameters, ranks, alphas = set(), set(), {}, {}
    for place, rank in adapted:
        if place.parameter is not None:
            parameters.add(place.parameter)
            if rank != lora.rank:
                pattern = rf".*\.{re.escape(place.parameter.rpartition('.')[2])}"
                ranks[pattern], alphas[pattern] = rank, lora.alpha * rank / lora.rank
            continue
        name = re.escape(place.names[0])
        # All layers have the adapter; of what stands outside them only this one has.
        modules.add(re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", name) if place.everywhere else name)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": "|".join(sorted(modules)) or [],
        "target_parameters": sorted(parameters) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
