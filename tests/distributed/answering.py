"""One process of a job that answers requests: each reads its own source, at its own pace.

python answering.py PROCESS PROCESSES PORT FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rave_jax
from rave_jax.inference import Completion, Request, Sampling, SlotConfig
from rave_jax.parallel import hosts

SLOTS = SlotConfig(slots=4, max_length=64, chunk=64, smallest=64, decode_steps=2)


def requests() -> Iterator[Request]:
    for number in range(7):
        yield Request([{"role": "user", "content": f"How many {number}?"}], Sampling(4 + 2 * number))
    yield Request([{"role": "nobody", "content": "?"}])


def slow(process: int) -> Iterator[Request]:
    """The same requests. Now the first process waits for its source, now the other."""
    for number, request in enumerate(requests()):
        if number % 2 == process:
            time.sleep(0.1)
        yield request


def said(ends: list[Any]) -> list[Any]:
    return [list(end.tokens) if isinstance(end, Completion) else str(end) for end in ends]


def main(process: int, processes: int, port: str, folder: Path) -> None:
    config = hosts.HostsConfig(f"localhost:{port}", processes, process, start_timeout=60, heartbeat_timeout=30)
    hosts.start(config, simulated_devices=2)
    generator = rave_jax.load(folder / "model", slots=SLOTS).generator
    results = {"list": said(generator.answers(list(requests()))), "source": said(generator.answers(slow(process)))}
    numbers = [generator.submit(request) for request in requests()]
    generator.cancel(numbers[2])
    ends: dict[int, Any] = {}
    while generator.pending:
        ends |= {piece.request: piece.end for piece in generator.poll() if piece.end is not None}
    results["submitted"] = said([ends[number] for number in numbers if number in ends])
    (folder / f"{process}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
