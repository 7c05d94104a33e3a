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
from rave_jax.training.config import TrainConfig
from rave_jax.training.loop import Interrupted, NonFiniteError
from rave_jax.training.run import train

# What the shell sees: 2 for a config that cannot be used, 1 for a run that failed, 143 for one that was told to end.
EXIT_CONFIG, EXIT_FAILED, EXIT_INTERRUPTED = 2, 1, 143


def main(argv: Sequence[str], prog: str = "train.py") -> int:
    """Run the command line; returns the exit code."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    config = load_command_line(TrainConfig, argv, prog)
    try:
        hosts.start(config.hosts, config.simulated_devices)
        train(config)
    except ConfigError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except (StoreError, NonFiniteError, SampleError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except Interrupted as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0
