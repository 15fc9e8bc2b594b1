"""Convolutions whose weights stay as they are keep no input for the backward pass: it needs the weights alone.

torch keeps the input of a convolution whether or not the gradient of its weights is wanted (of a linear layer it does not), and what passes through a frozen
decoder is a sixth of all that a training step of an upsampler holds.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input


def keep_no_inputs(network: nn.Module) -> None:
    """Let every 2-d convolution of ``network`` pass without keeping its input, as long as its weights want no gradient. Results are the same, to the bit."""
    for module in network.modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str) and "forward" not in vars(module):
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Conv2d, x: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    if not (frozen and torch.is_grad_enabled() and x.requires_grad and weight.dtype == dtype):
        return nn.Conv2d.forward(module, x)
    found: Tensor = _Frozen.apply(  # type: ignore[no-untyped-call]
        x.to(dtype), weight, bias, module.stride, module.padding, module.dilation, module.groups
    )
    return found


class _Frozen(torch.autograd.Function):
    """A convolution with a gradient of its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.how = x.shape, how
        return F.conv2d(x, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return conv2d_input(ctx.shape, weight, grad, *ctx.how), None, None, None, None, None, None  # type: ignore[no-untyped-call]
