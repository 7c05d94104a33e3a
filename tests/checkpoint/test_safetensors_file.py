"""Slices are read as numpy would take them, whatever their form, chunk and cast."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from rave_jax.checkpoint import safetensors_file
from rave_jax.checkpoint.safetensors_file import Planned, Slice, read_header, read_into, write_header, write_tensor

SHAPE = (3, 4, 5, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_file({"x": np.arange(360, dtype=np.float32).reshape(12, 30), "s": np.float32(3)[None][0:1]}, folder / "f")
    return folder


BOUNDS = st.tuples(*(st.tuples(st.integers(0, n - 1), st.integers(1, n)).map(sorted) for n in SHAPE))


@given(wanted=st.lists(BOUNDS, min_size=1, max_size=3), chunk=st.integers(1, 2000), data=st.data())
def test_any_slices_in_one_pass(
    folder: Path, wanted: list[tuple[list[int], ...]], chunk: int, data: st.DataObject
) -> None:
    stored = read_header(folder / "f")[0]["x"]
    whole = np.arange(360, dtype=np.float32).reshape(SHAPE)
    slices, expected = [], []
    for bounds in wanted:
        index = tuple(slice(low, max(high, low + 1)) for low, high in bounds)
        expected.append(whole[index].astype(data.draw(st.sampled_from([np.float32, ml_dtypes.bfloat16]))))
        slices.append(Slice(np.full_like(expected[-1], -1), index))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_file, "CHUNK", chunk)
        read_into(stored, SHAPE, slices)
    assert all(np.array_equal(s.out, value) for s, value in zip(slices, expected, strict=True))


def test_a_file_cut_after_its_header_was_read(folder: Path, tmp_path: Path) -> None:
    data = (folder / "f").read_bytes()
    (tmp_path / "f").write_bytes(data)
    stored = read_header(tmp_path / "f")[0]["x"]
    (tmp_path / "f").write_bytes(data[:-40])
    with pytest.raises(safetensors_file.CheckpointError, match=r"x .*ends early"):
        read_into(stored, SHAPE, [Slice(np.empty(SHAPE, np.float32), (slice(None),) * 4)])


def test_what_we_write_the_library_reads(tmp_path: Path) -> None:
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(5).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 4), np.float16),
    }
    with (tmp_path / "f").open("wb") as file:
        write_header(file, [Planned(key, value.dtype, value.shape) for key, value in tensors.items()])
        for value in tensors.values():
            write_tensor(file, value)
    found = load_file(tmp_path / "f")
    assert all(np.array_equal(found[key], value) and found[key].dtype == value.dtype for key, value in tensors.items())
    assert read_header(tmp_path / "f")[1] == []


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"x": 3}', b'{"x": {"dtype": "F32", "shape": [2]}}'])
def test_headers_that_are_none(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "corrupt" in read_header(tmp_path / "f")[1][0]


def test_sizes_that_do_not_fit_the_shape(tmp_path: Path) -> None:
    header = b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'
    (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    assert "4 bytes do not make F32 [2]" in read_header(tmp_path / "f")[1][0]
