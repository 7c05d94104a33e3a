"""`train.py` and `rave-jax train`: a run from a config and the command line."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rave_jax.command_line import load_command_line
from rave_jax.observe.messages import plain_messages
from rave_jax.parallel import hosts
from rave_jax.parallel.stopping import StopRequest
from rave_jax.plan.work import work_of
from rave_jax.tools.job import run_job
from rave_jax.training.config import TrainConfig
from rave_jax.training.run import train


def main(argv: Sequence[str], prog: str = "train.py") -> int:
    """Run the command line; returns the exit code. End the program with it by `stopping.leave`."""
    plain_messages()
    config = load_command_line(TrainConfig, argv, prog)

    def work(stop: StopRequest) -> None:
        if hosts.is_first():
            # How devices are laid out and which kernels serve attention, each with its reason.
            logging.getLogger("rave_jax").setLevel(logging.INFO)
        train(config, stop, work_of)

    return run_job(prog, config.hosts, config.simulated_devices, work)
