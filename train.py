"""Train: `python train.py CONFIG [--field.name value ...]`; CONFIG is a Python file, a name, or RUN/config.json."""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the job hears it: importing takes seconds

    from rave_jax.parallel.stopping import leave
    from rave_jax.tools.train import main

    leave(main(sys.argv[1:]))
