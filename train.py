"""Train: `python train.py CONFIG.py [--field.name value ...]`, or `RUN/config.json` to repeat or continue a run."""

from __future__ import annotations

import logging
import sys

import jax

from rave_jax.checkpoint.store import StoreError
from rave_jax.config import ConfigError, load_command_line
from rave_jax.data.sample import SampleError
from rave_jax.observe.messages import plain_messages
from rave_jax.parallel import hosts
from rave_jax.parallel.hosts import HostsError
from rave_jax.parallel.stopping import Interrupted, StopRequest, leave
from rave_jax.training.config import TrainConfig
from rave_jax.training.loop import NonFiniteError
from rave_jax.training.run import train

# What the shell sees: 2 for a config that cannot be used, 1 for a run that failed. `Interrupted` has its own: 143 after
# SIGTERM, 130 after Ctrl-C, 75 after a hang.
EXIT_CONFIG, EXIT_FAILED = 2, 1


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""
    plain_messages()
    config = load_command_line(TrainConfig, argv, "train.py")
    with StopRequest(config.hosts.stop_timeout) as stop:
        try:
            hosts.start(config.hosts, config.simulated_devices)
            if hosts.is_first():
                # How devices are laid out and which kernels serve attention, each with its reason.
                logging.getLogger("rave_jax").setLevel(logging.INFO)
            train(config, stop)
        except ConfigError as error:
            return hosts.fail(error, EXIT_CONFIG, "train.py")
        except (StoreError, NonFiniteError, SampleError, HostsError) as error:
            return hosts.fail(error, EXIT_FAILED, "train.py")
        except jax.errors.JaxRuntimeError as error:
            if hosts.place().processes == 1:
                raise
            return hosts.fail(hosts.of_devices(error), EXIT_FAILED, "train.py")
        except Interrupted as error:
            print(f"train.py: {hosts.place()}{error}", file=sys.stderr)
            return error.exit_code
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
