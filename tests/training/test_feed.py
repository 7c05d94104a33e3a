"""The feed: the batches of steps in order on the devices, loaded ahead within bounds; errors, skips and ends."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

import jax
import numpy as np
import pytest

from rave_jax.config import ConfigError
from rave_jax.data.ahead import Ahead
from rave_jax.data.pipeline import Rows
from rave_jax.data.skips import Skip
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.rows import batch_shardings
from rave_jax.parallel.stopping import StopRequest
from rave_jax.training.feed import ON_DEVICES, Feed
from tests.training.small import RandomSource, random_batch

ROWS, STEPS = 8, 12
AHEAD = (Ahead(0), Ahead(1), Ahead(3, workers=2), Ahead(1, workers=4))


class Skipping(RandomSource):
    """A sample of step n is skipped n times for each span; steps of odd numbers take longer."""

    def __init__(self) -> None:
        super().__init__(ROWS)
        self.loads: Counter[int] = Counter()
        self.skipped = 0
        self.lock = threading.Lock()

    def load(self, step: int, start: int, stop: int) -> Rows:
        with self.lock:
            self.loads[step] += 1
        time.sleep(0.01 * (step % 2))
        return Rows(super().load(step, start, stop).batch, (Skip("a", 0, "over budget", ""),) * step)

    def count(self, rows: Rows) -> None:
        self.skipped += len(rows.skips)

    def state(self, step: int) -> dict:
        return {"step": step, "skipped": self.skipped}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("ahead", AHEAD)
@pytest.mark.parametrize("devices", [1, 4])
def test_batches_come_in_order_and_states_count_what_was_given(ahead: Ahead, devices: int) -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    source, stop = Skipping(), StopRequest()
    with Feed(source, mesh, ROWS, 2, STEPS, ahead) as feed:
        for step in range(2, STEPS):
            fed = feed.next(step, stop)
            assert fed is not None and not fed.void
            jax.tree.map(np.testing.assert_array_equal, fed.batch, random_batch(step, ROWS))
            assert fed.batch.tokens.sharding == batch_shardings(mesh, ROWS).tokens
            assert fed.data == {"step": step + 1, "skipped": devices * sum(range(2, step + 1))}
    # Each range of rows was loaded once, and nothing behind the last step.
    assert source.loads == dict.fromkeys(range(2, STEPS), devices)


@pytest.mark.parametrize("ahead", AHEAD)
def test_loading_runs_ahead_within_bounds_and_ends_with_the_feed(ahead: Ahead) -> None:
    source, before = Skipping(), threading.active_count()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    # On the devices, on the way there, and those that are loaded or being loaded.
    most = ON_DEVICES + 1 + (max(ahead) if ahead.batches else 0)
    with Feed(source, mesh, ROWS, 0, 100, ahead) as feed:
        wait_until(lambda: len(source.loads) >= most)
        time.sleep(0.2)
        assert max(source.loads) == most - 1
        assert feed.next(0, StopRequest()) is not None
    wait_until(lambda: threading.active_count() <= before)
    assert max(source.loads) <= most


@pytest.mark.parametrize("ahead", AHEAD)
def test_an_error_comes_behind_the_batches_before_it(ahead: Ahead) -> None:
    class Failing(RandomSource):
        def load(self, step, start, stop):
            if step == 3:
                raise OSError("broken.jpg cannot be read")
            return super().load(step, start, stop)

    mesh, stop = make_mesh(MeshConfig(), jax.devices()[:1]), StopRequest()
    with Feed(Failing(ROWS), mesh, ROWS, 0, STEPS, ahead) as feed:
        assert all(feed.next(step, stop) is not None for step in range(3))
        with pytest.raises(OSError, match=r"broken\.jpg"):
            feed.next(3, stop)


def test_a_signal_that_ended_loading_too_is_no_error() -> None:
    class Ended(RandomSource):
        def load(self, step, start, stop):
            raise ChildProcessError("a process that loads rows has ended: exit code -15")

    class Asked(StopRequest):
        def is_wanted(self, step):
            return False

    mesh, asked = make_mesh(MeshConfig(), jax.devices()[:1]), Asked()
    asked.asked = "SIGTERM"
    with Feed(Ended(ROWS), mesh, ROWS, 0, STEPS) as feed:
        assert feed.next(0, asked) is None
    with Feed(Ended(ROWS), mesh, ROWS, 0, STEPS) as feed, pytest.raises(ChildProcessError, match="exit code -15"):
        feed.next(0, StopRequest())


def test_an_error_of_the_state_arrives_too() -> None:
    class Failing(RandomSource):
        def state(self, step):
            raise RuntimeError("no state")

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with Feed(Failing(ROWS), mesh, ROWS, 0, STEPS) as feed, pytest.raises(RuntimeError, match="no state"):
        feed.next(0, StopRequest())


def test_rows_that_the_mesh_does_not_divide_are_refused_at_once() -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:4])
    with pytest.raises(ConfigError, match="data rows is 6, expected a multiple of 4"):
        Feed(RandomSource(6), mesh, 6, 0, STEPS)
