"""One side of a comparison as the network sees it: its pictures whole and in crops, from the cache or by one pass over the pictures for all that is missing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfcascade.config import EvaluationSettings
from selfcascade.curation.ahead import PICTURES, mapped
from selfcascade.evaluation.crops import crop_rule
from selfcascade.evaluation.feature_cache import FeatureCache
from selfcascade.evaluation.features import as_batch
from selfcascade.evaluation.heap import Heap
from selfcascade.evaluation.networks.network import FeatureNetwork
from selfcascade.evaluation.tables import Batches, Cropping, CropPlan
from selfcascade.settings import SettingsError

Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True, slots=True, eq=False)
class PictureSource:
    """Pictures that can be read, and what they are known by before that."""

    name: str
    digest: str
    """Of the bytes of all pictures and their order."""
    read: Callable[[], Iterator[NDArray[np.uint8]]]
    """Pictures, (H, W, 3), in their order, which is that of ``digest``."""


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredSide:
    """n pictures of any sizes."""

    features: NDArray[np.float32]
    """(n, d)"""
    crops: dict[Size, NDArray[np.float32]]
    """(n, crops, d) by the size that the pictures were brought to."""
    smallest: Size
    """Least height and least width."""
    largest: Size
    duplicates: int
    """Pictures that equal an earlier one, pixel by pixel."""

    @property
    def size(self) -> Size | None:
        """The size of every picture; None where they differ."""
        return self.smallest if self.smallest == self.largest else None


class SideMeasuring:
    """Measures sides alike: with one network, one way to cut, one cache."""

    def __init__(self, settings: EvaluationSettings, network: FeatureNetwork, made_with: dict[str, str], *, device: str, cache: FeatureCache) -> None:
        """``network`` is on ``device`` already; ``made_with`` says which it is, which weights it has and how it resizes."""
        self._settings, self._network, self._device, self._cache = settings, network, device, cache
        features = settings.features
        how = {"batch": features.batch, "threads": features.threads, "device": torch.device(device).type, "torch": torch.__version__}
        self._how = {"format": settings.FORMAT, "made with": made_with} | how

    def measure(self, source: PictureSource, sizes: Iterable[Size] | None = None) -> MeasuredSide:
        """Features of the pictures of ``source``, whole and in crops.

        Args:
            source: what is measured.
            sizes: to which the pictures are brought before they are cut; a size that a picture would have to be enlarged to is left out, for what it
                shows at native scale is then not its own. Unset: their own, if it is the same for all.

        Raises:
            SettingsError: there is no picture, or one cannot be read.
        """
        whole = self._whole(source)
        if whole is None:
            return self._pass(source, None, None if sizes is None else list(sizes))
        wanted = ([whole.size] if whole.size else []) if sizes is None else [size for size in sizes if _reaches(whole.smallest, size)]
        wanted = [size for size in wanted if self._settings.crop <= min(size)]
        found = {size: entry[0]["crops"] for size in wanted if (entry := self._cache.get(self._crop_key(source, size))) is not None}
        if len(found) < len(wanted):
            return self._pass(source, whole, [size for size in wanted if size not in found], found)
        return MeasuredSide(whole.features, found, whole.smallest, whole.largest, whole.duplicates)

    def _whole(self, source: PictureSource) -> MeasuredSide | None:
        entry = self._cache.get(self._key(source))
        if entry is None:
            return None
        arrays, beside = entry
        return MeasuredSide(arrays["features"], {}, (*beside["smallest"],), (*beside["largest"],), beside["duplicates"])

    def _pass(
        self, source: PictureSource, whole: MeasuredSide | None, sizes: list[Size] | None, found: dict[Size, NDArray[np.float32]] | None = None
    ) -> MeasuredSide:
        """One pass over the pictures for what is missing: for their features too where ``whole`` is None."""
        images = source.read()
        first = next(images, None)
        if first is None:
            raise SettingsError(f"{source.name} holds no picture; there is nothing to compare")
        batches = Batches(self._network.embed, self._settings.features.batch, self._device)
        wanted = [first.shape[:2]] if sizes is None else sizes
        croppings = {each: self._cropping(each) for each in wanted if self._settings.crop <= min(each)}

        def look(numbered: tuple[int, NDArray[np.uint8]]) -> _Look:
            place, image = numbered
            size: Size = image.shape[:2]
            fitting = [each for each in croppings if (size == each if sizes is None else _reaches(size, each))]
            crops = {each: croppings[each].cut(place, image)[1] for each in fitting}
            if whole is not None:
                return _Look(size, image.nbytes, crops)
            digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()
            return _Look(size, image.nbytes, crops, digest, self._network.resized(as_batch([image])))

        seen, shapes, count, heap, kept = set[bytes](), set[Size](), 0, Heap(), list(croppings)
        for looked in mapped(look, enumerate(chain([first], images)), ahead=PICTURES):
            count += 1
            shapes.add(looked.size)
            if looked.digest is not None and looked.whole is not None:
                seen.add(looked.digest)
                batches.add(looked.whole)
            kept = [each for each in kept if each in looked.crops]
            for each in kept:
                croppings[each].take(looked.crops[each])
            heap.passed(looked.nbytes)
        if whole is None:
            heights, widths = zip(*shapes, strict=True)
            smallest, largest = (min(heights), min(widths)), (max(heights), max(widths))
            whole = MeasuredSide(batches.result(), {}, smallest, largest, count - len(seen))
            beside = {"smallest": smallest, "largest": largest, "duplicates": whole.duplicates}
            self._cache.put(self._key(source), {"features": whole.features}, beside)
        made = {size: croppings[size].result() for size in kept}
        for size, crops in made.items():
            self._cache.put(self._crop_key(source, size), {"crops": crops}, None)
        return MeasuredSide(whole.features, (found or {}) | made, whole.smallest, whole.largest, whole.duplicates)

    def _cropping(self, size: Size) -> Cropping:
        plan = CropPlan(size, self._settings.crop, self._settings.crops_per_image, self._settings.seed)
        return Cropping(self._network, plan, batch=self._settings.features.batch, device=self._device)

    def _key(self, source: PictureSource) -> dict[str, Any]:
        return self._how | {"pictures": source.digest}

    def _crop_key(self, source: PictureSource, size: Size) -> dict[str, Any]:
        rule = crop_rule(side=self._settings.crop, count=self._settings.crops_per_image, seed=self._settings.seed)
        return self._key(source) | {"crop": rule, "size": size}


@dataclass(frozen=True, slots=True, eq=False)
class _Look:
    """What a picture shows without the network, looked at by a thread ahead of it."""

    size: Size
    nbytes: int
    crops: dict[Size, Tensor]
    """By the size that the picture was brought to; none of a size that it does not fit."""
    digest: bytes | None = None
    whole: Tensor | None = None


def _reaches(size: Size, target: Size) -> bool:
    return size[0] >= target[0] and size[1] >= target[1]
