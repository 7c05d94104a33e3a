"""What is cut from the logits, against the rules of transformers in the order in which its generate applies them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from rave_jax.inference.sampling import RowSampling, Sampling, filtered

pytestmark = pytest.mark.parity
SCRIPT = Path(__file__).parent / "sampling_torch.py"
NUMBER, V, TOKENS = 400, 1000, 60
ORDER = (
    "RepetitionPenaltyLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
)


def random_settings(rng: np.random.Generator) -> Sampling:
    """Each rule on in two of three."""

    def perhaps(value: float, off: float) -> float:
        return float(value) if rng.random() < 2 / 3 else off

    return Sampling(
        temperature=perhaps(rng.uniform(0.1, 3), 1.0),
        top_k=int(perhaps(rng.integers(1, rng.choice([5, 50, 2 * V])), 0)),
        top_p=perhaps(rng.uniform(0.05, 1), 1.0),
        min_p=perhaps(rng.uniform(0, 1) ** 3, 0.0),
        repetition_penalty=perhaps(rng.uniform(0.5, 2), 1.0),
    )


def test_the_same_tokens_are_left_with_the_same_logits(torch_python: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    rows = [random_settings(rng) for _ in range(NUMBER)]
    logits = (rng.normal(size=(NUMBER, V)) * rng.uniform(0.5, 6, (NUMBER, 1))).astype(np.float32)
    tokens = rng.integers(0, V, (NUMBER, TOKENS))
    settings = [(s.repetition_penalty, s.temperature, s.top_k, s.top_p, s.min_p) for s in rows]
    np.savez(tmp_path / "cases.npz", logits=logits, tokens=tokens, settings=np.array(settings))
    subprocess.run([torch_python, SCRIPT, tmp_path], check=True, timeout=300)
    theirs = np.load(tmp_path / "out.npz")

    orders = [tuple(names.split()) for names in theirs["order"].tolist()]
    assert {name for order in orders for name in order} == set(ORDER)
    assert all(list(order) == sorted(order, key=ORDER.index) for order in orders)
    seen = np.zeros((NUMBER, V), bool)
    np.put_along_axis(seen, tokens, True, axis=1)
    ours = np.asarray(filtered(logits, RowSampling.of(rows), seen))
    left = np.isfinite(theirs["filtered"])
    different = np.flatnonzero((np.isfinite(ours) != left).any(1))
    assert len(different) == 0, [(rows[i], np.isfinite(ours[i]).sum(), left[i].sum()) for i in different]
    # Equal but for the last bits, which are larger where the logits are.
    np.testing.assert_allclose(ours[left], theirs["filtered"][left], rtol=1e-6, atol=1e-5)
