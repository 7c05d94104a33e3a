"""A job that runs to its end, is asked to end, or fails: each with its exit code and one message."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

import jax

from rave_jax.checkpoint.saved_step import StoreError, first_line
from rave_jax.config import ConfigError
from rave_jax.data.sample import SampleError
from rave_jax.parallel import hosts, preemption
from rave_jax.parallel.hosts import HostsConfig, HostsError
from rave_jax.parallel.stopping import Interrupted, StopRequest
from rave_jax.training.loop import NonFiniteError

# What the shell sees: 2 for a config that cannot be used, 1 for a run that failed. `Interrupted` has its own: 143 after
# SIGTERM, 130 after Ctrl-C, 75 after a hang.
EXIT_CONFIG, EXIT_FAILED = 2, 1
LESS = "fewer rows or tokens at one time take less, and docs/troubleshooting.md says what else does"


def run_job(prog: str, config: HostsConfig, simulated_devices: int, work: Callable[[StopRequest], None]) -> int:
    """Connect the processes and do the work; returns the exit code. End the program with it by `stopping.leave`."""
    with StopRequest(config.stop_timeout) as stop, preemption.watched(stop.ask):
        try:
            hosts.start(config, simulated_devices)
            work(stop)
        except ConfigError as error:
            return hosts.fail(error, EXIT_CONFIG, prog)
        except (StoreError, NonFiniteError, SampleError, HostsError, OSError) as error:
            return hosts.fail(error, EXIT_FAILED, prog)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                said = f"the memory of the devices ran out: {first_line(error)}; {LESS}"
                return hosts.fail(HostsError(said), EXIT_FAILED, prog)
            if hosts.place().processes == 1:
                raise
            return hosts.fail(hosts.of_devices(error), EXIT_FAILED, prog)
        except Interrupted as error:
            print(f"{prog}: {hosts.place()}{error}", file=sys.stderr)
            return error.exit_code
        except Exception as error:  # a fault of the program: the others would wait for this process
            if hosts.place().processes == 1:
                raise
            traceback.print_exc()
            return hosts.fail(error, EXIT_FAILED, prog)
        finally:
            hosts.farewell()
    return 0
