"""A training step recorded once as a CUDA graph and replayed: the thousands of small kernels of a small network then wait for no launch by the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

EAGER = 3
"""Steps taken as they are before one is recorded: libraries choose their kernels in them, and optimizers make their state."""


class RecordedStep:
    """A function of tensors that changes weights in place; on CUDA it is recorded at its fourth call and replayed from then on.

    A recorded step does what the plain one does, to the rounding of the kernels. On other devices the function is called as it is.

    Args:
        step: takes tensors by keyword, on the device of ``device``, always of the same shapes and dtypes, and returns one tensor there. It reads no value
            of any of them, draws no random number and makes no tensor from numbers of the host: those would be the first step's for ever.
        device: that computes.
    """

    def __init__(self, step: Callable[..., Tensor], device: torch.device) -> None:
        self.step, self.device = step, device
        self.calls = 0
        self.inputs: dict[str, Tensor] = {}
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Tensor | None = None

    def __call__(self, **inputs: Tensor) -> Tensor:
        """Take one step with ``inputs`` from any device. What is returned is the caller's own: no later step overwrites it."""
        if self.device.type != "cuda":
            return self.step(**self._moved(inputs))
        if self.calls < EAGER:
            self.calls += 1
            return self._eager(inputs)
        if self.graph is None or self.result is None:
            self.inputs = self._moved(inputs)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records, computes nothing
                self.result = self.step(**self.inputs)
        else:
            for name, value in inputs.items():
                self.inputs[name].copy_(value, non_blocking=True)
        self.graph.replay()
        return self.result.clone()

    def _moved(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.device.type == "cpu":
            return inputs
        # Weights are float32, and not every device has float64.
        single = {name: value.float() if value.dtype == torch.float64 else value for name, value in inputs.items()}
        return {name: value.to(self.device, copy=True) for name, value in single.items()}

    def _eager(self, inputs: dict[str, Tensor]) -> Tensor:
        # On a stream of its own, as recording will be: gradients remember the stream that they were first added up on.
        here, aside = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            result = self.step(**self._moved(inputs))
        here.wait_stream(aside)
        return result


def step_optimizers(optimizers: Sequence[torch.optim.Optimizer], lr: float, factor: Tensor) -> None:
    """One step of each optimizer at the learning rate ``lr * factor``, which follows from the training's step alone: there is no scheduler to lose.

    Args:
        optimizers: whose update is linear in the learning rate, weight decay included: AdamW's and Muon's are.
        lr: peak learning rate.
        factor: scalar tensor. On the CPU its value is read. Elsewhere it is not, for a recorded step has to follow it and Muon takes no rate that is a
            tensor: the step is taken at ``lr`` and shortened.
    """
    if factor.device.type == "cpu":
        set_rate(optimizers, lr * factor.item())
        for optimizer in optimizers:
            optimizer.step()
    else:
        shortened_step(optimizers, lr, factor)


@torch.no_grad()
def shortened_step(optimizers: Sequence[torch.optim.Optimizer], lr: float, factor: Tensor) -> None:
    """Like :func:`step_optimizers`, with no value read: ``w + factor * (w' - w)`` where ``w'`` is reached at ``lr``."""
    set_rate(optimizers, lr)
    parameters = [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
    before = torch._foreach_mul(parameters, 1.0)
    for optimizer in optimizers:
        optimizer.step()
    torch._foreach_sub_(parameters, before)
    torch._foreach_mul_(parameters, factor)
    torch._foreach_add_(parameters, before)


def set_rate(optimizers: Sequence[torch.optim.Optimizer], lr: float) -> None:
    """Give every group of the optimizers the learning rate ``lr``."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


@torch.no_grad()
def follow(average: list[Tensor], parameters: list[Tensor], decay: Tensor) -> None:
    """Move the average towards the weights, in place: ``decay * average + (1 - decay) * weights``, with ``decay`` a scalar tensor on their device."""
    if decay.device.type == "cpu":
        torch._foreach_lerp_(average, parameters, 1 - decay.item())
        return
    step = torch._foreach_sub(parameters, average)
    torch._foreach_mul_(step, 1 - decay)
    torch._foreach_add_(average, step)
