"""What hooks give, tried when a model is built: a hook's mistake is one error that names the config, the hook, what it
gave and what was expected.

Every hook that a mechanism overrides is called once with shapes in place of arrays, as it is in a whole row or beside a
cache. So nothing is computed, and nothing of it is in the program.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Generator, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.attention.base import (
    AttentionDims,
    Candidates,
    Channels,
    Features,
    KeyFactor,
    Keys,
    Mechanism,
    OtherQuery,
    Parts,
    Score,
    Views,
    overrides,
)
from rave_jax.attention.checks import name_of
from rave_jax.attention.rotation import Rope
from rave_jax.batch import TokenInfo
from rave_jax.config import ConfigError, shown
from rave_jax.kernels.attention import KeyGroups, MaskCodes, Term
from rave_jax.kernels.routed import Routing

SIZES = {"B": 3, "T": 11, "S": 23, "R": 5, "M": 2}
"""Rows, queries, keys, regions and asked queries that hooks are tried with: sizes that heads seldom have."""
OF_KEYS = ("order", "open_k")
WORDS = {
    "B": "rows",
    "T": "queries",
    "S": "keys",
    "R": "regions",
    "M": "asked queries",
    "N": "key groups",
    "H": "query heads",
    "K": "kv heads",
    "h": "head_dim",
}


def check_given(mechanism: Mechanism, dims: AttentionDims) -> None:
    """Refuse a mechanism of which a hook fails, or gives what the layer cannot take.

    Args:
        mechanism: as built.
        dims: sizes of the layer.

    Raises:
        ConfigError: names the config, the hook, what it gave and what was expected.
    """
    # A layer of a model has a width; what is built by hand, without one, may read any.
    if not dims.hidden_size or not any(overrides(mechanism, hook) for hook in TRIED):
        return
    known = _key(mechanism, dims)
    if known in _fitting:
        return
    program, parameters = nnx.split(mechanism)

    def tried(parameters: Any) -> None:
        again: Mechanism = nnx.merge(program, parameters)
        Trial(again, dims).run()

    jax.eval_shape(tried, parameters)
    if known is not None:
        _fitting.add(known)


_fitting: set[Hashable] = set()
"""What was tried and fits: a model of many layer runs has most configs in several, and a process many models."""


def _key(mechanism: Mechanism, dims: AttentionDims) -> Hashable:
    """What the shapes that hooks give depend on; None where it cannot be looked up."""
    key = (mechanism.declared, type(mechanism), dims)
    try:
        hash(key)
    except TypeError:
        return None
    return None if mechanism.declared is None else key


TRIED = (
    *("positions", "mask", "remember", "score", "summarise", "combine", "pool", "route", "factor", "key_groups"),
    *("merge", "reweighs", "reweigh", "head_gate", "tokens", "losses", "loss_weights"),
)


class Trial:
    """One mechanism in a layer of these sizes; to be called where nothing is computed (`jax.eval_shape`)."""

    def __init__(self, mechanism: Mechanism, dims: AttentionDims):
        self.mechanism = mechanism
        H, K, h, D = dims
        self.sizes = SIZES | {"3": 3, "H": H, "K": K, "h": h, "D": D}
        with failing(f"{name_of(mechanism)}: its numbers that change nothing (`neutral`) cannot be used"):
            mechanism.try_on(SIZES["B"], H, SIZES["S"])

    def run(self) -> None:
        """Every hook that is overridden."""
        x, info_q, info_k = self.features("T"), self.info("T"), self.info("S")
        remembered = self.call("remember", self.features("S"))
        for leaf in jax.tree.leaves(remembered):
            self.array("remember", "an array of it", leaf, "B S K ...", None)
        reading = [hook for hook in ("factor", "merge", "reweigh") if self.overrides(hook)]
        if reading and self.skips_keys:
            raise ConfigError(
                f"{name_of(self.mechanism)} says `skips_keys`, but its hook `{reading[0]}` needs all keys; take one of "
                "them away"
            )
        if self.overrides("positions"):
            own, positions = self.zeros("B T", jnp.int32), self.zeros("3 B T", jnp.int32)
            given = self.call("positions", info_q, info_k, own, positions)
            self.array("positions", "", given, "3 B T", "int32")
        codes = self.codes(self.call("mask", info_q, info_k, self.plain_codes()))
        if self.overrides("score"):
            self.score(self.call("score", x, remembered, info_q, info_k))
        if self.overrides("route"):
            self.route(x, remembered, info_q, info_k, codes)
        if self.overrides("factor"):
            given = self.of_class("factor", self.call("factor", x, info_q, info_k), KeyFactor)
            if given is not None:
                self.array("factor", "key", given.key, "B T", "int32")
                self.array("factor", "log", given.log, "H", "float32")
        if self.overrides("merge") or self.overrides("key_groups"):
            parts = self.parts(self.call("key_groups", x, remembered, info_k), "S")
            given = self.call("merge", x, parts, info_q, info_k)
            if given is not None:
                self.array("merge", "", given, "B T N H", "float32")
        if self.overrides("reweigh") or self.overrides("reweighs"):
            mine, rows = self.info("M"), self.zeros("B M H S")
            self.array("reweighs", "", self.call("reweighs", mine), "B M", "bool")
            self.array("reweigh", "", self.call("reweigh", rows, mine, info_k), "B M H S", "float32")
        if self.overrides("head_gate"):
            given = self.call("head_gate", x, self.zeros("B T H h", x.q.dtype), info_q)
            if given is not None:
                self.array("head_gate", "", given, "#B #T H", "float32")
        if self.overrides("tokens"):
            received = self.zeros("B T") if self.mechanism.RANKS else None
            given = Candidates(x.hidden, received, self.zeros("B T", jnp.int32), info_q)
            self.array("tokens", "", self.call("tokens", given), "B T", "bool")
        if self.overrides("losses") or self.overrides("loss_weights"):
            self.losses(x, info_q)

    def score(self, given: Any) -> None:
        """The parts of a `Score`; whether the operands of its terms fit is what `terms_of` looks at."""
        if self.of_class("score", given, Score) is None:
            return
        beside = [name for name, part in given._asdict().items() if name != "terms" and part is not None]
        if beside and self.skips_keys:
            self.refuse("score", beside[0], "terms alone, since its config says `skips_keys`")
        terms = self.of_class("score", given.terms, Sequence, "terms")
        for n, term in enumerate(terms or ()):
            self.of_class("score", term, Term, f"terms[{n}]")
            for side in ("query", "key", "head"):
                self.of_class("score", getattr(term, side), Mapping, f"terms[{n}].{side}")
        if given.key_bias is not None:
            self.array("score", "key_bias", given.key_bias, "B S H", "float32")
        if given.scale is not None:
            self.array("score", "scale", given.scale, "B T", "float32")
        channels = self.of_class("score", given.channels, Channels, "channels")
        if channels is not None:
            columns = getattr(channels.q, "shape", ())[3:4]
            for name, letters in (("q", "B T H"), ("k", "B S K")):
                fitting = " ".join([letters, *map(str, columns or ("n",))])
                self.array("score", f"channels.{name}", getattr(channels, name), fitting, None)
        query = self.of_class("score", given.query, OtherQuery, "query")
        if query is not None:
            self.array("score", "query.q", query.q, "B T H h", None)
            self.array("score", "query.keys", query.keys, "B S", "bool")
        views = self.of_class("score", given.views, Views, "views")
        if views is not None:
            count = self.key_groups("score", views.groups, "S")
            for name, letters, dtype in (("q", "B T H h", None), ("open_q", "B T", "int32")):
                found = getattr(views, name)
                if len(found) != count:
                    self.refuse("score", f"{len(found)} arrays as views.{name}", f"{count}, one for each key group")
                for one in found:
                    self.array("score", f"an array of views.{name}", one, letters, dtype)

    def route(self, x: Features, remembered: Any, info_q: TokenInfo, info_k: TokenInfo, codes: MaskCodes) -> None:
        """`summarise` and `combine`, or `pool`; then `route`."""
        k = self.zeros("B S K h", x.k.dtype)
        R = self.sizes["R"]
        if self.mechanism.OWN_REGIONS:
            summary = self.call("pool", Keys(k, k, (remembered,)), 0, info_k)
        else:
            new = self.call("summarise", x, self.zeros("B T", jnp.int32), R)
            summary = self.call("combine", new, new)
            for hook, tree in (("summarise", new), ("combine", summary)):
                for leaf in jax.tree.leaves(tree):
                    self.array(hook, "an array of it", leaf, "B R K ...", "float32")
            shapes = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (new, summary)]
            if shapes[0] != shapes[1]:
                self.refuse("combine", f"arrays of shapes {shapes[1]}", f"those of `summarise`, {shapes[0]}")
        given = self.of_class("route", self.call("route", x, summary, info_q, info_k, codes, R, None), Routing)
        if given is None:
            return
        routes = given.routes
        # Regions of its own are as many as it says.
        regions = routes.descriptor.shape[1] if self.mechanism.OWN_REGIONS and routes.descriptor.ndim == 4 else R
        self.sizes["R"] = regions
        self.array("route", "routes.descriptor", routes.descriptor, "B R K ...", "float32")
        channels = routes.descriptor.shape[3:]
        self.array("route", "routes.query", routes.query, " ".join(["B T H", *map(str, channels)]), "float32")
        for name, letters in (("first", "B R"), ("last", "B R"), ("before", "B T"), ("keys", "B S")):
            self.array("route", f"routes.{name}", getattr(routes, name), letters, "int32")

    def losses(self, x: Features, info: TokenInfo) -> None:
        """Of whole rows: every loss has its weight, and the other way round."""
        remembered = self.call("remember", x)
        parts = self.parts(self.call("key_groups", x, remembered, info), "T")
        losses, weights = self.call("losses", x, parts, info, info), self.call("loss_weights", info)
        for hook, given in (("losses", losses), ("loss_weights", weights)):
            if not isinstance(given, Mapping):
                self.refuse(hook, f"an object of class {type(given).__name__}", "a dict of sums by name")
            for name, x_ in given.items():
                self.array(hook, repr(name), jnp.asarray(x_), "", "float32")
        for hook, mine, other, others in (
            ("losses", losses, "loss_weights", weights),
            ("loss_weights", weights, "losses", losses),
        ):
            lacking = [name for name in mine if name not in others]
            if lacking:
                self.refuse(hook, f"{lacking[0]!r}, which `{other}` does not", "the same names from both")

    def parts(self, given: Any, keys: str) -> Parts:
        """What `merge` and `losses` read of the key groups that the mechanism asks for."""
        count = 1 if given is None else self.key_groups("key_groups", given, keys)
        self.sizes["N"] = count
        return Parts(self.zeros("B T N H"), self.zeros("B T H"))

    def key_groups(self, hook: str, given: Any, keys: str) -> int:
        """How many key groups there are."""
        groups = self.of_class(hook, given, KeyGroups)
        assert groups is not None
        self.array(hook, "of", groups.of, f"B {keys}", "int32")
        if not isinstance(groups.count, int) or groups.count < 1:
            self.refuse(hook, f"count {shown(groups.count)}", "a whole number of 1 or more, known without data")
        return groups.count

    def codes(self, given: Any) -> MaskCodes:
        """What `mask` gave."""
        codes = self.of_class("mask", given, MaskCodes)
        if codes is None:
            return self.refuse("mask", "None", "MaskCodes; `codes` as they came for no change")
        for name in MaskCodes._fields:
            self.array("mask", name, getattr(codes, name), "B S" if name in OF_KEYS else "B T", "int32")
        return codes

    def call(self, hook: str, *given: Any) -> Any:
        """What a hook gives."""
        beside = f" (tried with {self.tried('B T S R H K h')}; beside a cache there are more keys than queries)"
        with failing(f"{name_of(self.mechanism)}: the hook `{hook}` fails", beside):
            return getattr(self.mechanism, hook)(*given)

    def array(self, hook: str, part: str, x: Any, letters: str, dtype: str | None) -> None:
        """Refuse what is not an array of this shape and type. An axis named #T may be 1; "..." are more axes; without
        a type any number will do."""
        of, wanted = f"{part} as " if part else "", letters.split()
        axes = [letter for letter in wanted if letter != "..."]
        where = f" with {self.tried(letters)}" if axes else ""
        expected = f"{dtype or 'numbers'} [{', '.join(wanted)}]{where}"
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            return self.refuse(hook, f"{of}an object of class {type(x).__name__}", expected)
        allowed = [{self.sizes.get(letter.removeprefix("#")), *([1] if letter[0] == "#" else ())} for letter in axes]
        allowed = [{int(letter)} if letter.isdigit() else sizes for letter, sizes in zip(axes, allowed, strict=True)]
        count = len(x.shape) >= len(axes) if "..." in wanted else len(x.shape) == len(axes)
        fits = count and all(size in sizes for size, sizes in zip(x.shape, allowed, strict=False))
        if not fits or dtype not in (None, x.dtype):
            self.refuse(hook, f"{of}{x.dtype} of shape {tuple(x.shape)}", expected)

    def of_class[C](self, hook: str, given: Any, kind: type[C], part: str = "") -> C | None:
        """Refuse an object of another class; None is no change."""
        if given is None or isinstance(given, kind):
            return given
        of = f"{part} as " if part else ""
        return self.refuse(hook, f"{of}an object of class {type(given).__name__}", kind.__name__)

    def refuse(self, hook: str, gave: str, expected: str) -> Any:
        """One error."""
        raise ConfigError(f"{name_of(self.mechanism)}: the hook `{hook}` gave {gave}, expected {expected}")

    @property
    def skips_keys(self) -> bool:
        """May a decoding step leave keys out?"""
        return self.mechanism.declared is not None and self.mechanism.declared.skips_keys

    def overrides(self, hook: str) -> bool:
        """Is the hook the mechanism's own?"""
        return overrides(self.mechanism, hook)

    def tried(self, letters: str) -> str:
        """What letters stand for, in words."""
        known = [letter.removeprefix("#") for letter in letters.split()]
        return ", ".join(f"{letter} = {self.sizes[letter]} {WORDS[letter]}" for letter in known if letter in WORDS)

    def zeros(self, letters: str, dtype: Any = jnp.float32) -> jax.Array:
        """An array with these axes."""
        return jnp.zeros([self.sizes[letter] for letter in letters.split()], dtype)

    def features(self, tokens: str) -> Features:
        """Of so many tokens, in the type that most models compute in."""
        q, k = (self.zeros(f"B {tokens} {heads} h", jnp.bfloat16) for heads in "HK")
        rope = Rope(self.zeros(f"3 B {tokens}", jnp.int32), jnp.zeros(self.sizes["h"] // 2))
        return Features(q, k, k, q, k, self.zeros(f"B {tokens} D", jnp.bfloat16), rope)

    def info(self, tokens: str) -> TokenInfo:
        """Codes of so many tokens."""
        return TokenInfo(*(self.zeros(f"B {tokens}", jnp.int32) for _ in TokenInfo._fields))

    def plain_codes(self) -> MaskCodes:
        """Mask codes of queries beside other keys."""
        of = {name: "B S" if name in OF_KEYS else "B T" for name in MaskCodes._fields}
        return MaskCodes(**{name: self.zeros(letters, jnp.int32) for name, letters in of.items()})


@contextlib.contextmanager
def failing(what: str, beside: str = "") -> Generator[None]:
    """Code of a user's: whatever it raises becomes a ConfigError that says where it was raised."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"{what}{_place(error)}: {type(error).__name__}: {said}{beside}") from error


def _place(error: Exception) -> str:
    """Where it was raised: the innermost line outside of installed packages."""
    frames = [one for one in traceback.extract_tb(error.__traceback__) if "site-packages" not in one.filename]
    inside = [one for one in frames if one.filename != __file__]
    return f" at {inside[-1].filename}:{inside[-1].lineno}" if inside else ""
