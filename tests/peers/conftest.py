"""What must be done before anything imports torchvision, which the peers need."""

from importlib.util import find_spec

import torch

if find_spec("torchvision") is not None:
    # torchvision's own operators do not load beside a torch without CUDA; that they have schemas is all that importing it asks for.
    LIBRARY = torch.library.Library("torchvision", "DEF")  # gone with the last reference to it
    for _name in ("nms", "qnms"):
        LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
