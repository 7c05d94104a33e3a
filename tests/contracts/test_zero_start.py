"""RAVE starts as exactly nothing: the logits of a whole model are those of its backbone, bit for bit."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from rave_jax.attention import Rave
from rave_jax.families.qwen2_5_vl import presets
from rave_jax.models.config import ModelOptions
from rave_jax.models.vlm import Vlm
from tests.models.layout import Visual, batch, document

CONFIG = presets.tiny(vocab_size=64, num_layers=2, vision_depth=1, full_attention_blocks=())


def logits(options: ModelOptions) -> np.ndarray:
    docs = [document(parts, CONFIG, np.random.default_rng(0)) for parts in ([3, Visual(1, 4, 6), 5], [9])]
    rows = batch([docs, docs[:1]], CONFIG, tokens=26, patches=32)
    # One operation after the other, which the models share: as one program, each initialiser would be compiled.
    model = Vlm(CONFIG, options, key=jax.random.key(0))
    return np.asarray(jax.jit(lambda m, b: m.logits(m.hidden(b)))(model, rows))


FORMS: tuple[Any, ...] = ("log_gate", "tanh", "linear", "centered_sigmoid")


@pytest.mark.parametrize(
    ("attention", "forms"),
    [
        pytest.param("xla", FORMS[:1], id="xla"),
        pytest.param("xla", FORMS[1:], id="xla, other forms", marks=pytest.mark.slow),
        pytest.param("reference", FORMS, id="reference", marks=pytest.mark.slow),
    ],
)
def test_logits_are_those_of_the_backbone(attention: Any, forms: tuple[Any, ...]) -> None:
    backbone = logits(ModelOptions(attention=attention))
    for form in forms:
        assert np.array_equal(logits(ModelOptions((Rave(form=form, rank=4),), attention=attention)), backbone), form
    moved = logits(ModelOptions((Rave(rank=4, start="random"),), attention=attention))
    assert not np.array_equal(moved, backbone), "the check sees a gate that is not zero"
