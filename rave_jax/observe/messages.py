"""How warnings look on the terminal."""

from __future__ import annotations

import logging

PLAIN = "%(message)s"


def plain_messages() -> None:
    """Show warnings of all loggers on standard error, each as its text alone.

    orbax sets logging up when it is imported, with the level and the logger's name before each text; a handler of that
    form gets the plain one.
    """
    logging.basicConfig(format=PLAIN, level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        if getattr(handler.formatter, "_fmt", None) == logging.BASIC_FORMAT:
            handler.setFormatter(logging.Formatter(PLAIN))
