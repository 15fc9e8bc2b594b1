"""What must be done before anything imports torchvision, which the peers need."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if find_spec("torchvision") is not None:
    # torchvision's own operators do not load beside a torch without CUDA; that they have schemas is all that importing it asks for.
    LIBRARY = torch.library.Library("torchvision", "DEF")  # gone with the last reference to it
    for _name in ("nms", "qnms"):
        LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Features of these tests stay out of the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"
