"""Inception-v3 as its TensorFlow file of 2015-12-05 has it (Szegedy et al., 2016), under the names that torch-fidelity and pytorch-fid give its weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d
from torch.nn.utils.fusion import fuse_conv_bn_eval

FEATURES, CLASSES = 2048, 1008
_Size = int | tuple[int, int]


class Convolution(nn.Module):
    """Convolution, batch norm and ReLU."""

    def __init__(self, channels: int, out: int, size: _Size, *, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        sides = (size, size) if isinstance(size, int) else size
        padding = (sides[0] // 2, sides[1] // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(channels, out, sides, stride=stride, padding=padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, out, H', W')."""
        return torch.relu_(self.bn(self.conv(x)))

    def fold(self) -> None:
        """Put the norm's fixed statistics into the convolution: the same function, one pass over memory less."""
        assert isinstance(self.bn, nn.BatchNorm2d)
        self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()


class Mixed35(nn.Module):
    """At 35 x 35: 1 x 1, 5 x 5, twice 3 x 3, and the pooled input."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(channels, 64, 1)
        self.branch5x5_1 = Convolution(channels, 48, 1)
        self.branch5x5_2 = Convolution(48, 64, 5)
        self.branch3x3dbl_1 = Convolution(channels, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3)
        self.branch_pool = Convolution(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, 35, 35) to (N, 224 + pooled, 35, 35)."""
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_mean(x))], 1)


class Reduction17(nn.Module):
    """From 35 x 35 to 17 x 17."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(channels, 384, 3, stride=2, padded=False)
        self.branch3x3dbl_1 = Convolution(channels, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2, padded=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, 35, 35) to (N, 480 + channels, 17, 17)."""
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, max_pool2d(x, 3, 2)], 1)


class Mixed17(nn.Module):
    """At 17 x 17: 1 x 1, 7 x 7 by its two sides, that twice, and the pooled input."""

    def __init__(self, narrow: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(768, 192, 1)
        self.branch7x7_1 = Convolution(768, narrow, 1)
        self.branch7x7_2 = Convolution(narrow, narrow, (1, 7))
        self.branch7x7_3 = Convolution(narrow, 192, (7, 1))
        self.branch7x7dbl_1 = Convolution(768, narrow, 1)
        self.branch7x7dbl_2 = Convolution(narrow, narrow, (7, 1))
        self.branch7x7dbl_3 = Convolution(narrow, narrow, (1, 7))
        self.branch7x7dbl_4 = Convolution(narrow, narrow, (7, 1))
        self.branch7x7dbl_5 = Convolution(narrow, 192, (1, 7))
        self.branch_pool = Convolution(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 768, 17, 17) to as much."""
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_mean(x))], 1)


class Reduction8(nn.Module):
    """From 17 x 17 to 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = Convolution(768, 192, 1)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2, padded=False)
        self.branch7x7x3_1 = Convolution(768, 192, 1)
        self.branch7x7x3_2 = Convolution(192, 192, (1, 7))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1))
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2, padded=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 768, 17, 17) to (N, 1280, 8, 8)."""
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, max_pool2d(x, 3, 2)], 1)


class Mixed8(nn.Module):
    """At 8 x 8: 1 x 1, 3 x 3 as both its sides beside each other, and the pooled input.

    The last block of the file pools by the largest value, not by the mean: most likely a slip, but FID is defined by that file.
    """

    def __init__(self, channels: int, *, largest: bool) -> None:
        super().__init__()
        self.largest = largest
        self.branch1x1 = Convolution(channels, 320, 1)
        self.branch3x3_1 = Convolution(channels, 384, 1)
        self.branch3x3_2a = Convolution(384, 384, (1, 3))
        self.branch3x3_2b = Convolution(384, 384, (3, 1))
        self.branch3x3dbl_1 = Convolution(channels, 448, 1)
        self.branch3x3dbl_2 = Convolution(448, 384, 3)
        self.branch3x3dbl_3a = Convolution(384, 384, (1, 3))
        self.branch3x3dbl_3b = Convolution(384, 384, (3, 1))
        self.branch_pool = Convolution(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, 8, 8) to (N, 2048, 8, 8)."""
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = self.branch_pool(max_pool2d(x, 3, 1, 1) if self.largest else _mean(x))
        sides = [self.branch3x3_2a(three), self.branch3x3_2b(three), self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *sides, pooled], 1)


class InceptionV3(nn.Module):
    """Pictures, float (N, 3, 299, 299) in 0..255, to features, (N, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2, padded=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padded=False)
        self.Mixed_5b = Mixed35(192, 32)
        self.Mixed_5c = Mixed35(256, 64)
        self.Mixed_5d = Mixed35(288, 64)
        self.Mixed_6a = Reduction17(288)
        self.Mixed_6b = Mixed17(128)
        self.Mixed_6c = Mixed17(160)
        self.Mixed_6d = Mixed17(160)
        self.Mixed_6e = Mixed17(192)
        self.Mixed_7a = Reduction8()
        self.Mixed_7b = Mixed8(1280, largest=False)
        self.Mixed_7c = Mixed8(2048, largest=True)
        self.fc = nn.Linear(FEATURES, CLASSES)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> InceptionV3:
        """With the weights of a file, ready for use.

        Raises:
            RuntimeError: they are not Inception-v3's; names them.
        """
        with torch.device("meta"):  # weights of chance would be drawn for nothing
            network = cls()
        network.load_state_dict(state, assign=True)
        network.eval().requires_grad_(False)
        for module in network.modules():
            if isinstance(module, Convolution):
                module.fold()
        made: InceptionV3 = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return made

    @property
    def head(self) -> Tensor:
        """(1008, 2048): features times it are the class logits without their bias, which TensorFlow's graph leaves out of the Inception score."""
        return self.fc.weight

    def forward(self, pictures: Tensor) -> Tensor:
        """Means over positions of the last block."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3((pictures - 128) / 128)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        features: Tensor = x.mean(dim=(2, 3))
        return features


def _mean(x: Tensor) -> Tensor:
    return avg_pool2d(x, 3, 1, 1, count_include_pad=False)
