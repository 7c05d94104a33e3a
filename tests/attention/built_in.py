"""The mechanisms of the package, without those that tests define."""

from __future__ import annotations

from rave_jax.attention import Gift, MechanismConfig, Paint
from rave_jax.open_union import members

BUILT_IN = tuple(kind for kind in members(MechanismConfig) if kind.__module__.startswith("rave_jax."))
OF_PROMPTS = {Gift, Paint}
"""Those that whole rows refuse, whatever their fields: `tests/inference/test_prompted.py` and
`tests/attention/test_paint.py` have them."""
