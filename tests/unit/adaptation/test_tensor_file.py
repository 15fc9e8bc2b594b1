from __future__ import annotations

from pathlib import Path

import pytest
import torch

from selfcascade.adaptation.tensorfile import TensorFile, written_tensor_file
from selfcascade.storage import IntegrityError

TENSORS = {"b": torch.arange(12.0).reshape(3, 4), "a/x": torch.tensor([1, 2], dtype=torch.int64), "empty": torch.zeros(0), "scalar": torch.tensor(2.5)}
RECORD = {"step": 3, "names": ["ä", "b"]}


def written(tmp_path: Path, tensors: dict[str, torch.Tensor] = TENSORS, record: dict[str, object] = RECORD) -> Path:
    with written_tensor_file(tensors, record) as path:
        copy = tmp_path / "copy.safetensors"
        copy.write_bytes(path.read_bytes())
    return copy


def test_content_comes_back(tmp_path: Path) -> None:
    """Tensors, dtypes and record survive, even once the file's name is gone."""
    path = written(tmp_path)
    file = TensorFile(path, name="f")
    path.unlink()
    assert file.record == RECORD
    assert file.names == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert file.tensor(name).dtype == tensor.dtype
        assert torch.equal(file.tensor(name), tensor)


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    """The order of insertion and the memory layout do not matter; a changed record does."""
    first = written(tmp_path).read_bytes()
    shuffled = {name: TENSORS[name].t().contiguous().t() if name == "b" else TENSORS[name] for name in reversed(TENSORS)}
    assert written(tmp_path, shuffled).read_bytes() == first
    assert TensorFile(written(tmp_path, TENSORS, {"step": 4}), name="f").sha256 != TensorFile(written(tmp_path), name="f").sha256


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """Whichever single byte changes, header or content, the file is refused by name."""
    path = written(tmp_path)
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x01]) + whole[position + 1 :])
        with pytest.raises(IntegrityError, match="that one"):
            TensorFile(path, name="that one")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(IntegrityError, match="no whole tensor file"):
        TensorFile(path, name="that one")
