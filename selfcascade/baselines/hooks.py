"""Hooks that change a UNet for the time of a ``with`` block, in one thread, and leave without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from torch.nn import Module

from selfcascade.cascade.hooks import SharedHooks
from selfcascade.settings import SettingsError

State = TypeVar("State")


class Hooks(Generic[State]):
    """One kind of change, for any number of UNets, blocks and threads at once.

    What a block asks for is in a context variable, which every thread has for itself: a thread that shares the UNet finds it as it was. Blocks nest, and the
    innermost one of a UNet counts.

    Args:
        name: of the context variable.
        hook_all: registers the hooks on a UNet and returns their handles.
    """

    def __init__(self, name: str, hook_all: Callable[[Any], list[Any]]) -> None:
        self._hooks = SharedHooks(hook_all)
        self._states: ContextVar[tuple[tuple[Module, State], ...]] = ContextVar(f"selfcascade_{name}", default=())

    @contextmanager
    def on(self, unet: Module, state: State) -> Iterator[None]:
        """The hooks on ``unet``, finding ``state``, for the time of a ``with`` block.

        Raises:
            SettingsError: the UNet is compiled, so that hooks would be overlooked.
        """
        if any(getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod") for module in unet.modules()):
            raise SettingsError("this UNet is compiled, and a compiled UNet overlooks the baselines' hooks; sample with one that is not")
        with self._hooks.on(unet):
            token = self._states.set((*self._states.get(), (unet, state)))
            try:
                yield
            finally:
                self._states.reset(token)

    def state(self, unet: Module) -> State | None:
        """What the innermost block of this thread asks of that UNet, or None outside of all of them."""
        return next((state for owner, state in reversed(self._states.get()) if owner is unet), None)
