"""Files of this module are read by the format's own library, and files of the library here."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from umbel_host.files.tensor_file import TensorFile, write

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.weight": np.array([1.5], dtype=np.float32),
    "none": np.zeros((0, 4), dtype=np.float32),
    "step": np.array(3, dtype=np.float32),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    write(path, TENSORS, {"format": "pt"}, mode=0o600)
    return path


def test_the_formats_own_library_reads_what_is_written(path: Path) -> None:
    read = safetensors.numpy.load_file(path)
    assert read.keys() == TENSORS.keys()
    assert all(np.array_equal(read[name], TENSORS[name]) for name in TENSORS)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert path.stat().st_mode & 0o077 == 0


def test_what_the_formats_own_library_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "y.safetensors"
    safetensors.numpy.save_file(TENSORS, path, metadata={"adapter": "00"})
    with TensorFile(path) as file:
        assert set(file) == TENSORS.keys()
        assert "b" in file
        assert file.metadata == {"adapter": "00"}
        for name, tensor in TENSORS.items():
            assert np.array_equal(file.read(name), tensor)


def test_a_tensor_is_read_into_a_view_of_its_shape_and_no_other(path: Path) -> None:
    vector = np.zeros(8, dtype=np.float32)
    with TensorFile(path) as file:
        file.read_into("b", vector[1:7].reshape(2, 3))
        with pytest.raises(ValueError, match="shape"):
            file.read_into("b", vector[1:7])
        with pytest.raises(KeyError):
            file.read("other")
    assert vector.tolist() == [0, 0, 1, 2, 3, 4, 5, 0]


def spoilt(header: object) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 16,
        spoilt(b"no json"),
        spoilt({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}),
        spoilt({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}),
        spoilt({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}),
        spoilt({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}),
        spoilt({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8], "more": 1}}),
        spoilt([1]),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "z.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r".+"):
        TensorFile(path)
