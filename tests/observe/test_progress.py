"""What is shown while something is counted before the steps of a run."""

from __future__ import annotations

import io

from rich.console import Console

from rave_jax.observe.progress import CountBar


def test_what_is_counted_before_the_steps_is_shown() -> None:
    """A bar on a terminal; elsewhere a line now and then, and nothing on other processes."""
    lines = io.StringIO()
    with CountBar("measuring samples", console=Console(file=lines), every=0) as bar:
        bar(10, 2000)
        bar(2000, 2000)
    assert lines.getvalue() == "measuring samples: 10 of 2,000\nmeasuring samples: 2,000 of 2,000\n"
    for every, enabled in ((1e9, True), (0, False)):
        quiet = io.StringIO()
        with CountBar("measuring samples", console=Console(file=quiet), every=every, enabled=enabled) as bar:
            bar(10, 2000)
        assert quiet.getvalue() == ""
    shown = io.StringIO()
    with CountBar("measuring samples", console=Console(file=shown, force_terminal=True, width=100)) as bar:
        bar(10, 2000)
    assert "measuring samples" in shown.getvalue()
    assert "2000" in shown.getvalue()
