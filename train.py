"""Train: `python train.py CONFIG [--field.name value ...]`; CONFIG is a Python file, a name, or RUN/config.json."""

import sys

from rave_jax.parallel.stopping import leave
from rave_jax.tools.train import main

if __name__ == "__main__":
    leave(main(sys.argv[1:]))
