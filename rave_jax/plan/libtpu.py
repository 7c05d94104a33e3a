"""libtpu, the TPU's own compiler, which needs no TPU: is it here, and how a process of its own is started."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence

INSTALL = "libtpu, the compiler for TPUs, is not installed: pip install 'rave-jax[tpu]' brings it; it needs no TPU"


class CompilerUnavailable(RuntimeError):
    """libtpu is not installed, or does not start."""


def available() -> bool:
    """Whether libtpu is installed here. `pip install jax[tpu]` brings the one that belongs to a jax."""
    return importlib.util.find_spec("libtpu") is not None


def environment(flags: str = "") -> dict[str, str]:
    """Environment of a process that compiles for TPUs that are not there; `flags` are further LIBTPU_INIT_ARGS."""
    return dict(os.environ) | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # a program from a cache leaves no dumps
        "LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip(),
        # Without it the second of two processes at once fails: libtpu takes the machine's TPU for its own by a lock
        # file, and there is none here to fight over.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        # Else libtpu asks a metadata server of Google's cloud what it runs on, for minutes.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }


def start(module: str, arguments: Sequence[str], flags: str = "") -> subprocess.Popen[str]:
    """Start `python -m module arguments`; its output is read through pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=environment(flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def last_words(stderr: str) -> str:
    """Why a process ended: what libtpu says before it aborts, or the end of what it wrote."""
    fatal = re.findall(r"^F\d{4} .*", stderr, re.MULTILINE)
    return fatal[0] if fatal else stderr.strip()[-2000:]


def ending(code: int) -> str:
    """The end of a process in words."""
    return f"signal {-code}" if code < 0 else f"code {code}"
