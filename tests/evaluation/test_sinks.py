"""Secondary sinks: hidden states of known directions and norms, and what an evaluation says of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.batch import Kind
from rave_jax.config import ConfigError
from rave_jax.data.sources import Synthetic
from rave_jax.evaluation.config import Eval
from rave_jax.evaluation.sinks import HiddenStates, SinkCounts, SinkProbe, hidden_states, sinks_of
from rave_jax.evaluation.suites import open_checked, run
from rave_jax.families.qwen2_5_vl.presets import tiny
from tests.attention.packed import info_of
from tests.evaluation.toy import Fake, Toy, any_source, read

L, T, D, BOS = 24, 16, 16, 1


@pytest.fixture(scope="module")
def states() -> Any:
    """Token 1 is large from layer 2 up to layer 20; what enters the first layer is larger, and no hidden state of a
    layer. Token 5 has its direction, and token 8 the opposite one, in layers 3 to 10; token 9 in 3 to 11; token 6 in 14
    to 16; token 7 always, also outside; token 0, before it, too; and token 14 is padding."""
    rng = np.random.default_rng(0)
    x = np.linalg.qr(rng.normal(size=(L, D, D)))[0][:, :T]
    x[2:21, BOS] *= 100
    x[17, BOS] *= 0.9
    for token, span, sign in (
        (5, slice(3, 11), 1),
        (8, slice(3, 11), -1),
        (9, slice(3, 12), 1),
        (6, slice(14, 17), 1),
        (7, slice(0, L), 2),
    ):
        x[span, token] = sign * x[span, BOS] + 0.01
    x[:, 0] = 0.9 * x[:, BOS]
    x[:, 14] = x[:, BOS]
    info = info_of(("ssvvvvvvqaa",), length=T)
    first = np.full((1, T, D), 1e3)
    inputs = np.concatenate([first, x[: L - 1]])[:, None]
    given = SimpleNamespace(inputs=jnp.asarray(inputs, jnp.float32), hidden=jnp.asarray(x[L - 1, None], jnp.float32))
    asked: list[Any] = []
    model: Any = SimpleNamespace(forward=lambda batch, want: asked.append(want) or given)
    found = hidden_states(model, SimpleNamespace(info=info), jnp.zeros((1, T), bool))
    assert [want.inputs for want in asked] == [True]
    return jax.tree.map(lambda x: np.asarray(x)[0], found)


def test_lifetimes_are_counted_between_the_jump_and_the_fall_of_the_first_token(states: Any) -> None:
    found = sinks_of(states)
    lifetimes = {BOS: 19, 5: 8, 8: 8, 9: 9, 6: 3, 7: 19}
    assert dict(enumerate(found.lifetime.tolist())) == {n: 0 for n in range(T)} | lifetimes
    assert [found.first[n] for n in (BOS, 5, 6, 7)] == [2, 3, 14, 2]
    np.testing.assert_array_equal(states.visual, np.asarray(info_of(("ssvvvvvvqaa",), length=T).kind)[0] == Kind.VISUAL)


def test_an_evaluation_counts_them(states: Any) -> None:
    class Known(Fake):
        def per_sample(self, reading: Any, samples: Any, answers: Any) -> Any:
            assert reading is hidden_states
            return [states for _ in samples]

    config = Eval("toy", any_source(Toy()), samples=4, rows=4, looks=0, pictures=0, floor=None, sinks=2)
    found = run(config, Toy(), Known(read), None).findings["sinks"]
    # Of tokens 5 and 8 the first is visual; 8 is the question. Token 9 lasts 24 - 15 layers, as BOS may.
    assert found == SinkCounts(2, bos=3.0, secondary=2.0, noise=1.0, visual=0.5, levels=((3, 8, 4),))
    page = "\n".join(SinkProbe.section(vars(found)))
    assert "2.00 secondary sinks, 50% of them visual tokens" in page and "| 3 | 8 | 4 |" in page


@pytest.mark.parametrize(
    ("norms", "active"),
    [([1, 9, 9, 2, 9, 9], [1, 2]), ([9, 1, 1, 5, 4, 4], [3]), ([1, 1, 1, 1, 1, 9], [5])],
    ids=["a rise behind the fall", "a greater fall before the rise", "nothing behind the rise"],
)
def test_the_fall_is_the_largest_behind_the_rise(norms: list[float], active: list[int]) -> None:
    layers = len(norms)
    size = np.array(norms, np.float32)[:, None] * np.array([1.0, 0.1, 0.1], np.float32)
    found = sinks_of(HiddenStates(size, np.ones((layers, 3, 2)), np.zeros(2, bool), np.ones(2, bool)))
    assert found.lifetime.tolist() == [len(active)] * 2 and found.first.tolist() == [active[0]] * 2


def test_a_model_of_few_layers_has_none() -> None:
    config = Eval(data=Synthetic(split="heldout"), sinks=1)
    with pytest.raises(ConfigError, match="the model has 2 layers, and the rule for secondary sinks needs at least 21"):
        open_checked(config, tiny(vocab_size=64, num_layers=2).text)
