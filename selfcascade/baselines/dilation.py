"""Dilated convolution by a convolution that knows nothing of it: the input is dealt out to its sub-grids, and the outputs are gathered again."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from selfcascade.baselines.dispersion import dispersed
from selfcascade.cascade.schedule import Size


@dataclass(frozen=True)
class Redilation:
    """What to do before and after a 3x3 convolution with padding 1, so that it becomes one with dilation d and padding d.

    The outputs of an integer dilation d fall into d x d classes, and each class sees one sub-grid of the input with spacing d: on the sub-grids, side by
    side in the batch, the convolution itself does the work, whatever it is (adapted by a LoRA, offloaded, quantised), with the same number of operations.
    A fractional d stretches the input by ``ceil(d) / d`` (bilinear), dilates by ``ceil(d)`` and shrinks the output back.
    """

    size: Size
    """Height and width of the convolution's input."""
    dilation: float
    """d, at least 1."""
    stride: int = 1
    """Of the convolution."""

    @property
    def whole(self) -> int:
        """The integer dilation of the stretched input."""
        return ceil(self.dilation)

    @property
    def stretched(self) -> Size:
        """Height and width of the input that is dilated."""
        height, width = (max(1, round(side * self.whole / self.dilation)) for side in self.size)
        return height, width

    def before(self, x: Tensor) -> Tensor:
        """The convolution's input, (B, C, H, W), as sub-grids in its precision, (d d B, C, h, w)."""
        if self.stretched != self.size:
            x = _resized(x, self.stretched)
        x = self.padded(x)
        rows, columns = (self.stride * (count + self.margin) for count in self.counts)
        parts = [x[..., self.stride * y :: self.whole, self.stride * z :: self.whole][..., :rows, :columns] for y, z in self._classes()]
        return torch.cat(parts)

    def after(self, outputs: Tensor) -> Tensor:
        """The outputs on the sub-grids, (d d B, C', h', w'), as the output of the dilated convolution, of the size that the plain one has."""
        d = self.whole
        parts = outputs.chunk(d * d)
        rows, columns = self.counts
        gathered = _like(outputs, (len(parts[0]), outputs.shape[1], d * rows, d * columns))
        for (y, z), part in zip(self._classes(), parts, strict=True):
            gathered[..., y::d, z::d] = part[..., self.margin :, self.margin :]
        height, width = (self._outputs(side) for side in self.stretched)
        gathered = gathered[..., :height, :width]
        return gathered if (height, width) == self.output else _resized(gathered, self.output)

    @property
    def output(self) -> Size:
        """Height and width of the plain convolution's output."""
        return self._outputs(self.size[0]), self._outputs(self.size[1])

    @property
    def margin(self) -> int:
        """Leading outputs of a sub-grid that are dropped. With a stride the first real output looks left of the sub-grid's start, at elements that exist."""
        return 0 if self.stride == 1 else 1

    @property
    def counts(self) -> Size:
        """Outputs of one class, down and across."""
        return ceil(self._outputs(self.stretched[0]) / self.whole), ceil(self._outputs(self.stretched[1]) / self.whole)

    def padded(self, x: Tensor) -> Tensor:
        """The stretched input with as many zeros around it as the sub-grids reach beyond it."""
        d, s = self.whole, self.stride
        lead = self.margin * d * s
        ends = [s * (d - 1) + d * (s * (count + self.margin) - 1) + 1 - lead - side for count, side in zip(self.counts, self.stretched, strict=True)]
        return F.pad(x, (lead, ends[1], lead, ends[0]))

    def _classes(self) -> list[tuple[int, int]]:
        return [(y, z) for y in range(self.whole) for z in range(self.whole)]

    def _outputs(self, side: int) -> int:
        return (side - 1) // self.stride + 1


class DispersedRedilation:
    """The same with an enlarged kernel, ``R k`` of 5x5: this one works with the convolution's weight, and the convolution itself is given one element to do.

    Args:
        convolution: an ordinary ``Conv2d`` of 3x3 with padding 1.
        dilation: d, at least 1.
    """

    def __init__(self, convolution: Any, dilation: float) -> None:
        self._convolution, self._dilation = convolution, dilation

    def before(self, x: Tensor) -> Tensor:
        """Keeps the input, (B, C, H, W), and returns a corner of it, (B, C, 1, 1)."""
        self._input = x
        return x[..., :1, :1]

    def after(self, outputs: Tensor) -> Tensor:
        """The output of the enlarged convolution, of the size that the plain one has; ``outputs`` is of no use."""
        conv, x = self._convolution, self._input
        plan = Redilation((x.shape[-2], x.shape[-1]), self._dilation, conv.stride[0])
        if plan.stretched != plan.size:
            x = _resized(x, plan.stretched)
        d = plan.whole
        found = F.conv2d(x, dispersed(conv.weight), conv.bias, stride=conv.stride, padding=2 * d, dilation=d, groups=conv.groups)
        return found if plan.stretched == plan.size else _resized(found, plan.output)


def _resized(x: Tensor, size: Size) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _like(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty tensor of another shape in the memory layout of ``x``."""
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
