"""train.py with a run in a bucket that a folder stands for: python -m tests.distributed.in_bucket FOLDER WORDS..."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rave_jax.parallel.stopping import leave
from rave_jax.tools.train import main
from rave_jax.training import lease
from tests.buckets import pretend

if __name__ == "__main__":
    pretend(Path(sys.argv[1]), pytest.MonkeyPatch())
    lease.RENEWED, lease.ABANDONED = 1.0, 5.0
    leave(main(sys.argv[2:]))
