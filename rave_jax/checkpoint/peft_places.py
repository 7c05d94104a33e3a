"""Where PEFT puts LoRA in a model, and how its pairs (lora_A, lora_B) are ours (down, up), and back.

PEFT adapts linear layers and embeddings as modules, and other matrices as parameters (`target_parameters`):

    a linear, the head    A [r,in], B [out,r]             ours are the same
    an embedding          A [r,V], B [D,r]                down = B^T, up = A^T
    a router              as a linear, of the parameter `mlp.gate.weight`
    experts, all at once  A [E r,in], B [out,r E]         of the parameters `mlp.experts.gate_up_proj` and `.down_proj`
    an expert alone       as a linear, `mlp.experts.3.up_proj`, as older releases of transformers have them

A of experts is expert after expert; the columns of B go by rank first and by expert then. gate_up_proj has one pair for
two matrices of ours. What has adapters of its own on both becomes one of both ranks together: A side by side, and B
with zeros where the one's rank meets the other's rows. PEFT keeps the pairs of both parameters in wrappers inside each
other, gate_up_proj inside (`mlp.experts.base_layer`) where both are adapted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from rave_jax.families import Family, TensorRule
from rave_jax.families.config import VlmConfig
from rave_jax.models.lora import is_projector
from rave_jax.typing import Float, NpArray

Kind = Literal["linear", "embedding", "router", "gate_up", "down", "expert"]
EMBEDDING, HEAD, TIED_HEAD, ROUTER = "embed.weight", "lm_head.weight", "tied_head", "mlp.router.weight"
EXPERTS = ".experts"


class Pair(NamedTuple):
    """Our factors of one matrix: down [r,in] and up [out,r], of all experts with their axis in front."""

    down: NpArray
    up: NpArray


class Part(NamedTuple):
    """A matrix of ours.

    Fields:
        name: its global name (`naming.global_names`), without `.weight`.
        target: what `Lora.targets` calls it.
        entry: the expert whose it is; None: of all, or of none.
    """

    name: str
    target: str
    entry: int | None = None


@dataclasses.dataclass(frozen=True)
class Place:
    """What PEFT puts one pair on."""

    kind: Kind
    names: tuple[str, str]
    """Its name in the module tree of transformers 5, and the canonical one."""
    layer: int | None
    parts: tuple[Part, ...]
    shape: tuple[int, int]
    """(out, in) of the matrix, or of that of each expert."""
    experts: int = 1
    """How many matrices have one pair together."""
    everywhere: bool = False
    """Have other layers it too?"""

    @property
    def of_experts(self) -> bool:
        """Is the pair of all experts of a layer at once?"""
        return self.kind in ("gate_up", "down")

    @property
    def parameter(self) -> str | None:
        """What stands behind the layer in `target_parameters`; None for modules."""
        if self.kind == "router":
            return f"{self._tail}.weight"
        return self._tail if self.of_experts else None

    @property
    def _tail(self) -> str:
        return self.names[1].split(f".{self.layer}.", 1)[-1]

    def keys(self, inside: bool) -> tuple[str, str]:
        """What stands before `lora_A` in the file, of both names. `inside`: in the wrapper of another parameter."""
        if not self.of_experts:
            return self.names
        tree, canonical = (name.rpartition(".")[0] + (".base_layer" if inside else "") for name in self.names)
        return tree, canonical

    def suffix(self, part: str) -> str:
        """What stands behind that, of part A or B."""
        return f"lora_embedding_{part}" if self.kind == "embedding" else f"lora_{part}.weight"

    def rank(self, a: tuple[int, ...], b: tuple[int, ...]) -> int | None:
        """The rank of a pair of these shapes; None where they do not belong here."""
        rank = a[0] // self.experts if a else 0
        return rank if rank and (a, b) == self.shapes(rank) else None

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of lora_A and of lora_B of this rank."""
        (out, into), n = self.shape, rank * self.experts
        return ((n, out), (into, n)) if self.kind == "embedding" else ((n, into), (out, n))

    def ours(self, a: Float[NpArray, "r I"], b: Float[NpArray, "O r"]) -> dict[Part, Pair]:
        """What a pair of PEFT is of each matrix."""
        if self.kind == "embedding":
            return {self.parts[0]: Pair(b.T, a.T)}
        if not self.of_experts:
            return {self.parts[0]: Pair(a, b)}
        E, rank = self.experts, len(a) // self.experts
        down = a.reshape(E, rank, -1)
        up = b.reshape(-1, rank, E).transpose(2, 0, 1)
        if self.kind == "down":
            return {self.parts[0]: Pair(down, up)}
        half, rows = rank // 2, up.shape[1] // 2
        apart = rank % 2 == 0 and not up[:, :rows, half:].any() and not up[:, rows:, :half].any()
        ranks = (slice(half), slice(half, None)) if apart else (slice(None),) * 2
        spans = (slice(rows), slice(rows, None))
        return {
            part: Pair(down[:, of_rank], up[:, span, of_rank])
            for part, of_rank, span in zip(self.parts, ranks, spans, strict=True)
        }

    def theirs(self, pairs: Mapping[Part, Pair]) -> tuple[NpArray, NpArray]:
        """The pair of PEFT of those parts that have one."""
        downs, ups = zip(*pairs.values(), strict=True)
        if self.kind == "embedding":
            return ups[0].T, downs[0].T
        if not self.of_experts:
            return downs[0], ups[0]
        down, (out, into) = np.concatenate(downs, axis=1), self.shape
        rank = down.shape[1]
        up = np.zeros((self.experts, out, rank), down.dtype)
        rows, done = out // len(self.parts), 0
        for number, part in enumerate(self.parts):
            if part in pairs:
                own = pairs[part].up
                up[:, number * rows : (number + 1) * rows, done : done + own.shape[-1]] = own
                done += own.shape[-1]
        return down.reshape(-1, into), up.transpose(1, 2, 0).reshape(out, -1)


def places_of(family: Family, config: VlmConfig) -> tuple[list[Place], list[TensorRule]]:
    """Where PEFT can put LoRA that is computed, and matrices whose adapters are not."""
    untied = dataclasses.replace(config, text=dataclasses.replace(config.text, tie_embeddings=False))
    found: list[Place] = []
    others: list[TensorRule] = []
    seen: set[str] = set()
    for rule in family.tensors(untied):
        if EXPERTS in rule.hf_key:
            before = rule.hf_key.partition(EXPERTS)[0] + EXPERTS
            if before not in seen:
                seen.add(before)
                found += _experts(family, config, rule, before)
            if rule.entry is None:
                continue
        if not rule.hf_key.endswith(".weight") or len(rule.shape) != 2:
            continue
        if rule.stack is None and rule.path not in (EMBEDDING, HEAD) and not is_projector(rule.path):
            others.append(rule)
            continue
        kinds: dict[str, Kind] = {EMBEDDING: "embedding", ROUTER: "router"}
        kind = "expert" if rule.entry is not None else kinds.get(rule.path, "linear")
        tied = rule.path == HEAD and config.text.tie_embeddings
        name = rule.path.removesuffix(".weight")
        part = _part(rule, name, rule.entry)
        part = part._replace(name=TIED_HEAD) if tied else part
        out, into = rule.shape
        everywhere = rule.stack is not None
        found.append(Place(kind, _names(family, name_of(rule)), rule.layer, (part,), (out, into), 1, everywhere))
    return found, others


def name_of(rule: TensorRule) -> str:
    """A weight's canonical name as a module."""
    return rule.hf_key.removesuffix(".weight")


def _names(family: Family, name: str) -> tuple[str, str]:
    return family.other_key(name), name


def _part(rule: TensorRule, name: str, entry: int | None = None) -> Part:
    if rule.stack is None:
        return Part(name, name, entry)
    return Part(f"{rule.stack}.layers.{rule.layer}.{name}", f"{rule.stack}.{name}", entry)


def _experts(family: Family, config: VlmConfig, rule: TensorRule, before: str) -> list[Place]:
    """Both parameters of a layer's experts, gate_up_proj first, as transformers 5 has them."""
    experts, D = config.text.experts, config.text.hidden_size
    assert experts is not None
    E, F = experts.count, experts.mlp_size
    gate, up, down = (_part(rule, f"mlp.{name}") for name in ("gate", "up", "down"))
    return [
        Place("gate_up", _names(family, f"{before}.gate_up_proj"), rule.layer, (gate, up), (2 * F, D), E, True),
        Place("down", _names(family, f"{before}.down_proj"), rule.layer, (down,), (D, F), E, True),
    ]
