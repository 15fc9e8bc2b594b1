"""TensorBoard: losses, speed, memory and previews of a run, in a local folder. No part of the artifact."""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image

from selfcascade.config import AdaptationSettings
from selfcascade.settings import SettingsError


def check_tensorboard(settings: AdaptationSettings) -> None:
    """Refuse to write for TensorBoard where it is not installed.

    Raises:
        SettingsError: says how to get it.
    """
    if settings.tensorboard is not None and find_spec("tensorboard") is None:
        raise SettingsError("adaptation.tensorboard needs the package tensorboard; install it with pip install 'selfcascade[tensorboard]', or leave it unset")


class TensorBoardLog:
    """A context that writes events into ``tensorboard/NAME-VERSION``; where the settings name no folder it writes nothing."""

    def __init__(self, settings: AdaptationSettings, *, version: str, step: int) -> None:
        """Go on after ``step`` steps: what a run that was cut off wrote of later ones is not shown.

        Args:
            settings: of the run.
            version: of the artifact.
            step: steps behind the run.

        Raises:
            SettingsError: the folder cannot be written, or TensorBoard is not installed.
        """
        self._writer: Any = None
        if settings.tensorboard is None:
            return
        check_tensorboard(settings)
        from torch.utils.tensorboard import SummaryWriter

        folder = settings.tensorboard / f"{settings.name}-{version[:12]}"
        try:
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        except OSError as error:
            raise SettingsError(f"adaptation.tensorboard={settings.tensorboard} cannot be written ({error.strerror}); choose another folder") from None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name after ``step`` steps."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, png: bytes) -> None:
        """A PNG after ``step`` steps."""
        if self._writer is not None:
            with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
                self._writer.add_image(name, np.array(image.convert("RGB")), step, dataformats="HWC")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()
