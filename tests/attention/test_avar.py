"""AVAR's losses: the stated means over the map, document by document, and what they cost who does not ask."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax import attention as at
from rave_jax import config as machinery
from rave_jax.batch import TokenInfo
from rave_jax.config import ConfigError
from tests.attention.packed import DIMS, KEY, ROWS, attend, dense_map, features, info_of

CONFIG = at.Avar(enhance=0.15, suppress=0.4, rows="response")
PROMPT = dataclasses.replace(CONFIG, rows="prompt")
GATE = at.Rave(rank=4, start="random")
H = DIMS.num_heads


def by_hand(
    plain: Any, rows: tuple[tuple[str, ...], ...], log: Any = np.log, of: str = "a"
) -> dict[str, tuple[Any, int]]:
    """(sum, how many) of each loss over documents and heads, from the map [B,T,H,S]; `of`: letters of its rows."""
    found: dict[str, tuple[Any, int]] = {"avar_enhance": (0.0, 0), "avar_suppress": (0.0, 0)}
    for b, documents in enumerate(rows):
        start = 0
        for document in documents:
            where = {k: [start + i for i, letter in enumerate(document) if letter == k] for k in "svqa"}
            start += len(document)
            own = sorted(i for letter in of for i in where[letter])
            for name, keys in (("avar_enhance", where["v"]), ("avar_suppress", where["s"])):
                if not own or not keys:
                    continue
                for head in range(H):
                    block = plain[b][np.array(own)][:, head][:, np.array(keys)]
                    mean = block.sum() / (len(own) * len(keys))
                    weight = -0.15 if name == "avar_enhance" else 0.4
                    found[name] = (found[name][0] + weight * log(mean + 1e-6), found[name][1] + 1)
    return found


@functools.partial(jax.jit, static_argnames="config")
def losses(x: at.Features, info: TokenInfo, config: at.Avar = CONFIG) -> Any:
    """The losses, their weights, and the gradient of their means."""
    mechanisms = at.build_mechanisms((GATE, config), DIMS, KEY)

    def mean(x: at.Features) -> Any:
        said = attend(x, info, mechanisms, losses=True).losses
        weights = mechanisms[1].loss_weights(info)
        total = sum(said[name] / jnp.maximum(weights[name], 1) for name in weights)
        return total, (said, weights)

    (_, told), gradients = jax.value_and_grad(mean, has_aux=True)(x)
    return *told, gradients


def test_losses_are_the_stated_means_over_documents_and_heads() -> None:
    x, info = features(), info_of(*ROWS)
    said, weights, _ = losses(x, info)
    wanted = by_hand(dense_map((GATE,), x, info), ROWS)
    assert {name: count for name, (_, count) in wanted.items()} == {"avar_enhance": 2 * H, "avar_suppress": 3 * H}
    for name, (total, count) in wanted.items():
        np.testing.assert_allclose(said[name], total, rtol=1e-5)
        assert weights[name] == count


def test_rows_of_the_released_code_are_the_users_turns_with_their_pictures() -> None:
    x, info = features(), info_of(*ROWS)
    assert at.Avar().rows == "prompt", "the released code's is the default"
    said, weights, _ = losses(x, info, PROMPT)
    wanted = by_hand(dense_map((GATE,), x, info), ROWS, of="vq")
    assert {name: count for name, (_, count) in wanted.items()} == {"avar_enhance": 3 * H, "avar_suppress": 3 * H}
    for name, (total, count) in wanted.items():
        np.testing.assert_allclose(said[name], total, rtol=1e-5)
        assert weights[name] == count


def test_gradients_are_those_of_the_map() -> None:
    x, info = features(), info_of(*ROWS)

    def dense(x: at.Features) -> jax.Array:
        every = jnp.broadcast_to(jnp.arange(x.q.shape[1]), x.q.shape[:2])
        mechanisms = at.build_mechanisms((GATE, CONFIG), DIMS, KEY)
        plain = attend(x, info, mechanisms, implementation="reference", queries=every).attention
        return sum(total / count for total, count in by_hand(plain, ROWS, jnp.log).values())

    ours, theirs = losses(x, info)[2], jax.jit(jax.grad(dense))(x)
    for name in ("q", "k", "q0", "k0"):
        assert np.abs(getattr(theirs, name)).max() > 1e-3
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("rows", [(("qqaa", "vvq"), ("sqq",)), ((), ())], ids=["no pairs", "no tokens"])
def test_what_has_no_answer_picture_or_prompt_adds_nothing(rows: Any) -> None:
    said, weights, gradients = losses(features(), info_of(*rows))
    assert all(value == 0 for value in (*said.values(), *weights.values()))
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(gradients))


def test_a_picture_out_of_sight_makes_no_infinity() -> None:
    x, info = features(), info_of(("ssvvvqaaaaaaaa",), ("vvaaaaaaaaaaa",))
    mechanisms = at.build_mechanisms((CONFIG, at.SlidingWindow(1)), DIMS, KEY)

    @jax.jit
    def both(x: at.Features) -> Any:
        return jax.value_and_grad(lambda x: sum(attend(x, info, mechanisms, losses=True).losses.values()))(x)

    value, gradients = both(x)
    np.testing.assert_allclose(value, (0.4 - 2 * 0.15) * H * np.log(1e-6), rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    "route", [pytest.param("channel", marks=pytest.mark.slow), "merge", pytest.param("after", marks=pytest.mark.slow)]
)
def test_losses_are_of_the_attention_that_the_layer_applies(route: Any) -> None:
    """Whatever changes it, before the softmax or after."""
    x, info = features(), info_of(*ROWS)

    def of(route: Any) -> Any:
        mechanisms = at.build_mechanisms((at.ZeroTuning(0.3, route=route), CONFIG), DIMS, KEY)
        both = jax.jit(lambda x: attend(x, info, mechanisms, losses=True))(x)
        np.testing.assert_allclose(both.out, jax.jit(lambda x: attend(x, info, mechanisms).out)(x), atol=1e-6)
        return both.losses

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), of(route), of("key_bias"))


def test_it_costs_nothing_where_no_loss_is_asked() -> None:
    x, info = features(), info_of(*ROWS)
    mechanism = at.build_mechanisms((CONFIG,), DIMS, KEY)

    def program(mechanisms: Any, losses: bool) -> str:
        return str(jax.make_jaxpr(lambda x: attend(x, info, mechanisms, losses=losses).out)(x))

    assert program(mechanism, False) == program([], False) == program([], True) != program(mechanism, True)


def test_a_saved_config_without_rows_keeps_those_of_the_answers() -> None:
    saved = machinery.to_json(dataclasses.replace(CONFIG, layers=(1,)))
    assert machinery.loads(at.Avar, json.dumps(saved)).rows == "response"
    del saved["rows"]
    assert machinery.loads(at.Avar, json.dumps(saved)) == dataclasses.replace(CONFIG, layers=(1,))
    assert machinery.loads(at.Avar, machinery.dumps(at.Avar())) == at.Avar()


def test_bad_configs_name_the_field() -> None:
    for bad in ({"enhance": -1.0}, {"suppress": float("inf")}, {"eps": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            at.Avar(**bad)
