"""Every mechanism stands in a setting in which what slots say is compared with whole forward passes."""

from __future__ import annotations

from tests.attention import test_paint
from tests.attention.built_in import BUILT_IN
from tests.inference import test_prompted, test_slots, test_slots_ahead, test_slots_context


def test_every_mechanism_is_generated_with() -> None:
    settings = [*test_slots.SETTINGS.values(), *test_slots_ahead.SETTINGS.values(), test_prompted.BOTH]
    settings += [test_paint.OPTIONS.mechanisms]
    settings += [options.mechanisms for options in test_slots_context.SETTINGS.values()]
    found = {type(mechanism) for mechanisms in settings for mechanism in mechanisms}
    assert set(BUILT_IN) - found == set()
