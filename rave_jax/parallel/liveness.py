"""Does each process of a job still live? One that died is named by all others, within a second or so.

Every process keeps a connection to process 0 and sends a beat over it. The system closes the connection of one that
ends, however it ends; one that is stopped, or whose machine or network is gone, sends no beats. jax has a heartbeat
too, which takes longer, names nobody and ends the process with a stack of C++; it remains for where a firewall lets no
connection through.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rave_jax.parallel import notes

BEAT, BYE, DEAD = b".", b"b", b"d"
"""What is sent, each on a line of its own: a beat, a farewell, and from process 0 who died (with the words)."""
CONNECT = 10.0
"""Seconds for a connection to process 0."""
LONGEST_BEAT = 5.0
LONGEST_HELLO = 1024
"""Bytes that a peer may send before it has said which process it is."""
_PORT = "liveness/port"

log = logging.getLogger(__name__)


@dataclass
class _Peer:
    """The process at the other end of a connection."""

    connection: socket.socket
    name: str = ""
    """Empty until it has said which process it is, with the word of this job; who does not counts for nothing."""
    heard: float = field(default_factory=time.monotonic)
    text: bytes = b""


class Liveness:
    """Connections of this process, kept by a thread of its own."""

    def __init__(self, process: int, processes: int, timeout: float, died: Callable[[str], None]):
        """
        Args:
            process: number of this one.
            processes: of the job.
            timeout: seconds without a beat after which a process counts as dead.
            died: told once, in the thread, with words that name the process.
        """
        self._process, self._processes, self._timeout, self._died = process, processes, timeout, died
        self._beat = min(LONGEST_BEAT, timeout / 4)
        self._selector = selectors.DefaultSelector()
        self._peers: dict[int, _Peer] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._server: socket.socket | None = None

    def start(self, host: str) -> None:
        """Connect to process 0, or wait for the others there; the beats begin.

        Args:
            host: where process 0 is.
        """
        if self._process == 0:
            family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
            self._server = socket.create_server(
                ("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=self._processes
            )
            self._server.setblocking(False)
            self._selector.register(self._server, selectors.EVENT_READ)
            self._word = secrets.token_hex(16)
            notes.leave(f"{_PORT}/0", f"{self._server.getsockname()[1]} {self._word}")
        else:
            port, _, self._word = notes.gather(_PORT, 1, CONNECT).get("0", "0").partition(" ")
            try:
                connection = socket.create_connection((host, int(port)), timeout=CONNECT)
            except OSError as error:
                log.warning(
                    "warning: process %d cannot reach port %s of process 0 (%s: %s), so a process that dies is not "
                    "named and ends the others later; open the ports between the hosts",
                    self._process,
                    port,
                    host,
                    error.strerror or error,
                )
                return
            self._add(connection, "process 0")
        name = f"process {self._process} (pid {os.getpid()} on {socket.gethostname()})"
        me = {"name": name, "word": self._word}
        self._hello = json.dumps(me).encode() + b"\n"
        for peer in self._peers.values():
            self._send(peer, self._hello)
        threading.Thread(target=self._watch, name="liveness", daemon=True).start()

    def close(self) -> None:
        """Say farewell: the end of this process is none to worry about."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            for peer in self._peers.values():
                self._send(peer, BYE + b"\n")
                with contextlib.suppress(OSError):
                    peer.connection.close()
            if self._server is not None:
                self._server.close()

    def _add(self, connection: socket.socket, name: str) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peers[connection.fileno()] = _Peer(connection, name)
        self._selector.register(connection, selectors.EVENT_READ)

    def _send(self, peer: _Peer, data: bytes) -> None:
        # A full buffer belongs to a peer that reads nothing, which is noticed by its silence.
        with contextlib.suppress(OSError):
            peer.connection.send(data)

    def _watch(self) -> None:
        sent = 0.0
        while not self._closed.is_set():
            ready = self._selector.select(self._beat / 2)
            with self._lock:
                if self._closed.is_set():
                    return
                # What has come is heard before anybody is judged: this process may have been stopped itself.
                found = [dead for key, _ in ready if (dead := self._hear(key.fileobj))]
                now = time.monotonic()
                found += [
                    f"{peer.name} has sent nothing for {now - peer.heard:.0f} s (hosts.heartbeat_timeout): it is "
                    "stopped, or its machine or network is gone"
                    for peer in self._peers.values()
                    if peer.name and now - peer.heard > self._timeout
                ]
                if now - sent >= self._beat:
                    sent = now
                    for peer in self._peers.values():
                        self._send(peer, BEAT + b"\n")
                if found:
                    for peer in self._peers.values():
                        self._send(peer, DEAD + found[0].encode() + b"\n")
                    self._closed.set()
            if found:
                self._died(found[0])
                return

    def _hear(self, source: object) -> str | None:
        """Read what has come; words about a process that died, or None."""
        if source is self._server and self._server is not None:
            with contextlib.suppress(OSError):
                connection, _ = self._server.accept()
                self._add(connection, "")
            return None
        assert isinstance(source, socket.socket)
        peer = self._peers[source.fileno()]
        try:
            data = source.recv(65536)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            self._drop(peer)
            if not peer.name:
                return None
            return f"{peer.name} died: killed (kill -9, out of memory), crashed, or its machine went down"
        peer.heard = time.monotonic()
        *lines, peer.text = (peer.text + data).split(b"\n")
        if not peer.name and not self._introduced(peer, lines):
            return None
        for line in lines:
            if line.startswith(DEAD):
                return line[1:].decode(errors="replace")
            if line == BYE:
                self._drop(peer)
            elif line.startswith(b"{"):
                peer.name = json.loads(line)["name"]
        return None

    def _introduced(self, peer: _Peer, lines: list[bytes]) -> bool:
        """Has it said which process of this job it is? A stranger is hung up on."""
        if not lines and len(peer.text) <= LONGEST_HELLO:
            return False
        with contextlib.suppress(IndexError, ValueError, KeyError, TypeError):
            said = json.loads(lines[0])
            if secrets.compare_digest(said["word"], self._word):
                peer.name = said["name"]
                self._send(peer, self._hello)
                return True
        self._drop(peer)
        return False

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        del self._peers[peer.connection.fileno()]
        peer.connection.close()
