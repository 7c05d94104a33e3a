"""Which token comes next: settings of an answer, and the choice itself, for rows that are independent of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rave_jax.config import require
from rave_jax.typing import Array, Bool, Float, Int, UInt32

# Logits are divided by temperature and penalty in float32: far enough from 0 and from infinity that they stay finite.
LEAST, MOST = 1e-4, 1e4


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen and when it ends.

    Raises:
        ConfigError: a value of another kind or out of its range; NaN is out of every range.
    """

    max_new_tokens: int = 256
    """Most tokens of the answer."""
    temperature: float = 0.0
    """Divides the logits: 0 takes the most likely token, 1 samples from the model's distribution; 0, or 1e-4 to 1e4."""
    top_k: int = 0
    """Sample from this many most likely tokens, with all that tie with the last of them; 0 is all."""
    top_p: float = 1.0
    """Sample from the fewest most likely tokens that together have this probability, with all that tie with the last
    of them; above 0, and 1 is all."""
    min_p: float = 0.0
    """Sample from tokens with at least this share of the most likely token's probability; 0 (all) to 1."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that the prompt or answer already has become less likely: a positive logit is divided by it and
    a negative one multiplied, once for each token; 1e-4 to 1e4."""
    seed: int = 0
    """Seed of sampling, 0 to 2^32 - 1. The same seed gives the same answer in any batch and slot."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; the text ends before the string."""
    stop_ids: tuple[int, ...] = ()
    """Ids of tokens that end the answer, in addition to the model's."""

    def __post_init__(self) -> None:
        def whole(field: str, least: int, most: int) -> None:
            expected = f"a whole number, {least} to {most}"
            require(_is_whole(getattr(self, field), least, most), field, getattr(self, field), expected)

        def number(field: str, ok: bool, expected: str) -> None:
            require(ok, field, getattr(self, field), expected)

        whole("max_new_tokens", 1, 2**31 - 1)
        whole("top_k", 0, 2**31 - 1)
        whole("seed", 0, 2**32 - 1)
        within = f"{LEAST} to {MOST}"
        warm = self.temperature == 0 or _is_number(self.temperature, LEAST, MOST)
        number("temperature", _is_number(self.temperature, 0, MOST) and warm, f"0 (greedy) or {within}")
        number("top_p", _is_number(self.top_p, 0, 1) and self.top_p > 0, "above 0, at most 1 (all)")
        number("min_p", _is_number(self.min_p, 0, 1), "0 (all) to 1")
        number("repetition_penalty", _is_number(self.repetition_penalty, LEAST, MOST), f"{within}, 1 for none")
        strings = isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop)
        require(strings, "stop", self.stop, "a tuple of strings, none of them empty")
        ids = isinstance(self.stop_ids, tuple) and all(_is_whole(i, 0, 2**31 - 1) for i in self.stop_ids)
        require(ids, "stop_ids", self.stop_ids, "a tuple of token ids")


def _is_whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most


def _is_number(value: object, least: float, most: float) -> bool:
    # Compared as it is: an integer may be too large to become a float. NaN is in no range.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


class RowSampling(NamedTuple):
    """The settings that `choose` needs, one value per row. Ranges as in `Sampling`."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    repetition_penalty: Float[Array, "B"]
    seed: UInt32[Array, "B"]

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> RowSampling:
        """Arrays of numpy (float32, int32, uint32) from the settings of each row."""
        kinds = {"top_k": np.int32, "seed": np.uint32}
        values: list[Any] = [
            np.array([getattr(row, name) for row in rows], kinds.get(name, np.float32)) for name in cls._fields
        ]
        return cls(*values)


def choose(
    logits: Float[Array, "B V"], rows: RowSampling, seen: Bool[Array, "B V"], count: Int[Array, "B"]
) -> Int[Array, "B"]:
    """The next token of each row, int32.

    A row of temperature 0 takes the most likely token (the first of equals). Another draws from the softmax of
    `filtered` with a key made of its seed and count. So a choice depends on the logits, settings, tokens and count of
    its own row, and on no other row nor its place; but where a token is at the edge of top_p to the last bits of a
    float32, the order in which a compiled program adds up may decide.

    Args:
        logits: of any float type; computed in float32.
        rows: the settings.
        seen: tokens of the row's prompt and answer, for the penalty.
        count: tokens the row has generated so far; at least 0.
    """
    best = jnp.argmax(_penalised(logits, rows, seen), axis=-1).astype(jnp.int32)
    greedy = rows.temperature == 0

    def draw() -> Int[Array, "B"]:
        def one(seed: UInt32[Array, ""], number: Int[Array, ""], row: Float[Array, "V"]) -> Int[Array, ""]:
            # The kind of key is named: with another default (rbg) a row's numbers depend on its place in the batch.
            key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), number)
            # The 23 bits of a float32 draw tell chances apart down to about 1e-7 of the largest; a token below that is
            # hardly ever drawn. mode="high" would mend it for three times the cost.
            return jax.random.categorical(key, row)

        kept = filtered(logits, rows, seen)
        return jax.vmap(one)(jnp.asarray(rows.seed, jnp.uint32), count, kept).astype(jnp.int32)

    # Rules are followed, and a number for every token of the vocabulary is made, only when some row uses them.
    drawn = jax.lax.cond(jnp.all(greedy), lambda: best, draw)
    return jnp.where(greedy, best, drawn)


def filtered(logits: Float[Array, "B V"], rows: RowSampling, seen: Bool[Array, "B V"]) -> Float[Array, "B V"]:
    """Logits that a draw is made from, float32: -inf where a token is cut, and at least one token is not.

    The order is that of transformers' generate: repetition penalty, temperature, top-k, top-p, min-p, each over what
    the ones before left. A row of temperature 0 has the penalty alone. Equal logits stay or go together.
    """
    greedy = rows.temperature == 0
    logits = _penalised(logits, rows, seen) / jnp.where(greedy, 1, rows.temperature)[:, None]
    # Each rule keeps what is at least as likely as some token, so a rule is one number per row.
    sorts = ~greedy & ((rows.top_k > 0) | (rows.top_p < 1))
    nothing = jnp.full(logits.shape[:1], -jnp.inf, jnp.float32)
    floor = jax.lax.cond(jnp.any(sorts), lambda: _floor(logits, rows.top_k, rows.top_p), lambda: nothing)
    # The most likely token is never cut, so min-p need not know what the others left.
    floor = jnp.maximum(floor, jnp.max(logits, axis=-1) + jnp.log(rows.min_p))
    floor = jnp.where(greedy, -jnp.inf, floor)[:, None]
    return jnp.where(logits >= floor, logits, -jnp.inf)


def _penalised(logits: Float[Array, "B V"], rows: RowSampling, seen: Bool[Array, "B V"]) -> Float[Array, "B V"]:
    """Logits after the repetition penalty, float32."""
    logits = logits.astype(jnp.float32)
    penalty = rows.repetition_penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def _floor(logits: Float[Array, "B V"], top_k: Int[Array, "B"], top_p: Float[Array, "B"]) -> Float[Array, "B"]:
    """The least logit that top-k and then top-p leave, by one sort; -inf where both are off."""
    V = logits.shape[-1]
    falling = jnp.sort(logits, axis=-1, descending=True)
    last = jnp.where(top_k > 0, jnp.minimum(top_k, V), V) - 1
    kth = jnp.take_along_axis(falling, last[:, None], axis=-1)
    chances = jax.nn.softmax(jnp.where(falling >= kth, falling, -jnp.inf), axis=-1)
    # A token stays when those before it have not reached top_p yet; the first always does.
    before = jnp.cumsum(chances, axis=-1)[:, :-1]
    reached = jnp.concatenate([jnp.zeros_like(before, shape=(len(before), 1), dtype=bool), before >= top_p[:, None]], 1)
    nucleus = jnp.min(jnp.where(reached, jnp.inf, falling), axis=-1)
    # At 1 the sum may reach it early by rounding.
    floor = jnp.where(top_p < 1, jnp.maximum(nucleus, kth[:, 0]), kth[:, 0])
    return jnp.where((top_k > 0) | (top_p < 1), floor, -jnp.inf)
