"""One process of a job that computes nothing and waits to be killed.

python -m tests.distributed.dying PROCESS PROCESSES PORT
"""

from __future__ import annotations

import sys
import time

from rave_jax.parallel import hosts

TIMEOUT = 4


def main(process: int, processes: int, port: str) -> None:
    config = hosts.HostsConfig(f"localhost:{port}", processes, process, start_timeout=60, heartbeat_timeout=TIMEOUT)
    hosts.start(config, simulated_devices=1)
    hosts.barrier("all", config)
    print("ready", flush=True)
    time.sleep(60)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
