"""Inception-v3 with weights of chance that does see pictures, in a file as torch-fidelity has it, and folders of pictures to measure with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from selfcascade.evaluation.networks.inception_layers import InceptionV3


def save_inception(path: Path) -> Path:
    """As initialised all pictures give nearly the same features: batch norms are set to the statistics of two batches.

    The last block and the head are scaled to features and logits of about the published network's size.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = InceptionV3().train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        for seed in range(2):
            network(torch.stack([torch.from_numpy(picture(10_000 + 4 * seed + number, 299)).permute(2, 0, 1).float() for number in range(4)]))
        for name, module in network.Mixed_7c.named_modules():
            if isinstance(module, nn.BatchNorm2d) and not name.startswith(("branch3x3_1.", "branch3x3dbl_1.", "branch3x3dbl_2.")):
                module.weight.mul_(0.1)
                module.bias.mul_(0.1)
        network.fc.weight.mul_(200)
    torch.save(network.state_dict(), path)
    return path


def picture(seed: int, side: int, *, coarse: int = 6, noise: float = 0.0) -> NDArray[np.uint8]:
    """Smooth colours over a grid of ``coarse`` cells, with some noise: (side, side, 3)."""
    generator = np.random.default_rng(seed)
    cells = Image.fromarray(generator.integers(0, 256, (coarse, coarse, 3), dtype=np.uint8))
    smooth = np.asarray(cells.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
    return np.asarray((smooth + generator.normal(0, 1, smooth.shape) * noise).round().clip(0, 255).astype(np.uint8))


def save_pictures(folder: Path, count: int, *, seed: int, side: int, coarse: int = 6, noise: float = 0.0) -> Path:
    """``count`` of :func:`picture` as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(picture(seed + number, side, coarse=coarse, noise=noise)).save(folder / f"{number:05d}.png", compress_level=1)
    return folder
