"""What one pass over a set of pictures leaves behind: features, features of crops, and small pictures, in the order of prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfcascade.evaluation.crops import crop_corners, cut
from selfcascade.evaluation.features import as_batch
from selfcascade.evaluation.heap import Heap
from selfcascade.evaluation.layout import shrink
from selfcascade.evaluation.networks.network import FeatureNetwork
from selfcascade.evaluation.objects import count_objects
from selfcascade.evaluation.resize import resize
from selfcascade.evaluation.sealed import sealed, unsealed
from selfcascade.evaluation.spectrum import spectrum
from selfcascade.settings import SettingsError


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One picture of a set."""

    key: str
    prompt_id: str
    image: NDArray[np.uint8]
    """(H, W, 3)"""
    prompt: str = ""
    """What it was drawn from; of a real picture, its caption."""


@dataclass(frozen=True, slots=True, eq=False)
class CropPlan:
    """How the pictures of a set are cut."""

    size: tuple[int, int]
    """Height and width of the pictures that are cut; another picture is resized to it first."""
    side: int
    count: int
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class FeatureTable:
    """A set of n pictures, sorted by prompt and key."""

    keys: tuple[str, ...]
    prompt_ids: tuple[str, ...]
    features: NDArray[np.float32]
    """(n, d)"""
    crops: NDArray[np.float32] | None
    """(n, crops, d); None where the patch metrics are not defined."""
    small: NDArray[np.uint8]
    """(n, h, w, 3), for the layout."""
    objects: NDArray[np.int64]
    """(n,), separate things on each picture."""
    spectra: NDArray[np.float32] | None
    """(n, rings), power by spatial frequency at the target size; None where pictures are smaller."""

    def __len__(self) -> int:
        return len(self.keys)

    def to_bytes(self) -> bytes:
        """The form in the cache."""
        arrays: dict[str, NDArray[Any]] = {"features": self.features, "small": self.small, "objects": self.objects}
        arrays |= {name: array for name, array in (("crops", self.crops), ("spectra", self.spectra)) if array is not None}
        return sealed(arrays, [self.keys, self.prompt_ids])

    @classmethod
    def from_bytes(cls, data: bytes) -> FeatureTable | None:
        """The table, or None where the bytes are damaged: the cache is then made again."""
        found = unsealed(data)
        if found is None or not {"features", "small", "objects"} <= set(found[0]):
            return None
        arrays, (keys, prompt_ids) = found
        return cls(
            keys=tuple(keys),
            prompt_ids=tuple(prompt_ids),
            features=arrays["features"],
            crops=arrays.get("crops"),
            small=arrays["small"],
            objects=arrays["objects"],
            spectra=arrays.get("spectra"),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """What is seen of a picture before any network: small, whatever size the picture has."""

    name: tuple[str, str]
    """Prompt and key."""
    size: int
    """Bytes of the picture."""
    whole: Tensor | None
    """(1, 3, side, side), as the network wants it."""
    crops: Tensor | None
    """(count, 3, side, side)"""
    small: NDArray[np.uint8]
    objects: int
    spectrum: NDArray[np.float32] | None


class Extraction:
    """Gathers what there is to know of pictures that come one by one, in the order of their keys: a picture's place fixes its crops.

    What needs no network (:meth:`look`) may be done by threads ahead of what does (:meth:`take`), so that no network waits for it.

    Args:
        network: on ``device`` already.
        small: height and width of the small pictures.
        crops: how to cut, None where patches are not compared.
        batch: pictures a forward pass.
        device: where the network is.
    """

    def __init__(self, network: FeatureNetwork, *, small: tuple[int, int], crops: CropPlan | None, batch: int, device: str = "cpu") -> None:
        self.network, self.small = network, small
        self._looks: list[Look] = []
        self._whole = Batches(network.embed, batch, device)
        self._cropped = None if crops is None else Cropping(network, crops, batch=batch, device=device)
        self._heap = Heap()

    def look(self, place: int, picture: Picture) -> Look:
        """All of picture number ``place`` that needs no network; from any thread, in any order."""
        thumbnail = shrink(picture.image, self.small)
        whole = self.network.resized(as_batch([picture.image]))
        crops, rings = None, None
        if self._cropped is not None:
            image, crops = self._cropped.cut(place, picture.image)
            rings = spectrum(image)
        return Look((picture.prompt_id, picture.key), picture.image.nbytes, whole, crops, thumbnail, count_objects(thumbnail), rings)

    def take(self, look: Look) -> None:
        """The next picture, as :meth:`look` saw it."""
        self._looks.append(replace(look, whole=None, crops=None))
        assert look.whole is not None
        self._whole.add(look.whole)
        if self._cropped is not None and look.crops is not None:
            self._cropped.take(look.crops)
        self._heap.passed(look.size)

    def add(self, picture: Picture) -> None:
        """Take the next picture."""
        self.take(self.look(len(self._looks), picture))

    def result(self) -> FeatureTable:
        """The table of all pictures that came.

        Raises:
            SettingsError: none did.
        """
        if not self._looks:
            raise SettingsError("a set of pictures is empty; there is nothing to compare")
        order = sorted(range(len(self._looks)), key=lambda place: self._looks[place].name)
        looks = [self._looks[place] for place in order]
        features = self._whole.result()
        patches = None if self._cropped is None else self._cropped.result()
        spectra = [look.spectrum for look in looks if look.spectrum is not None]
        return FeatureTable(
            keys=tuple(look.name[1] for look in looks),
            prompt_ids=tuple(look.name[0] for look in looks),
            features=features[order],
            crops=None if patches is None else patches[order],
            small=np.stack([look.small for look in looks]),
            objects=np.array([look.objects for look in looks], dtype=np.int64),
            spectra=np.stack(spectra) if spectra else None,
        )


class Cropping:
    """Gathers the features of the crops of pictures that come one by one, in the order of their keys.

    Args:
        network: on ``device`` already.
        plan: how to cut.
        batch: crops a forward pass.
        device: where the network is.
    """

    def __init__(self, network: FeatureNetwork, plan: CropPlan, *, batch: int, device: str = "cpu") -> None:
        self.network, self.plan = network, plan
        self._count = 0
        self._batches = Batches(network.embed, batch, device)

    def cut(self, place: int, picture: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], Tensor]:
        """Picture number ``place``, (H, W, 3), at the size at which it is cut, and its crops as the network wants them; from any thread, in any order."""
        plan = self.plan
        image = _at(picture, plan.size)
        corners = crop_corners(place, size=plan.size, side=plan.side, count=plan.count, seed=plan.seed)
        return image, self.network.resized(as_batch(list(cut(image, corners, plan.side))))

    def take(self, crops: Tensor) -> None:
        """The crops of the next picture."""
        self._batches.add(crops)
        self._count += 1

    def result(self) -> NDArray[np.float32]:
        """Features of all crops in the order of the pictures, (n, count, d)."""
        return self._batches.result().reshape(self._count, self.plan.count, -1)


class Batches:
    """Gathers pictures to batches of one size, so that the number of forward passes does not depend on how pictures arrive."""

    def __init__(self, embed: Callable[[Tensor], Tensor], size: int, device: str) -> None:
        self._embed, self._size, self._device = embed, size, device
        self._waiting: list[Tensor] = []
        self._done: list[Tensor] = []

    def add(self, pictures: Tensor) -> None:
        """Take pictures, (N, 3, side, side); a pass is made as soon as there are enough."""
        self._waiting.extend(pictures.unbind())
        while len(self._waiting) >= self._size:
            self._pass(self._size)

    def result(self) -> NDArray[np.float32]:
        """Features of all pictures in the order in which they came, (n, d)."""
        if self._waiting:
            self._pass(len(self._waiting))
        return torch.cat(self._done).numpy()

    def _pass(self, count: int) -> None:
        batch = torch.stack(self._waiting[:count]).to(self._device)
        self._done.append(self._embed(batch).cpu())
        del self._waiting[:count]


def _at(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    if image.shape[:2] == size:
        return image
    return resize(as_batch([image]), size)[0].round().to(torch.uint8).permute(1, 2, 0).numpy()
