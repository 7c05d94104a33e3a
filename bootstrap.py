"""Make the environment of this clone, then run Python in it.

    python3 bootstrap.py train.py configs/quickstart.py
    python3 bootstrap.py -m pytest -n 2 -m "not slow"

The first call makes `.venv` beside this file from pyproject.toml and constraints.txt with nothing but
venv and pip; later calls find it ready and only run. The words after `bootstrap.py` are those of the
environment's own `python`. A set-up that was interrupted, or whose two files have changed since, is made
anew. Written for any Python 3, so that an old one can still say what is missing.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
NEEDED = (3, 12)


def wanted(root: Path) -> str:
    """What the environment of `root` is made from; a ready one carries this in its stamp."""
    digest = hashlib.sha256()
    # A moved clone is stale too: scripts and the editable install hold absolute paths.
    for part in (str(root).encode(), (root / "pyproject.toml").read_bytes(), (root / "constraints.txt").read_bytes()):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def state(root: Path) -> str:
    """`ready`, `absent`, `stale` (ours, to be made anew) or `foreign` (somebody made it by hand)."""
    venv, stamp = root / ".venv", root / ".venv" / "bootstrap.stamp"
    if not venv.is_dir() or not any(venv.iterdir()):
        return "absent"
    if not stamp.is_file():
        return "foreign"
    return "ready" if stamp.read_text() == wanted(root) and (venv / "bin" / "python").exists() else "stale"


def install(root: Path, lock: int) -> None:
    """Make the environment. The lock goes down to pip, which may outlive this process."""
    python = root / ".venv" / "bin" / "python"
    base = getattr(sys, "_base_executable", None) or sys.executable
    subprocess.run([base, "-m", "venv", str(root / ".venv")], check=True, pass_fds=[lock])
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    target = ["--constraint", str(root / "constraints.txt"), "--editable", f"{root}[test]"]
    subprocess.run(pip + target, check=True, pass_fds=[lock])


def prepare(root: Path) -> None:
    """Bring the environment to `ready`, once, however many of us start together.

    Raises:
        SystemExit: the environment is not ours to replace, or a step of the set-up failed.
    """
    if state(root) == "ready":
        return
    (root / ".cache").mkdir(exist_ok=True)
    with open(root / ".cache" / "bootstrap.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = state(root)
        if found == "ready":
            return
        if found == "foreign":
            raise SystemExit(f"bootstrap.py: {root}/.venv was made by hand; call its bin/python, or move it away.")
        print("bootstrap.py: setting up .venv with pip, once; this takes a few minutes.", file=sys.stderr, flush=True)
        if found == "stale":
            # Everything but the stamp goes first: killed in between, the rest is still known as ours.
            for item in (root / ".venv").iterdir():
                if item.is_dir() and not item.is_symlink():
                    shutil.rmtree(str(item))
                elif item.name != "bootstrap.stamp":
                    item.unlink()
        stamp = root / ".venv" / "bootstrap.stamp"
        stamp.parent.mkdir(exist_ok=True)
        stamp.write_text("begun")
        try:
            install(root, file.fileno())
        except subprocess.CalledProcessError as error:
            hint = "is Python's venv module installed?" if "venv" in error.cmd else "pip's words are above"
            raise SystemExit(f"bootstrap.py: set-up failed ({hint}); the next call starts it afresh.") from None
        stamp.write_text(wanted(root))


def main(argv: list) -> None:
    """Check Python, prepare the environment and become its python."""
    if sys.version_info < NEEDED:
        have = ".".join(map(str, sys.version_info[:3]))
        raise SystemExit(
            f"rave_jax needs Python 3.12 or newer and {sys.executable} is {have}: "
            "install Python 3.12 and start this as `python3.12 bootstrap.py ...`."
        )
    prepare(ROOT)
    python = str(ROOT / ".venv" / "bin" / "python")
    if not argv:
        print(f"bootstrap.py: {python} is ready; words after bootstrap.py are passed to it.", file=sys.stderr)
        return
    os.execv(python, [python, *argv])


if __name__ == "__main__":
    main(sys.argv[1:])
