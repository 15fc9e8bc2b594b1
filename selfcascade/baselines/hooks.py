"""Hooks that change a UNet for the time of a ``with`` block, in one thread, and leave without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from torch.nn import Module

from selfcascade.cascade.compilation import is_compiled
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
        refuse_compiled(unet)
        with self._hooks.on(unet):
            token = self._states.set((*self._states.get(), (unet, state)))
            try:
                yield
            finally:
                self._states.reset(token)

    def state(self, unet: Module) -> State | None:
        """What the innermost block of this thread asks of that UNet, or None outside of all of them."""
        return next((state for owner, state in reversed(self._states.get()) if owner is unet), None)


def refuse_compiled(unet: Module) -> None:
    """Refuse a UNet in which what is changed inside would be overlooked.

    Raises:
        SettingsError: it is compiled, whole or in blocks.
    """
    if is_compiled(unet):
        raise SettingsError("this UNet is compiled, and a compiled UNet overlooks what a baseline changes inside; sample with one that is not")
