"""A hook that fails, or gives what a layer cannot take, is refused when a model is built, in one error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rave_jax import attention as at
from rave_jax.attention.base import Channels, KeyFactor, OtherQuery, Views
from rave_jax.config import ConfigError
from rave_jax.kernels.attention import KeyGroups, MaskCodes, Term
from tests.attention.packed import DIMS, KEY

Hook = Callable[..., Any]
WIDE = DIMS._replace(hidden_size=5)


@dataclass(frozen=True)
class Wrong(at.MechanismConfig):
    """A user's config of a mechanism with these hooks."""

    hooks: dict[str, Hook] = field(default_factory=dict)
    kind: type[at.Mechanism] = at.Mechanism

    @property
    def of_prompt(self) -> bool:
        return issubclass(self.kind, at.Prompted)

    def stays(self, visual: int, pictures: int) -> tuple[int, ...] | None:
        return (visual,) if "tokens" in self.hooks else None

    def build(self, dims: at.AttentionDims, key: jax.Array) -> at.Mechanism:
        owns = (*self.kind.OWNS, *({"positions", "factor", "route", "tokens"} & {*self.hooks}))
        return type("Mine", (self.kind,), {**self.hooks, "OWNS": owns})()


def of_masses(self: Any, x: Any, parts: at.Parts, info_q: Any, info_k: Any) -> dict[str, Any]:
    return {"mass": jnp.sum(parts.mass)}


def both(self: Any, x: Any, remembered: Any, info_k: Any) -> KeyGroups:
    return KeyGroups(jnp.zeros_like(info_k.kind), 2)


def score(make: Callable[..., Any]) -> dict[str, Hook]:
    return {"score": lambda self, x, remembered, info_q, info_k: make(x, info_q, info_k)}


WRONG: dict[str, tuple[dict[str, Hook], str]] = {
    "head_gate of too few heads": (
        {"head_gate": lambda self, x, out, info_q: jnp.ones((*out.shape[:2], 3))},
        r"`head_gate` gave float32 of shape \(3, 11, 3\), expected float32 \[#B, #T, H\] with B = 3 rows, T = 11",
    ),
    "head_gate in the type of the model": (
        {"head_gate": lambda self, x, out, info_q: out[..., 0]},
        "`head_gate` gave bfloat16 of shape .* expected float32",
    ),
    "head_gate that is a number": (
        {"head_gate": lambda self, x, out, info_q: 2.0},
        "`head_gate` gave an object of class float, expected float32",
    ),
    "head_gate that fails": (
        {"head_gate": lambda self, x, out, info_q: x.q @ x.k},
        r"`head_gate` fails at .*test_given.py:\d+: TypeError: dot_general requires .*tried with B = 3 rows",
    ),
    "positions of one axis": (
        {"positions": lambda self, info_q, info_k, own, positions: positions[0]},
        r"`positions` gave int32 of shape \(3, 11\), expected int32 \[3, B, T\]",
    ),
    "mask of queries alone": (
        {"mask": lambda self, info_q, info_k, codes: codes._replace(order=codes.lo)},
        r"`mask` gave order as int32 of shape \(3, 11\), expected int32 \[B, S\] with B = 3 rows, S = 23 keys",
    ),
    "mask that forgets to return": (
        {"mask": lambda self, info_q, info_k, codes: None},
        "`mask` gave None, expected",
    ),
    "mask of floats": (
        {"mask": lambda self, info_q, info_k, codes: MaskCodes(*(x * 1.0 for x in codes))},
        "`mask` gave lo as float32",
    ),
    "remember without kv heads": (
        {"remember": lambda self, x: x.hidden},
        r"`remember` gave an array of it as bfloat16 of shape \(3, 23, 5\), expected numbers \[B, S, K, ...\]",
    ),
    "score of another class": (
        score(lambda x, q, k: {"terms": ()}),
        "`score` gave an object of class dict",
    ),
    "a term that is no tuple": (
        score(lambda x, q, k: at.Score(terms=Term(jnp.abs))),
        "`score` gave terms as an object of class Term, expected Sequence",
    ),
    "features that have no names": (
        score(lambda x, q, k: at.Score(terms=(Term(jnp.abs, key=k.offset),))),
        r"`score` gave terms\[0\].key as an object of class .*Tracer, expected Mapping",
    ),
    "scale of heads": (
        score(lambda x, q, k: at.Score(scale=jnp.ones(x.q.shape[:3]))),
        r"`score` gave scale as float32 of shape \(3, 11, 4\), expected float32 \[B, T\]",
    ),
    "key_bias of the queries at hand": (
        score(lambda x, q, k: at.Score(key_bias=jnp.zeros(x.q.shape[:3]))),
        r"`score` gave key_bias as float32 of shape \(3, 11, 4\), expected float32 \[B, S, H\]",
    ),
    "channels of other widths": (
        score(lambda x, q, k: at.Score(channels=Channels(x.q, jnp.zeros((*k.kind.shape, 2, 3))))),
        r"`score` gave channels.k as float32 of shape \(3, 23, 2, 3\), expected numbers \[B, S, K, 8\]",
    ),
    "another query without its keys": (
        score(lambda x, q, k: at.Score(query=OtherQuery(x.q0, k.kind))),
        "`score` gave query.keys as int32 .* expected bool",
    ),
    "views that lack a query": (
        score(lambda x, q, k: at.Score(views=Views(KeyGroups(jnp.zeros_like(k.kind), 2), (x.q,), (q.kind, q.kind)))),
        "`score` gave 1 arrays as views.q, expected 2, one for each key group",
    ),
    "factor of tokens": (
        {"factor": lambda self, x, info_q, info_k: KeyFactor(info_q.offset, x.q[:, :, 0, 0])},
        r"`factor` gave log as bfloat16 of shape \(3, 11\), expected float32 \[H\]",
    ),
    "key_groups of an unknown number": (
        {"key_groups": lambda self, x, remembered, info_k: KeyGroups(info_k.image, jnp.max(info_k.image))},
        "`key_groups` gave count .*, expected a whole number of 1 or more, known without data",
    ),
    "merge without the axis of key groups": (
        {"key_groups": both, "merge": lambda self, x, parts, info_q, info_k: parts.whole},
        r"`merge` gave float32 of shape \(3, 11, 4\), expected float32 \[B, T, N, H\] .* N = 2 key groups",
    ),
    "reweigh in another type": (
        {"reweigh": lambda self, rows, info_q, info_k: rows.astype(jnp.bfloat16)},
        "`reweigh` gave bfloat16",
    ),
    "tokens as numbers": (
        {"tokens": lambda self, given: given.by},
        r"`tokens` gave int32 of shape \(3, 11\), expected bool",
    ),
    "a loss without its weight": (
        {"losses": of_masses},
        "`losses` gave 'mass', which `loss_weights` does not, expected the same names",
    ),
    "a loss of each token": (
        {"losses": lambda self, x, parts, info_q, info_k: {"mass": parts.whole}, "loss_weights": lambda self, info: {}},
        r"`losses` gave 'mass' as float32 of shape \(3, 11, 4\), expected float32 \[\]",
    ),
    "summaries in the type of the model": (
        {
            "summarise": lambda self, x, region, regions: jnp.zeros((x.k.shape[0], regions, *x.k.shape[2:]), x.k.dtype),
            "route": lambda self, *given: None,
        },
        "`summarise` gave an array of it as bfloat16 .* expected float32",
    ),
    "route of another class": (
        {"route": lambda self, *given: given[0]},
        "`route` gave an object of class .*, expected Routing",
    ),
    "hooks with other arguments": ({"remember": lambda self: None}, "`remember` fails.*: TypeError: .* 1 positional"),
}


@pytest.mark.parametrize(("hooks", "said"), WRONG.values(), ids=WRONG)
def test_a_hook_that_gives_what_it_should_not_is_refused_by_its_config(hooks: dict[str, Hook], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^Wrong: the hook {said}"):
        at.build_mechanisms((Wrong(hooks),), WIDE, KEY)


@dataclass(frozen=True)
class Skips(Wrong):
    """One that says that keys may be left out."""

    @property
    def skips_keys(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("hooks", "said"),
    [
        (
            score(lambda x, q, k: at.Score(key_bias=jnp.zeros((*k.kind.shape, x.q.shape[2])))),
            "the hook `score` gave key_bias, expected terms alone, since its config says `skips_keys`",
        ),
        (
            {"merge": lambda self, x, parts, info_q, info_k: parts.groups},
            "says `skips_keys`, but its hook `merge` needs all keys",
        ),
    ],
    ids=["a bias of keys", "a merge"],
)
def test_keys_are_left_out_for_score_terms_alone(hooks: dict[str, Hook], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^Skips:? {said}"):
        at.build_mechanisms((Skips(hooks),), WIDE, KEY)


def test_who_shows_later_tokens_says_that_it_looks_ahead() -> None:
    kind = type("Ahead", (at.Mechanism,), {"OWNS": ("hi",)})
    with pytest.raises(ConfigError, match=r"Wrong: Mine owns 'hi', .* let the config's `looks_ahead` be True"):
        at.build_mechanisms((Wrong({"mask": lambda self, info_q, info_k, codes: codes}, kind),), WIDE, KEY)


def test_what_fits_is_left_alone() -> None:
    hooks: dict[str, Hook] = {
        "head_gate": lambda self, x, out, info_q: jnp.ones((1, 1, out.shape[2])),
        "losses": of_masses,
        "loss_weights": lambda self, info: {"mass": jnp.float32(1)},
        "remember": lambda self, x: {"k0": x.k0, "nothing": None},
    }
    (built,) = at.build_mechanisms((Wrong(hooks),), WIDE, KEY)
    assert type(built).__name__ == "Mine"


def test_a_prompted_mechanism_without_its_numbers_names_what_is_missing() -> None:
    neutral: dict[str, Hook] = {"neutral": lambda self, rows, sizes: jnp.zeros(rows)}
    with pytest.raises(ConfigError, match=r"Wrong: its `build` fails at .*: TypeError: .*class Mine .*method 'found'"):
        at.build_mechanisms((Wrong(neutral, at.Prompted),), WIDE, KEY)
    found: dict[str, Hook] = {"found": lambda self, prompts, sizes: jnp.zeros(1)}
    gates: dict[str, Hook] = {"head_gate": lambda self, x, out, info_q: self.numbers}
    with pytest.raises(ConfigError, match=r"`head_gate` gave float32 of shape \(3,\), expected float32 \[#B, #T, H\]"):
        at.build_mechanisms((Wrong(neutral | found | gates, at.Prompted),), WIDE, KEY)
