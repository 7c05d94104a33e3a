"""Memory for sizes that the processes of a host share: what one has measured, the others see."""

from __future__ import annotations

import mmap
import os
import uuid
from typing import Any

import numpy as np

from rave_jax.data.packing.kept import COLUMNS


class SharedTables:
    """Room for the sizes and the status of so many samples, without a file that could be left behind.

    A copy that was pickled finds the same memory as long as the process that made it lives, and empty memory of its own
    after that, or where the system has no such files. Memory is taken when a page is written to, so that a source of
    which little is drawn takes little.
    """

    def __init__(self, length: int):
        self._length, self._path, self._file = length, "", -1
        self._name = f"rave_jax sizes {uuid.uuid4().hex}"
        self._map: Any = None
        size = max(length, 1) * (4 * COLUMNS + 1)
        if hasattr(os, "memfd_create"):
            self._file = os.memfd_create(self._name)
            os.ftruncate(self._file, size)
            self._path = f"/proc/{os.getpid()}/fd/{self._file}"
            self._map = mmap.mmap(self._file, size)
        else:
            self._map = mmap.mmap(-1, size)

    def __getstate__(self) -> tuple[int, str, str]:
        return self._length, self._path, self._name

    def __setstate__(self, state: tuple[int, str, str]) -> None:
        length, path, name = state
        try:
            file = os.open(path, os.O_RDWR)
        except OSError:
            self.__init__(length)
            return
        if not os.readlink(f"/proc/self/fd/{file}").startswith(f"/memfd:{name}"):  # of something else by now
            os.close(file)
            self.__init__(length)
            return
        self._length, self._path, self._name, self._file = length, path, name, file
        self._map = mmap.mmap(file, max(length, 1) * (4 * COLUMNS + 1))

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)

    def tables(self) -> tuple[Any, Any]:
        """The sizes [4, N] of int32 and the status [N] of uint8; zeros at first."""
        numbers = np.frombuffer(self._map, np.int32, COLUMNS * self._length).reshape(COLUMNS, self._length)
        return numbers, np.frombuffer(self._map, np.uint8, self._length, COLUMNS * self._length * 4)
