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
from rave_jax.evaluation.sinks import SinkCounts, SinkProbe, hidden_states, sinks_of
from rave_jax.evaluation.suites import open_checked, run
from rave_jax.families.qwen2_5_vl.presets import tiny
from tests.attention.packed import info_of
from tests.evaluation.toy import Fake, Toy, any_source, read

L, T, D, BOS = 24, 16, 16, 1


@pytest.fixture(scope="module")
def states() -> Any:
    """Token 1 is large from layer 3 up to layer 21. Token 5 has its direction, and token 8 the opposite one, in layers
    4 to 12; token 6 in 15 to 17; token 7 always, also outside; and token 14 is padding."""
    rng = np.random.default_rng(0)
    x = np.linalg.qr(rng.normal(size=(L + 1, D, D)))[0][:, :T]
    x[3:22, BOS] *= 100
    x[18, BOS] *= 0.9
    for token, span, sign in (
        (5, slice(4, 13), 1),
        (8, slice(4, 13), -1),
        (6, slice(15, 18), 1),
        (7, slice(0, L + 1), 2),
    ):
        x[span, token] = sign * x[span, BOS] + 0.01
    x[:, 14] = x[:, BOS]
    info = info_of(("ssvvvvvvqaa",), length=T)
    given = SimpleNamespace(inputs=jnp.asarray(x[:L, None], jnp.float32), hidden=jnp.asarray(x[L, None], jnp.float32))
    asked: list[Any] = []
    model: Any = SimpleNamespace(forward=lambda batch, want: asked.append(want) or given)
    found = hidden_states(model, SimpleNamespace(info=info), jnp.zeros((1, T), bool))
    assert [want.inputs for want in asked] == [True]
    return jax.tree.map(lambda x: np.asarray(x)[0], found)


def test_lifetimes_are_counted_between_the_jump_and_the_fall_of_the_first_token(states: Any) -> None:
    found = sinks_of(states)
    assert dict(enumerate(found.lifetime.tolist())) == {n: 0 for n in range(T)} | {BOS: 19, 5: 9, 8: 9, 6: 3, 7: 19}
    assert [found.first[n] for n in (BOS, 5, 6, 7)] == [3, 4, 15, 3]
    np.testing.assert_array_equal(states.visual, np.asarray(info_of(("ssvvvvvvqaa",), length=T).kind)[0] == Kind.VISUAL)


def test_an_evaluation_counts_them(states: Any) -> None:
    class Known(Fake):
        def per_sample(self, reading: Any, samples: Any, answers: Any) -> Any:
            assert reading is hidden_states
            return [states for _ in samples]

    config = Eval("toy", any_source(Toy()), samples=4, rows=4, looks=0, pictures=0, floor=None, sinks=2)
    found = run(config, Toy(), Known(read), None).findings["sinks"]
    # Of tokens 5 and 8 the first is visual; 8 is the question.
    assert found == SinkCounts(2, bos=2.0, secondary=2.0, noise=1.0, visual=0.5, levels=((4, 9, 4),))
    page = "\n".join(SinkProbe.section(vars(found)))
    assert "2.00 secondary sinks, 50% of them visual tokens" in page and "| 4 | 9 | 4 |" in page


def test_a_model_of_few_layers_has_none() -> None:
    config = Eval(data=Synthetic(split="heldout"), sinks=1)
    with pytest.raises(ConfigError, match="the model has 2 layers, and the rule for secondary sinks needs at least 20"):
        open_checked(config, tiny(vocab_size=64, num_layers=2).text)
