"""Sets of clips: a folder whose entries are folders of frames, arrays or animated pictures; or one array of all clips."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from selfcascade.curation.decoding import format_of_name
from selfcascade.evaluation.sides import MAX_PIXELS, file_digest, read_picture, unreadable
from selfcascade.settings import SettingsError, digest_of

ANIMATED = ("GIF", "PNG", "WEBP")
Frames = NDArray[np.uint8]
"""A clip, (T, H, W, 3), T at least 1."""


@dataclass(frozen=True, slots=True, eq=False)
class ClipSource:
    """Clips that can be read, and what they are known by before that."""

    name: str
    digest: str
    """Of the bytes of all clips and their order."""
    read: Callable[[], Iterator[tuple[str, Frames]]]
    """Name and frames of each clip, in order; one is held at a time."""


def clip_source(text: str) -> ClipSource:
    """The clips that ``text`` names: a folder, or an ``.npy`` file of (N, T, H, W, 3) uint8.

    Raises:
        SettingsError: there is no such thing, or a file that cannot be read.
    """
    path = Path(text)
    if path.suffix == ".npy" and path.is_file():
        return ClipSource(text, digest_of([file_digest(path)]), partial(_of_array, path))
    if not path.is_dir():
        raise SettingsError(f"{text} is no folder of clips and no .npy file of (N, T, H, W, 3) uint8; give one of these")
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith(".") and (entry.is_dir() or _is_clip(entry)))
    files = [[file_digest(file) for file in (_frames_of(entry) if entry.is_dir() else [entry])] for entry in entries]
    return ClipSource(text, digest_of(files), lambda: ((str(entry), _read(entry)) for entry in entries))


def _is_clip(path: Path) -> bool:
    return path.is_file() and (path.suffix == ".npy" or format_of_name(path.name) in ANIMATED)


def _frames_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".") and format_of_name(path.name) is not None)


def _read(path: Path) -> Frames:
    if path.suffix == ".npy":
        return _checked(path, _array(path), 4, "(T, H, W, 3)").copy()
    frames = [read_picture(frame) for frame in _frames_of(path)] if path.is_dir() else _animation(path)
    if not frames:
        raise unreadable(path, "the folder holds no frame")
    sizes = sorted({frame.shape[:2] for frame in frames})
    if len(sizes) > 1:
        raise unreadable(path, f"its frames differ in size: {sizes[0][0]} x {sizes[0][1]} and {sizes[-1][0]} x {sizes[-1][1]} px")
    return np.stack(frames)


def _animation(path: Path) -> list[Frames]:
    try:
        with Image.open(path, formats=ANIMATED) as image:
            if image.width * image.height * getattr(image, "n_frames", 1) > MAX_PIXELS:
                raise unreadable(path, f"its frames have more than {MAX_PIXELS} pixels together")
            return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise unreadable(path, error) from None


def _of_array(path: Path) -> Iterator[tuple[str, Frames]]:
    for number, clip in enumerate(_checked(path, _array(path), 5, "(N, T, H, W, 3)")):
        yield f"{path}, clip {number}", np.array(clip)


def _array(path: Path) -> NDArray[np.generic]:
    try:
        found: NDArray[np.generic] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise unreadable(path, error) from None
    return found


def _checked(path: Path, array: NDArray[np.generic], dimensions: int, shape: str) -> Frames:
    if array.dtype != np.uint8 or array.ndim != dimensions or array.shape[-1] != 3 or 0 in array.shape:
        raise unreadable(path, f"it holds {array.dtype} of shape {array.shape}, not uint8 of shape {shape}")
    return array  # type: ignore[return-value]
