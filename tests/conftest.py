"""What every test shares: eight simulated CPU devices, one compilation cache, and where outside things are."""

from __future__ import annotations

import gc
import importlib.util
import os
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]

# Before jax starts its backends; subprocesses of tests inherit the environment, but not the device count.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import jax
import pytest
from hypothesis import HealthCheck, settings

OPTIMISED = "JAX_DISABLE_MOST_OPTIMIZATIONS"
NUM_DEVICES = 8
if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)

# Compiling is most of what tests do, and a third of it goes into quick machine code that runs once. XLA's own passes
# are as ever; CI compiles the tests of parity as users' programs are. Subprocesses do so anyway.
jax.config.update("jax_disable_most_optimizations", os.environ.get(OPTIMISED) != "0")

# Compilation makes the first example of a property slow, so time limits per example say nothing. The examples
# are the same in every run: a red test stays red until somebody repairs it.
settings.register_profile(
    "rave_jax", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("rave_jax")

# Traces are many small objects that live as long as their program. To walk through all of them time and again is a
# tenth of what tests cost.
gc.collect()
gc.freeze()
gc.set_threshold(100_000, 50, 100)

MAPS, MOST_MAPS, MOST_IN_A_FILE = Path("/proc/self/maps"), 32_000, 48_000

TORCH_PYTHON = "RAVE_JAX_TORCH_PYTHON"
DATA = "RAVE_JAX_DATA"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip by name what needs an interpreter with torch, or the TPU compiler, where there is none; longest first."""
    missing = {}
    if not os.environ.get(TORCH_PYTHON):
        missing["parity"] = f"{TORCH_PYTHON} names no interpreter that has torch"
    if importlib.util.find_spec("libtpu") is None:
        missing["tpu_compiler"] = "libtpu is not installed (pip install 'jax[tpu]')"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    # Of two workers, neither waits for a long test that the other began last. Programs for TPUs are the longest, and
    # whole programs of ours come next.
    items.sort(key=_begins)


def _begins(item: pytest.Item) -> int:
    """What is long begins first."""
    if item.get_closest_marker("tpu_compiler") is not None:
        return 0
    if item.get_closest_marker("slow") is None:
        return 3
    return 1 if item.path.parent.name in ("docs", "resume", "distributed") else 2


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Let go of compiled programs before the system's limit of memory maps (65,530 as Linux comes) ends the process.

    Each holds several, and a worker runs many hundred tests. They come back from the compilation cache. Between files
    it is done early: tests of one file count what they compile, and a file may come near the limit by itself.
    """
    between = nextitem is None or nextitem.path != item.path
    # Maps take a while to count, so inside a file they are counted behind tests that compile much.
    counted = MAPS.is_file() and (between or item.get_closest_marker("slow") is not None)
    if counted and MAPS.read_bytes().count(b"\n") > (MOST_MAPS if between else MOST_IN_A_FILE):
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of small public data sets and configs that is laid beside the checkout; skips without it."""
    folder = Path(os.environ.get(DATA) or REPO.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; {DATA} names another folder")
    return folder


@pytest.fixture(scope="session")
def torch_python() -> str:
    """The interpreter that runs the torch side of a parity test (`*_torch.py`, files in and out)."""
    return os.environ[TORCH_PYTHON]  # without it, tests marked parity were skipped at collection
