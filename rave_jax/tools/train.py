"""`train.py` and `rave-jax train`: a run from a config and the command line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from rave_jax.checkpoint.store import StoreError
from rave_jax.command_line import load_command_line
from rave_jax.config import ConfigError
from rave_jax.data.sample import SampleError
from rave_jax.parallel import hosts
from rave_jax.parallel.hosts import HostsError
from rave_jax.parallel.stopping import Interrupted, StopRequest
from rave_jax.training.config import TrainConfig
from rave_jax.training.loop import NonFiniteError
from rave_jax.training.run import train

# What the shell sees: 2 for a config that cannot be used, 1 for a run that failed. `Interrupted` has its own: 143 after
# SIGTERM, 130 after Ctrl-C, 75 after a hang.
EXIT_CONFIG, EXIT_FAILED = 2, 1


def main(argv: Sequence[str], prog: str = "train.py") -> int:
    """Run the command line; returns the exit code. End the program with it by `stopping.leave`."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    config = load_command_line(TrainConfig, argv, prog)
    with StopRequest(config.hosts.stop_timeout) as stop:
        try:
            hosts.start(config.hosts, config.simulated_devices)
            train(config, stop)
        except ConfigError as error:
            return hosts.fail(error, EXIT_CONFIG, prog)
        except (StoreError, NonFiniteError, SampleError, HostsError) as error:
            return hosts.fail(error, EXIT_FAILED, prog)
        except Interrupted as error:
            print(f"{prog}: {hosts.place()}{error}", file=sys.stderr)
            return error.exit_code
    return 0
