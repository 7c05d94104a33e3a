"""Who died is named: by a connection that ends without a farewell, by silence, or by process 0."""

from __future__ import annotations

import queue
import socket

import pytest

from rave_jax.parallel import liveness
from rave_jax.parallel.liveness import Liveness


@pytest.fixture
def job(monkeypatch):
    """Starts the processes of a job, each a thread here: (connections, what each was told)."""
    board: dict[str, str] = {}
    monkeypatch.setattr(liveness.notes, "leave", board.__setitem__)
    monkeypatch.setattr(liveness.notes, "gather", lambda folder, *_: {"0": board[f"{folder}/0"]})
    started: list[Liveness] = []

    def start(count: int, timeout: float) -> tuple[list[Liveness], list[queue.Queue[str]]]:
        told = [queue.Queue() for _ in range(count)]
        for number in range(count):
            started.append(Liveness(number, count, timeout, told[number].put))
            started[-1].start("localhost")
        return started, told

    yield start
    for one in started:
        one.close()


def connections(one: Liveness) -> list[socket.socket]:
    while not one._peers or not all(peer.name for peer in one._peers.values()):
        pass
    return [peer.connection for peer in one._peers.values()]


def test_a_process_whose_connection_ends_is_named_by_all_others(job):
    processes, told = job(3, timeout=30)
    (connection,) = connections(processes[1])
    connection.shutdown(socket.SHUT_RDWR)  # what the system does for a killed process
    for number in (0, 2):
        assert "process 1 (pid" in (words := told[number].get(timeout=10)) and "died: killed (kill -9" in words


def test_process_0_is_named_too(job):
    processes, told = job(2, timeout=30)
    connections(processes[0])
    processes[0]._closed.set()  # its thread sends no farewell
    connections(processes[0])[0].shutdown(socket.SHUT_RDWR)
    assert "process 0 (pid" in told[1].get(timeout=10)


def test_a_process_that_is_silent_is_named(job):
    """One that is stopped keeps its connection and sends nothing."""
    processes, told = job(2, timeout=0.5)
    processes[1]._send = lambda *_: None
    assert "has sent nothing for" in (words := told[0].get(timeout=10)) and "process 1" in words
    assert "stopped, or its machine or network is gone" in words


def test_a_farewell_is_no_death(job):
    processes, told = job(3, timeout=1)
    connections(processes[0])
    processes[1].close()
    with pytest.raises(queue.Empty):
        told[0].get(timeout=2)
    processes[0].close()
    assert told[2].empty()


def test_a_port_that_is_not_open_is_said(job, monkeypatch, caplog):
    job(1, timeout=30)
    monkeypatch.setattr(liveness.notes, "gather", lambda *_: {"0": "1 word"})
    Liveness(1, 2, 30, print).start("localhost")
    assert "warning: process 1 cannot reach port 1 of process 0 (localhost: Connection refused)" in caplog.text


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\n\r\n", b'{"name": "process 1"}\n', b"x" * 2000, b"d me\n", b"\xff\n"]
)
def test_a_stranger_at_the_port_ends_nothing(job, said: bytes):
    """A scan of ports, say."""
    processes, told = job(2, timeout=30)
    connections(processes[0])
    with socket.create_connection(("localhost", processes[0]._server.getsockname()[1])) as stranger:
        stranger.sendall(said)
    with pytest.raises(queue.Empty):
        told[0].get(timeout=0.2)
    connections(processes[1])[0].shutdown(socket.SHUT_RDWR)
    assert "process 1 (pid" in told[0].get(timeout=10)
