"""Notices that a cloud gives before it takes a machine away.

Google's metadata server tells a machine that it is preempted, or is to end for maintenance. A thread asks it, and the
job then stops as after SIGTERM, which such a machine may get late or never.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import threading
import urllib.request
from collections.abc import Callable, Generator
from pathlib import Path

PRODUCT = Path("/sys/class/dmi/id/product_name")
EVERY = 5.0
"""Seconds between two questions."""
EXIT_CODE = 143
# A proxy that a user has set for the internet does not reach the server of this machine, and would answer for it.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_NOTICES = {"instance/preempted": ("TRUE",), "instance/maintenance-event": ("TERMINATE_ON_HOST_MAINTENANCE",)}


def metadata_server() -> str | None:
    """Address of the metadata server of this machine; None where it is none of Google's."""
    if given := os.environ.get("GCE_METADATA_HOST"):
        return given
    try:
        return "metadata.google.internal" if PRODUCT.read_text().startswith("Google") else None
    except OSError:
        return None


@contextlib.contextmanager
def watched(ask: Callable[[str, int], None]) -> Generator[None]:
    """Inside, a notice asks the job to end. Nothing happens on machines of others.

    Args:
        ask: takes the reason and the exit code, in a thread.
    """
    server = metadata_server()
    if server is None:
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        while True:
            if notice := _notice(server):
                ask(notice, EXIT_CODE)
                return
            if ended.wait(EVERY):
                return

    threading.Thread(target=watch, name="preemption notices", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _notice(server: str) -> str | None:
    for key, values in _NOTICES.items():
        url = f"http://{server}/computeMetadata/v1/{key}"
        asked = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        # What is no answer of HTTP is none; the next may be.
        with contextlib.suppress(OSError, http.client.HTTPException), _DIRECT.open(asked, timeout=3) as answer:
            found = answer.read(200).decode(errors="replace").strip()
            if found in values:
                return f"this machine is about to be taken away ({key} is {found})"
    return None
