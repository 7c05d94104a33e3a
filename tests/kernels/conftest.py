"""Which inherited tests are slow for which backend."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.kernels.attention_backend", "tests.kernels.routed_backend")


def pytest_itemcollected(item: pytest.Item) -> None:
    """A class of tests names in `slow` what is slow for its backend: a test, or one of its cases, as `test[case]`."""
    slow = getattr(getattr(item, "cls", None), "slow", ())
    if item.name in slow or item.name.split("[")[0] in slow:
        item.add_marker(pytest.mark.slow)
