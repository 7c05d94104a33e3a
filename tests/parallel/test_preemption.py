"""Notices of preemption, from a server that stands for Google's metadata server."""

from __future__ import annotations

import http.server
import queue
import threading

import pytest

from rave_jax.parallel import preemption
from rave_jax.parallel.preemption import watched


@pytest.fixture
def answers(monkeypatch):
    """What the server says, by key."""
    said: dict[str, str] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            found = said.get(self.path.removeprefix("/computeMetadata/v1/"))
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write((found or "").encode())

        def parse_request(self):
            if not said:  # what is no HTTP at all
                self.wfile.write(b"garbage\r\n")
                return False
            return super().parse_request()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
    monkeypatch.setattr(preemption, "EVERY", 0.05)
    yield said
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("key", "value"),
    [("instance/preempted", "TRUE"), ("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")],
)
def test_a_notice_asks_the_job_to_end(answers, key, value):
    answers |= {"instance/preempted": "FALSE", "instance/maintenance-event": "NONE"}
    told = queue.Queue()
    with watched(lambda *words: told.put(words)):
        with pytest.raises(queue.Empty):
            told.get(timeout=0.2)
        answers[key] = value
        assert told.get(timeout=10) == (f"this machine is about to be taken away ({key} is {value})", 143)
    assert told.empty(), "once"


def test_neither_a_proxy_nor_an_answer_that_is_none_hides_a_notice(answers, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://localhost:9")
    told = queue.Queue()
    with watched(lambda *words: told.put(words)):
        with pytest.raises(queue.Empty):
            told.get(timeout=0.3)
        answers["instance/preempted"] = "TRUE"
        assert told.get(timeout=10)[1] == 143


def test_on_other_machines_nothing_is_asked(monkeypatch, tmp_path):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(preemption, "PRODUCT", tmp_path / "none")
    before = threading.active_count()
    with watched(print):
        assert threading.active_count() == before
