"""A stop request in one process: what is heard, what it raises, and what ends a process that does not stop."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time

import pytest

from rave_jax.parallel import hosts
from rave_jax.parallel.stopping import EXIT_CODES, Interrupted, StopRequest


def tell(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


@pytest.fixture
def ends(monkeypatch):
    """What would have ended the process."""
    found: list[tuple[int, str]] = []
    monkeypatch.setattr(hosts, "end", lambda code, message: found.append((code, message)))
    return found


@pytest.mark.parametrize("name", EXIT_CODES)
def test_where_nothing_is_left_to_save_a_signal_interrupts_at_once(name, capfd):
    before = signal.getsignal(getattr(signal, name))
    began = time.monotonic()
    with StopRequest(poll=0.02) as stop, pytest.raises(Interrupted, match=f"{name}: stopped") as stopped:
        stop.doing = lambda: "the weights to be read"
        tell(name)
        time.sleep(30)
    assert time.monotonic() - began < 10
    assert stopped.value.exit_code == EXIT_CODES[name]
    assert signal.getsignal(getattr(signal, name)) == before
    assert f"{name}: stopping; this takes at most 300 s (waits for the weights to be read)" in capfd.readouterr().err


def test_a_signal_is_heard_by_a_process_that_has_many_files_open():
    """A number of a file from 1,024 on is more than `select` takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    with contextlib.ExitStack() as files:
        files.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        while (file := files.enter_context(open(os.devnull, "rb"))).fileno() < 1024:
            pass
        with StopRequest(poll=0.02), pytest.raises(Interrupted, match="SIGTERM: stopped"):
            tell("SIGTERM")
            time.sleep(30)
    assert file.closed


def test_the_signal_that_wakes_the_main_thread_may_come_late(monkeypatch):
    """The signal of the user can have interrupted the main thread already, which then leaves."""
    send = signal.pthread_kill

    def later(thread, number):
        time.sleep(0.3)
        send(thread, number)

    monkeypatch.setattr(signal, "pthread_kill", later)
    with StopRequest(poll=0.02) as stop, pytest.raises(Interrupted):
        tell("SIGTERM")
        while not stop._raise:
            time.sleep(0.001)
        stop._handle(signal.SIGTERM, None)


def test_a_signal_before_the_processes_are_connected_asks_no_other(monkeypatch):
    monkeypatch.setattr(hosts, "_place", hosts.Place(0, 2))
    began = time.monotonic()
    with StopRequest(poll=0.02) as stop, pytest.raises(Interrupted, match="SIGTERM: stopped"):
        tell("SIGTERM")
        time.sleep(30)
    assert stop.asked == "SIGTERM" and time.monotonic() - began < 10


def test_the_loop_is_not_interrupted_and_begins_no_other_step(ends):
    with StopRequest(poll=0.02) as stop, stop.training():
        assert stop.may_begin(0)
        stop.finished()
        assert stop.may_begin(1)
        tell("SIGTERM")
        time.sleep(0.2)
        assert stop.asked == "SIGTERM"
        assert not stop.may_begin(2)
        assert not stop.is_wanted(2)
        assert stop.is_wanted(1)
        tell("SIGTERM")  # again: the save that is under way goes on
        time.sleep(0.2)
        assert str(stop.interrupted("stopped after step 2")) == "SIGTERM: stopped after step 2"
    assert ends == []


def test_after_a_run_that_has_ended_nothing_is_left_to_save():
    """A job may train several runs: what the one before had begun says nothing of the next."""
    with StopRequest(poll=0.02) as stop, pytest.raises(Interrupted, match="SIGTERM: stopped; the same command"):
        with stop.training():
            assert stop.may_begin(6)
            stop.finished()
        with stop.training():
            tell("SIGTERM")
            time.sleep(0.2)
            assert not stop.is_wanted(0), "the next run goes on for as many steps as the last"
        time.sleep(30)


def test_what_does_not_end_in_time_is_ended_and_named(ends):
    with StopRequest(timeout=0.1, poll=0.02) as stop, stop.training():
        stop.doing = lambda: "the checkpoint of step 7"
        stop.may_begin(6)
        stop.finished()
        tell("SIGINT")
        time.sleep(0.5)
    code, message = ends[0]
    assert code == 130
    assert message.startswith(
        "SIGINT: the checkpoint of step 7 did not end within 0 s (hosts.stop_timeout); ended without saving"
    )


def test_a_first_step_that_still_compiles_is_not_waited_for(ends, monkeypatch):
    monkeypatch.setattr(StopRequest, "GRACE", 0.1)
    with StopRequest(poll=0.02) as stop, stop.training():
        stop.doing = lambda: "step 1, which is compiled"
        stop.may_begin(0)
        tell("SIGTERM")
        time.sleep(0.5)
    code, message = ends[0]
    assert code == 143
    assert message.startswith("SIGTERM: stopped in step 1, which is compiled, with nothing to save")
