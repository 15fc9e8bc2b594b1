"""Compiled blocks: torch.compile on a UNet's transformer blocks, each in place, so that whatever hooks are on the modules around them go on working.

diffusers calls these the repeated blocks. The hooks of a pass with a pivot are outside of all of them, so that nothing has to be attached before. Hooks on
a module inside a compiled block are overlooked, as with any compiled module.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn


def compile_blocks(unet: ModelMixin, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the UNet's transformer blocks, for good; nothing is compiled before the first pass.

    Blocks of one shape are compiled once for all of them, and once for every size of picture, length of text and batch of two or more; torch compiles a batch
    of a single row apart. A step then launches fewer kernels and sums in another order: the same picture to float tolerance.

    Put LoRAs, attention processors, device and precision in place before: torch compiles again whenever they change. Blocks that are compiled stay so.

    Args:
        unet: of any family; its modules, weights and hooks stay as they are.
        backend: of ``torch.compile``; inductor needs a C++ compiler on a CPU.
    """
    shared: dict[Any, Callable[..., Any]] = {}
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock) and not _is_compiled(block):
            shape = (type(block), tuple((name, tuple(weight.shape)) for name, weight in block.named_parameters()))
            if shape not in shared:
                shared[shape] = _any_size(torch.compile(_own_code(type(block).forward), dynamic=True, backend=backend))
            block.forward = MethodType(shared[shape], block)


def is_compiled(unet: nn.Module) -> bool:
    """Whether the UNet, or anything in it, is compiled, by :func:`compile_blocks` or in one of torch's own ways."""
    return any(_is_compiled(module) for module in unet.modules())


def failed_to_compile(error: BaseException) -> bool:
    """Whether an error of a pass is the backend's, such as a missing C++ compiler."""
    from torch._dynamo.exc import BackendCompilerFailed  # not before something compiles: it takes a second

    return isinstance(error, BackendCompilerFailed)


def _is_compiled(module: nn.Module) -> bool:
    if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
        return True
    return hasattr(module.forward, "_torchdynamo_orig_callable")


def _own_code(forward: Any) -> FunctionType:
    """The same function with a code object of its own. Torch counts compilations, and looks for the one that fits, by code object: a UNet has more shapes of
    blocks than it allows one, and beyond goes on uncompiled.
    """
    own = FunctionType(forward.__code__.replace(), forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return own


def _any_size(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled function, told that every side of its tensors may differ. Torch alone takes sides that are equal at first, such as 16 rows of 16 tokens,
    for one and the same.
    """

    def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # by the user's own torch.compile around
            for value in (*args, *kwargs.values()):
                while isinstance(value, Tensor):
                    torch._dynamo.maybe_mark_dynamic(value, tuple(range(value.ndim)))
                    value = value._base  # of a view
        return compiled(block, *args, **kwargs)

    forward._torchdynamo_orig_callable = compiled  # type: ignore[attr-defined]
    return forward
