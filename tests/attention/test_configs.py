"""What every mechanism's config refuses: a value of another type, and numbers that cannot be meant."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from rave_jax import attention as at
from rave_jax.attention.calibrate.zero_tuning import ZeroTuningSearch
from rave_jax.attention.gaze.config import TopKSchedule
from rave_jax.config import ConfigError
from rave_jax.layout import AdaptiveRegions, ContextTokens, FixedRegions
from tests.attention.built_in import BUILT_IN

WITHIN = (TopKSchedule, FixedRegions, AdaptiveRegions, ContextTokens)
CONFIGS: tuple[Any, ...] = (*BUILT_IN, ZeroTuningSearch, *WITHIN)
NAN, INF = float("nan"), float("inf")
NEVER = (None, True, {0}, b"0", np.zeros(2))
NO_INTEGERS = ([0], (True,), ("0",), (0.5,), (NAN,), ([0],), "some", 1.5, NAN)
NO_NUMBERS = ([1.0], [], (True,), ("1",), (NAN,), (INF,), (10**400,), ([1.0],), "1", NAN, INF, -INF, 10**400)
WRONG: dict[Any, tuple[Any, ...]] = {
    int: (*NO_INTEGERS, (1,), "1"),
    float: (*NO_NUMBERS, (1.0,), np.float32(1)),
    int | float: (*NO_NUMBERS, (1.0,), np.float32(1)),
    tuple[int, ...]: (*NO_INTEGERS, 1),
    tuple[float, ...]: (*NO_NUMBERS, 1.0),
    float | tuple[float, ...]: NO_NUMBERS,
    at.Layers: (*NO_INTEGERS, 1, "0", ["all"], ("all",)),
}
WORDS = ("some", "", 1, ["all"], ("none",))
"""For a choice among words, and for configs within configs."""


def wrong() -> Iterator[Any]:
    """Every config with every kind of wrong value in every field."""
    for cls in CONFIGS:
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            never = [value for value in NEVER if not (value is True and hints[f.name] is bool)]
            values = (*never, *WRONG.get(hints[f.name], WORDS))
            yield pytest.param(cls, f.name, values, id=f"{cls.__name__}.{f.name}")


@pytest.mark.parametrize(("cls", "name", "values"), list(wrong()))
def test_a_value_of_another_type_is_one_error_that_names_the_field(cls: Any, name: str, values: tuple) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"^{re.escape(name)} is .*, expected ") as error:
            cls(**{name: value})
        assert str(error.value).startswith(f"{name} is {value!r}, expected ")


@pytest.mark.parametrize(
    ("cls", "bad", "expected"),
    [
        (at.ZeroTuning, {"gamma": [1.0, 2.0]}, "a finite number or a tuple, each item a finite number"),
        (at.ZeroTuning, {"heads": "some"}, "'all' or a tuple, each item an integer"),
        (at.ZeroTuning, {"gamma": (2.0, -1.0), "heads": (0, 1)}, "numbers above 0"),
        (at.Var, {"tau": INF}, "a finite number"),
        (at.Var, {"dims": "12"}, "a tuple, each item an integer"),
        (at.Croc, {"rule": "suffix"}, "one of 'visual', 'prefix'"),
        (at.Rave, {"rank": True}, "an integer"),
        (at.Rave, {"rank": -1}, "a number from 1 to 8,192"),
        (at.Rave, {"heads": ()}, "at least one head"),
        (at.Rave, {"limit": 1e300}, "a number of logits from 1e-6 to 1e6"),
        (at.SlidingWindow, {"window": -4}, "a number of tokens from 1 to"),
        (at.Arrow, {"first": 9, "window": 8}, "a number of tokens from 1 to 8"),
        (at.SlidingWindow, {"window": 2**31}, "a number of tokens from 1 to 2,147,483,647"),
        (at.Avar, {"eps": 1e-50}, "a small positive number, from 1e-37 to 1"),
    ],
)
def test_the_error_says_what_was_expected(cls: Any, bad: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        cls(**bad)
    assert str(error.value).startswith(next(iter(bad))) and expected in str(error.value)


@pytest.mark.parametrize("cls", BUILT_IN, ids=lambda c: c.__name__)
def test_numbers_that_the_model_does_not_have_are_errors_when_it_is_built(cls: Any) -> None:
    """What a config alone cannot know: layers and heads below 0 are among them."""
    for layers in ((2,), (0, -1)):
        with pytest.raises(
            ConfigError, match=rf"{cls.__name__}.layers names \[{layers[-1]}\], expected numbers from 0"
        ):
            at.plan_layer_runs((cls(layers=layers),), 2)
    if "heads" in (f.name for f in dataclasses.fields(cls)):
        with pytest.raises(ConfigError, match=r"heads is \(0, -1\), expected numbers from 0 to 3"):
            cls(heads=(0, -1)).build(at.AttentionDims(4, 2, 8), jax.random.key(0))


def test_integers_are_numbers_too() -> None:
    assert at.Var(dims=(1,), tau=20) == at.Var(dims=(1,)) and at.ZeroTuning(gamma=(1, 2), heads=(0, 1)).gamma == (1, 2)
