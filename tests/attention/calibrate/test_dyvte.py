"""The routers' lesson: which answers stay as they are."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from rave_jax.attention.calibrate.dyvte import DyvteTraining, may_leave
from rave_jax.config import ConfigError

TRAINING = DyvteTraining()


def test_an_answer_stays_where_its_guesses_and_its_loss_do() -> None:
    """Agreement above 0.99 over the answer's tokens, and a loss below 1.03 times the one with the picture."""
    rng = np.random.default_rng(0)
    answer = np.array([[3, 1, -1], [2, 2, 2], [0, 4, 1], [1, 1, -1]])
    plain = rng.normal(size=(4, 3, 5)).astype(np.float32)
    hidden = plain.copy()
    hidden[0, 2] = rng.normal(size=5)  # beyond the answer: says nothing
    hidden[1, 1] = np.roll(hidden[1, 1], 1)  # another first guess
    hidden[2] *= 0.2  # the same guesses, less sure
    hidden[3] += 7  # the same distribution

    def loss(logits: np.ndarray, row: int) -> float:
        chosen = [np.log(np.exp(logits[row, n]).sum()) - logits[row, n, t] for n, t in enumerate(answer[row]) if t >= 0]
        return float(np.mean(chosen))

    expected = [
        bool(
            all(plain[b, n].argmax() == hidden[b, n].argmax() for n, t in enumerate(answer[b]) if t >= 0)
            and loss(hidden, b) < 1.03 * loss(plain, b)
        )
        for b in range(4)
    ]
    found = jax.jit(functools.partial(may_leave, TRAINING))(plain, hidden, answer)
    assert found.tolist() == expected == [True, False, False, True]


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 0), ("rate", 0.0), ("agreement", 1.0), ("worse", 0.0), ("width", 0)]
)
def test_training_that_cannot_be_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} is"):
        DyvteTraining(**{name: value})
