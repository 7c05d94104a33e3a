"""Examine a model: `python eval.py RUN_OR_HF_DIR [--field.name value ...]` (with --help: the fields)."""

import sys

from rave_jax.tools.eval import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
