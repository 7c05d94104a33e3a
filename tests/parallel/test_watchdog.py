"""The watchdog: what it names, when it ends the process, and when it rests."""

from __future__ import annotations

import math
import subprocess
import sys
import time

from rave_jax.parallel.stopping import StopRequest
from rave_jax.parallel.watchdog import Watchdog

HANG = """
import time
from rave_jax.parallel.watchdog import Watchdog
with Watchdog(0.2, poll=0.05) as dog:
    with dog.during("step 7", 2, "has another process stopped?"):
        time.sleep(60)
"""


def test_a_hung_step_ends_the_process_and_shows_where(repo):
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANG], cwd=repo, capture_output=True, text=True, timeout=120)
    assert done.returncode == Watchdog.EXIT_CODE
    assert "waited 0 s for step 7, so the watchdog ends the job (hosts.step_timeout 0.2)" in done.stderr
    assert "; has another process stopped?; ending the process" in done.stderr
    assert 'File "<string>", line 6' in done.stderr
    assert time.monotonic() - began < 55


def test_work_within_its_limit_ends_nothing():
    """Each kind of work has its own limit, none runs between two, and an outer one starts anew behind an inner one."""
    with Watchdog(0.2, poll=0.02) as dog:
        for step in range(8):
            with dog.during(f"step {step}"):
                time.sleep(0.05)
        with dog.during("a checkpoint", Watchdog.LONG):
            time.sleep(0.4)
        with dog.during("what follows", math.inf), dog.paused():
            time.sleep(0.4)
        with dog.during("outer"):
            time.sleep(0.12)
            with dog.during("inner"):
                time.sleep(0.12)
            time.sleep(0.12)
        time.sleep(0.4)
    with Watchdog(0, poll=0.01) as dog, dog.during("anything"):
        time.sleep(0.1)


def test_where_the_job_can_save_it_is_asked_to_stop():
    """And then it rests: the stop request has its own limit."""
    stop = StopRequest()
    with Watchdog(0.1, stop, poll=0.02) as dog, dog.during("the data of step 3", save=True):
        assert stop.doing() == "the data of step 3"
        time.sleep(0.5)
    assert stop.exit_code == Watchdog.EXIT_CODE
    assert stop.asked is not None
    assert stop.asked.startswith("waited 0 s for the data of step 3, so the watchdog ends the job")
    assert not stop.is_wanted(0)


def test_work_in_pieces_has_its_time_for_each_of_them():
    """As an evaluation, which may take as long as it takes while its programs come back."""
    stop = StopRequest()
    with Watchdog(1.0, stop, poll=0.02) as dog, dog.during("an evaluation", save=True):
        for _ in range(12):
            time.sleep(0.1)
            dog.again()
        assert stop.asked is None
        time.sleep(1.3)
        assert stop.asked is not None, "one piece that takes too long is noticed"
    dog.again()
    assert stop.doing() == "the step under way", "nothing is waited for outside"
