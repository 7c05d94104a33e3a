"""Rows loaded ahead: in threads and processes alike, in order, and with an end whatever happens to them."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rave_jax.data.ahead import Ahead, _Failed, rows_ahead
from rave_jax.data.sample import OverBudget
from tests.data.loads import Loads

LOADS, SPANS = Loads(), (range(0, 2), range(2, 4))


def places(steps: range, ahead: Ahead, load: Loads = LOADS) -> list[tuple[int, int]]:
    """(step, first row) of all rows, as the rows themselves say."""
    found = []
    for step, parts in zip(steps, rows_ahead(load, steps, SPANS, ahead), strict=True):
        for span, rows in zip(SPANS, parts, strict=True):
            assert rows.batch.tokens.shape == (2, 300)
            assert (np.asarray(rows.batch.tokens) == step * 1000 + span.start).all()
            assert rows.documents[0] is None
            assert [skip.index for skip in rows.skips] == [step]
            found.append((step, span.start))
    return found


@pytest.mark.parametrize("ahead", [Ahead(0), Ahead(1), Ahead(3, workers=2), Ahead(1, workers=4)])
def test_threads_give_the_rows_of_each_step_in_order(ahead: Ahead) -> None:
    assert places(range(3, 9), ahead) == [(step, start) for step in range(3, 9) for start in (0, 2)]
    assert places(range(3, 3), ahead) == []


def test_processes_give_the_same_rows_and_what_loading_raises() -> None:
    """None of them touches a device. What is raised comes behind the rows before it."""
    found, backends, here = [], set(), os.getpid()
    loaded = rows_ahead(Loads(raises=5), range(1, 9), SPANS, Ahead(2, workers=2, processes=2))
    with pytest.raises(OverBudget, match="step 5 is over budget") as raised:
        for parts in loaded:
            for rows in parts:
                assert type(rows.batch.tokens) is np.ndarray
                found.append(int(rows.batch.tokens[0, 0]))
                process, backend = rows.skips[0].message.split()
                assert int(process) != here
                backends.add(backend)
    assert found == [step * 1000 + start for step in range(1, 5) for start in (0, 2)]
    assert backends == {"False"}
    assert (raised.value.tokens, raised.value.patches) == (7, 9)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_with_one_line() -> None:
    loaded = rows_ahead(Loads(dies=1), range(4), SPANS, Ahead(1, processes=1))
    says = r"a process that loads rows \(data\.processes 1\) has ended: it was killed, perhaps because memory ran out"
    with pytest.raises(ChildProcessError, match=says):
        list(loaded)


@pytest.mark.parametrize("error", [OverBudget("too long", 7, 9), OSError(2, "gone", "a.jpg")])
def test_errors_come_back_as_they_were(error: Exception) -> None:
    back = pickle.loads(pickle.dumps(_Failed(error))).error
    assert (type(back), str(back)) == (type(error), str(error))


class Panic(BaseException):
    """As a library in Rust raises it."""


class Held(Exception):
    """Which cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("held")
        self.lock = threading.Lock()


@pytest.mark.parametrize(("error", "says"), [(Panic("at 7"), "Panic: at 7"), (SystemExit(0), "SystemExit: 0")])
def test_errors_that_would_end_the_run_without_a_word_are_said(error: BaseException, says: str) -> None:
    for each, said in ((error, says), (Held(), "Held: held")):
        back = pickle.loads(pickle.dumps(_Failed(each))).error
        assert (type(back), str(back)) == (RuntimeError, said)


def test_what_cannot_be_sent_to_a_process_is_named() -> None:
    held = threading.Lock()

    def load(step: int, start: int, stop: int):
        with held:
            return Loads()(step, start, stop)

    assert len(list(rows_ahead(load, range(2), SPANS, Ahead()))) == 2
    with pytest.raises(ChildProcessError, match=r"cannot pickle '_thread.lock' object.* with data.processes 0 threads"):
        next(rows_ahead(load, range(2), SPANS, Ahead(processes=1)))


ALONE = """
import sys
from rave_jax.data.ahead import Ahead, _Failed, rows_ahead
from tests.data.loads import Loads
if __name__ == "__main__":
    loaded = rows_ahead(Loads(), range(10**6), (range(2),), Ahead(2, processes=2))
    processes = {rows.skips[0].message.split()[0] for _ in range(6) for rows in next(loaded)}
    print(*processes, flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_processes_end_with_the_run_however_it_ends(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text(ALONE)
    environment = os.environ | {"PYTHONPATH": str(repo)}
    job = subprocess.Popen(
        [sys.executable, str(tmp_path / "alone.py")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None
    processes = [int(number) for number in job.stdout.readline().split()]
    assert len(processes) == 2
    for number in processes:
        os.kill(number, signal.SIGTERM)  # as a terminal or a scheduler does to all processes of a job
    time.sleep(0.5)
    assert all(Path(f"/proc/{number}").exists() for number in processes)
    job.send_signal(signal.SIGKILL)
    job.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{number}").exists() for number in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)
