"""Examine a model: `python eval.py RUN_OR_HF_DIR [--field.name value ...]` (with --help: the fields)."""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the job hears it: importing takes seconds

    from rave_jax.parallel.stopping import leave
    from rave_jax.tools.eval import main

    leave(main(sys.argv[1:]))
