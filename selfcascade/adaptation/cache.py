"""What the frozen networks make of each sample, computed once: target latent, pivot latent, text embedding.

Every step of Algorithm 1 needs E(x), E(Downsample(x)) and the text embedding of the caption, and none of them changes while the upsampler trains. They are
kept in the store, one object a dataset shard, under ``cache/latents/<recipe>/<shard>.safetensors``: the recipe is the digest of all that shapes the bytes,
the shard the SHA-256 of the dataset shard, so that versions of a dataset share the latents of the shards that they share. Inside, a tensor carries its
sample's key in its name: nothing is matched by position. Its shape says which bucket the sample is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import diffusers
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from selfcascade.adaptation.buckets import bucket_of
from selfcascade.adaptation.tensorfile import TensorFile, open_tensor_file, written_tensor_file
from selfcascade.cascade.conditioning import Conditioning, encode
from selfcascade.cascade.pipeline import SelfCascadePipeline
from selfcascade.cascade.schedule import Size
from selfcascade.curation.shards import read_tar
from selfcascade.generation.threads import torch_threads
from selfcascade.settings import SettingsError, digest_of
from selfcascade.storage import Artifact, IntegrityError, NotFound, Store

SPLITS = ("train", "tune")
"""Splits that are encoded: what trains, and what choices are made on. The test split stays unread."""
EMPTY = ""
"""Stands for the key of the empty caption."""


@dataclass(frozen=True)
class Recipe:
    """All that shapes the bytes of a sample's latents and embedding, besides its picture and caption."""

    base: str
    """Version of the base."""
    size: int
    """Side of the target picture in pixels; the pivot's is half of it."""
    device: str
    """Kind of device that encodes: cpu, cuda, mps."""
    hardware: str
    """Kind of processor, whose kernels sum in an order of their own."""
    versions: tuple[str, ...]
    """Of torch, diffusers and transformers."""
    dtype: str = "float32"
    """Precision of autoencoder, text encoder and of what is kept: encoding is done once, so nothing is saved on it."""
    threads: int = 1
    """Torch threads of an encoder; shards are encoded side by side instead."""
    posterior: str = "mode"
    """mode: latents are the mean of the autoencoder's posterior, so that a sample has one, whenever it is encoded; sample: its deviation is kept too."""
    cover: str = "lanczos"
    """Filter that brings a larger picture to the target, before the centre crop."""
    halve: str = "area"
    """Antialiasing filter of Downsample(x): the mean of 2 x 2 pixels."""
    buckets: tuple[Size, ...] = ()
    """Heights and widths of the targets in pixels; a picture goes to the one nearest in aspect ratio. None: the square."""
    format: int = 1

    @classmethod
    def here(cls, *, base: str, size: int, device: str, **settings: Any) -> Self:
        """The recipe by which this machine encodes on ``device``; ``settings`` are further fields."""
        kind = torch.device(device).type
        hardware = torch.cuda.get_device_name(device) if kind == "cuda" else torch.backends.cpu.get_cpu_capability() if kind == "cpu" else kind
        versions = (torch.__version__, diffusers.__version__, transformers.__version__)
        return cls(base=base, size=size, device=kind, hardware=hardware, versions=tuple(str(version) for version in versions), **settings)

    @property
    def digest(self) -> str:
        """SHA-256 of the recipe; buckets are left out where there are none, so that latents from before there were any keep their address."""
        return digest_of({name: value for name, value in asdict(self).items() if value != ()})


@dataclass(frozen=True)
class Batch:
    """What a training step takes of some samples, in the order in which they were asked for."""

    target: Tensor
    """(B, C, H, W), scaled."""
    pivot: Tensor
    """(B, C, H/2, W/2), scaled."""
    text: Conditioning
    """Of the captions, (B, L, D)."""
    target_std: Tensor | None = None
    """Standard deviation of the autoencoder's posterior, scaled as ``target``; None where latents are its mean."""
    pivot_std: Tensor | None = None
    """As ``target_std``, of the pivot."""
    ids: Tensor | None = None
    """SDXL's size ids of pictures in buckets, (B, 6): height and width of the picture, top and left of the crop, height and width of the target."""

    def conditioning(self, size: int) -> dict[str, Any]:
        """Keyword arguments of the UNet for these samples; where they have no size ids of their own, those of a stage of ``size`` pixels a side."""
        given = self.text.of_stage((size, size))
        if self.ids is not None:
            given["added_cond_kwargs"]["time_ids"] = self.ids.to(self.text.text.dtype)
        return given

    def without_captions(self, dropped: Tensor, empty: Conditioning) -> Batch:
        """The empty caption where ``dropped``, (B,) bool, is set. ``empty`` holds one sample."""
        text = torch.where(dropped[:, None, None], empty.text, self.text.text)
        pooled = None if self.text.pooled is None or empty.pooled is None else torch.where(dropped[:, None], empty.pooled, self.text.pooled)
        return replace(self, text=Conditioning(text, pooled))

    def to(self, device: torch.device) -> Batch:
        """Latents as they are, texts and ids on ``device``; to a GPU from pinned memory, so that the copy overlaps with what runs there."""
        pooled = None if self.text.pooled is None else moved(self.text.pooled, device)
        ids = None if self.ids is None else moved(self.ids, device)
        return Batch(moved(self.target, device), moved(self.pivot, device), Conditioning(moved(self.text.text, device), pooled), ids=ids)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; to a GPU from pinned memory and without waiting."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Encoder:
    """The frozen autoencoder and text encoder of a base. Samples are encoded one by one, so that none depends on its neighbours."""

    def __init__(self, pipeline: SelfCascadePipeline, recipe: Recipe) -> None:
        """Take ``pipeline``, fp32 and on the device of ``recipe``, for good: the layout of its autoencoder changes."""
        self.recipe = recipe
        self.pipeline = pipeline
        # The autoencoder is all convolutions: on a CPU this layout halves its time.
        self.vae = pipeline.vae.to(memory_format=torch.channels_last).eval()
        self.family = pipeline.spec.family

    @torch.no_grad()
    def latents(self, picture: NDArray[np.uint8]) -> dict[str, Tensor]:
        """``target`` and ``pivot`` of a picture, (H, W, 3) uint8: E(x) and E(Downsample(x)), (C, h, w) float32, scaled.

        With buckets those of the picture's bucket, and for SDXL its size ``ids``, (6,) float32. Where the posterior is sampled ``target_std`` and
        ``pivot_std`` as well.

        Raises:
            SettingsError: the picture is smaller than the target.
        """
        recipe, size = self.recipe, (picture.shape[0], picture.shape[1])
        target = bucket_of(size, recipe.buckets) if recipe.buckets else (recipe.size, recipe.size)
        if target is None:
            raise SettingsError(f"{size[1]}x{size[0]} pixels cover no bucket of adaptation.size={recipe.size}; lower it, or curate bigger pictures")
        covered, corner = _cover(picture, target)
        pixels = torch.from_numpy(covered).permute(2, 0, 1)[None].float() / 127.5 - 1
        made = self._encode("target", pixels) | self._encode("pivot", avg_pool2d(pixels, 2))
        return made | {"ids": torch.tensor([*size, *corner, *target], dtype=torch.float32)} if recipe.buckets and self.family.size_ids else made

    @torch.no_grad()
    def text(self, caption: str) -> dict[str, Tensor]:
        """``text`` of a caption, (L, D) float32; of SDXL also ``pooled``, (P,)."""
        return _named(encode(self.pipeline, self.family, prompt=[caption], negative_prompt=None, per_prompt=1, guided=False))

    @torch.no_grad()
    def empty(self) -> dict[str, Tensor]:
        """What guidance uses in place of a caption: the family's own "nothing"."""
        both = encode(self.pipeline, self.family, prompt=[EMPTY], negative_prompt=None, per_prompt=1, guided=True)
        return _named(Conditioning(both.text[:1], None if both.pooled is None else both.pooled[:1]))

    def _encode(self, name: str, pixels: Tensor) -> dict[str, Tensor]:
        posterior, config = self.vae.encode(pixels.to(self.vae.device, memory_format=torch.channels_last)).latent_dist, self.vae.config
        found = {name: (posterior.mode() - (config.shift_factor or 0.0)) * config.scaling_factor}
        if self.recipe.posterior == "sample":
            found[f"{name}_std"] = posterior.std * config.scaling_factor
        return {kind: tensor[0].float().cpu().contiguous() for kind, tensor in found.items()}


def shard_key(recipe: Recipe, shard: str) -> str:
    """Where the latents of a dataset shard of SHA-256 ``shard`` are."""
    return f"cache/latents/{recipe.digest[:24]}/{shard[:24]}.safetensors"


def shards_of(dataset: Artifact) -> dict[str, str]:
    """SHA-256 of each shard of a published dataset by its name, in order."""
    return {entry.key: entry.sha256 for entry in dataset.manifest().objects if entry.key.endswith(".tar")}


def missing_shards(store: Store, dataset: Artifact, recipe: Recipe) -> list[str]:
    """Names of the shards whose latents are not in the store. Only lists keys."""
    there = {info.key for info in store.list(shard_key(recipe, "").rsplit("/", 1)[0] + "/")}
    return [name for name, sha256 in shards_of(dataset).items() if shard_key(recipe, sha256) not in there]


def encode_shard(store: Store, dataset: Artifact, name: str, encoder: Encoder) -> None:
    """Encode the samples of one shard and put them into the cache, where the first writer wins.

    Raises:
        SettingsError: a picture is smaller than the target; names it.
        IntegrityError: the shard is damaged.
    """
    sha256 = shards_of(dataset)[name]
    tensors = {f"{EMPTY}/{kind}": tensor for kind, tensor in encoder.empty().items()}
    samples: dict[str, dict[str, str]] = {}
    with torch_threads(encoder.recipe.threads), TemporaryDirectory(prefix="selfcascade-") as folder:
        path = Path(folder, name)
        dataset.download(name, path)
        for stored in read_tar(path):
            fields = stored.fields
            key, split = fields["key"], fields["split"]
            if split not in SPLITS:
                continue
            try:
                made = encoder.latents(stored.pixels()) | encoder.text(fields["caption"])
            except SettingsError as error:
                raise SettingsError(f"{dataset.ref}, picture {key}: {error}") from None
            tensors |= {f"{key}/{kind}": tensor for kind, tensor in made.items()}
            samples[key] = {"caption": fields["caption"], "split": split}
    with written_tensor_file(tensors, {"recipe": encoder.recipe.digest, "shard": sha256, "samples": samples}) as file:
        store.put_new(shard_key(encoder.recipe, sha256), file)


class LatentCache:
    """Latents and embeddings of a dataset's train and tune samples, by key."""

    def __init__(self, files: Sequence[TensorFile], *, digest: str) -> None:
        """Use :meth:`open`."""
        self.digest = digest
        """SHA-256 of recipe and content: what a checkpoint remembers."""
        self._file = {key: file for file in files for key in file.record["samples"]}
        self._samples: dict[str, dict[str, str]] = {key: sample for file in files for key, sample in file.record["samples"].items()}
        self._empty = files[0]

    @classmethod
    def open(cls, store: Store, dataset: Artifact, recipe: Recipe, encoder: Callable[[], Encoder]) -> Self:
        """The cache of ``dataset``; pieces that are missing are made first.

        Args:
            store: where the cache is.
            dataset: published dataset.
            recipe: of the latents.
            encoder: makes the encoder of that recipe; called only when a piece is missing.

        Raises:
            IntegrityError: a piece is damaged, or of another recipe or shard than its address says.
            SettingsError: no sample has a caption, or a picture is smaller than the target.
        """
        maker: Encoder | None = None
        files = []
        for name, sha256 in shards_of(dataset).items():
            try:
                file = open_tensor_file(store, shard_key(recipe, sha256))
            except NotFound:
                maker = maker or encoder()
                encode_shard(store, dataset, name, maker)
                file = open_tensor_file(store, shard_key(recipe, sha256))
            found = (file.record.get("recipe"), file.record.get("shard"))
            if found != (recipe.digest, sha256):
                raise IntegrityError(
                    f"{file.name} holds latents of recipe {str(found[0])[:12]} and shard {str(found[1])[:12]}, not of {recipe.digest[:12]} and {sha256[:12]}; "
                    "delete it, it is made again"
                )
            files.append(file)
        cache = cls(files, digest=digest_of({"recipe": recipe.digest, "content": [file.sha256 for file in files]}))
        if cache._samples and not any(sample["caption"].strip() for sample in cache._samples.values()):
            raise SettingsError(f"{dataset.ref} has no captions; adaptation needs one for every picture: add them to the source and curate again")
        return cache

    def keys(self, split: str) -> list[str]:
        """Keys of the samples of a split, sorted."""
        return sorted(key for key, sample in self._samples.items() if sample["split"] == split)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the target latent of a sample, (C, H, W)."""
        return self._file[key].shape(f"{key}/target")

    def buckets(self, keys: Iterable[str]) -> list[list[str]]:
        """These keys by the size of their latents, the tallest first; in each size in the order given."""
        found: dict[tuple[int, ...], list[str]] = {}
        for key in keys:
            found.setdefault(self.shape(key), []).append(key)
        return [found[shape] for shape in sorted(found, key=lambda shape: (shape[-1] / shape[-2], shape))]

    def caption(self, key: str) -> str:
        """Caption of a sample."""
        return self._samples[key]["caption"]

    def batch(self, keys: Iterable[str]) -> Batch:
        """The samples of these keys, all of one bucket, in this order."""
        keys = list(keys)

        def stacked(kind: str) -> Tensor:
            return torch.stack([self._file[key].tensor(f"{key}/{kind}") for key in keys])

        def if_there(kind: str) -> Tensor | None:
            return stacked(kind) if f"{keys[0]}/{kind}" in self._file[keys[0]].names else None

        text = Conditioning(stacked("text"), if_there("pooled"))
        return Batch(stacked("target"), stacked("pivot"), text, if_there("target_std"), if_there("pivot_std"), if_there("ids"))

    def empty(self) -> Conditioning:
        """The empty caption, a batch of one."""
        pooled = self._empty.tensor(f"{EMPTY}/pooled")[None] if f"{EMPTY}/pooled" in self._empty.names else None
        return Conditioning(self._empty.tensor(f"{EMPTY}/text")[None], pooled)


def _cover(picture: NDArray[np.uint8], target: Size) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """The centre of ``picture`` at a height and width in pixels, and the crop's top and left: shrunk to cover them where it is larger, never enlarged."""
    height, width, _ = picture.shape
    if height < target[0] or width < target[1]:
        raise SettingsError(f"{width}x{height} pixels are less than adaptation.size={target[0]}; lower it, or curate at curation.size={target[0]} or more")
    shrunk = Image.fromarray(picture)
    if height > target[0] and width > target[1]:
        by_width = height * target[1] >= width * target[0]
        size = (target[1], round(height * target[1] / width)) if by_width else (round(width * target[0] / height), target[0])
        shrunk = shrunk.resize(size, Image.Resampling.LANCZOS)
    top, left = (shrunk.height - target[0]) // 2, (shrunk.width - target[1]) // 2
    return np.array(shrunk.crop((left, top, left + target[1], top + target[0]))), (top, left)


def _named(conditioning: Conditioning) -> dict[str, Tensor]:
    text = {"text": conditioning.text[0].float().cpu()}
    return text if conditioning.pooled is None else {**text, "pooled": conditioning.pooled[0].float().cpu()}
