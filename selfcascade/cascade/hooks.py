"""Hooks on a UNet that all its users of one time share: the first puts them on, the last one out, in whichever thread, takes them off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from torch.nn import Module


class SharedHooks:
    """Hooks of one kind, for any number of UNets, blocks and threads at once.

    They must hold nothing of any one user: what that asks for belongs in a context variable, which every thread has for itself. Where another thread takes
    them off while a pass of the UNet runs here, torch still calls a hook that it has seen, but no longer with keyword arguments.

    Args:
        hook_all: registers the hooks on a UNet and returns their handles.
    """

    def __init__(self, hook_all: Callable[[Any], list[Any]]) -> None:
        self._hook_all = hook_all
        self._handles: WeakKeyDictionary[Module, tuple[int, list[Any]]] = WeakKeyDictionary()
        self._lock = Lock()

    @contextmanager
    def on(self, unet: Module) -> Iterator[None]:
        """The hooks on ``unet`` for the time of a ``with`` block. Blocks nest, also across threads."""
        with self._lock:
            users, handles = self._handles.get(unet) or (0, self._hook_all(unet))
            self._handles[unet] = (users + 1, handles)
        try:
            yield
        finally:
            with self._lock:
                users, handles = self._handles[unet]
                if users > 1:
                    self._handles[unet] = (users - 1, handles)
                else:
                    del self._handles[unet]
                    for handle in handles:
                        handle.remove()
