"""Fixtures of the tests of tools that generate."""

from __future__ import annotations

from tests.tools.generating import folder, generator, loaded

__all__ = ["folder", "generator", "loaded"]
