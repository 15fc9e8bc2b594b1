"""Bases: which frozen model a name stands for, at which version, and how it is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfcascade.settings import SettingsError, digest_of

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from selfcascade.storage import Store

SHIPPED = Path(__file__).parent
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PICTURES, VIDEOS = "UNet2DConditionModel", "UNet3DConditionModel"
NEEDED = f"a {PICTURES} (SD 1.5, SD 2.1, SDXL, a small base) or a {VIDEOS} (text-to-video)"
"""What the cascade works with, for those whose base has something else."""


@dataclass(frozen=True)
class ResolvedBase:
    """A base that was found."""

    location: str
    """Local folder in diffusers' format."""
    version: str
    """Digest of the folder's files, version of the artifact, or commit of the hub repository."""
    name: str
    """As the user would ask for it again: never an absolute path."""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


def resolve_base(base: str, store: Store | None = None) -> ResolvedBase:
    """Find a base.

    Args:
        base: name of a shipped base (``tiny-emoji``), artifact (``bases/name``, ``bases/name@version``, ``s3://...``), local folder, or hub id
            (``owner/name``). They are tried in this order.
        store: where artifacts are looked up; unset: that of an ``s3://`` URI, else that of the default settings, is opened for it.

    Raises:
        SettingsError: nothing of that name, the hub is out of reach, or the base has no UNet; one line with the way out.
    """
    shipped = SHIPPED / base
    if re.fullmatch(r"[\w-]+", base) and (shipped / "model_index.json").is_file():
        return _folder(shipped, base)
    if names_artifact(base, "bases"):
        location, name, version = fetch_artifact(base, "bases", store)
        refuse_other_kinds(location, base)
        return ResolvedBase(str(location), version, name)
    if Path(base).is_dir():
        return _folder(Path(base), Path(base).resolve().name)
    if HUB_ID.fullmatch(base):
        return _hub(base)
    known = sorted(index.parent.name for index in SHIPPED.glob("*/model_index.json"))
    raise SettingsError(f"base {base!r} is neither shipped ({', '.join(known) or 'none is'}), nor a folder, a hub id (owner/name) or an artifact (bases/name)")


def load_pipeline(base: ResolvedBase, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> DiffusionPipeline:
    """The base as diffusers' own Stable Diffusion (XL) or text-to-video pipeline, from safetensors only, without a safety checker; the autoencoder in fp32.

    Args:
        base: from :func:`resolve_base`.
        dtype: of UNet and text encoders; fp32 where unset.
        device: where the networks go.

    Raises:
        SettingsError: the folder is not a whole diffusers pipeline; names it.
    """
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, TextToVideoSDPipeline

    index = refuse_other_kinds(Path(base.location), base.name)
    pictures = StableDiffusionXLPipeline if "text_encoder_2" in index else StableDiffusionPipeline
    stock = TextToVideoSDPipeline if index["unet"][1] == VIDEOS else pictures
    unchecked = {"safety_checker": None, "feature_extractor": None} if stock is StableDiffusionPipeline else {}
    dtypes = {"default": dtype or torch.float32, "vae": torch.float32}
    try:
        pipeline = stock.from_pretrained(base.location, dtype=dtypes, use_safetensors=True, local_files_only=True, **unchecked)
    except (OSError, ValueError) as error:
        raise SettingsError(f"base {base.name!r} does not load from {base.location}: {_line(error)}") from None
    pipeline.register_to_config(_base=str(base))  # private, as diffusers passes options on: a public one would count as a component
    return pipeline.to(device)


def refuse_other_kinds(folder: Path, name: str) -> dict[str, Any]:
    """The folder's ``model_index.json``, if it describes a base with a UNet.

    Raises:
        SettingsError: no index, or a base of another kind (a transformer, as in SD3 or FLUX); one line.
    """
    try:
        index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"base {name!r} has no model_index.json; give the folder of a diffusers pipeline") from None
    except ValueError as error:
        raise SettingsError(f"base {name!r} has a damaged model_index.json: {_line(error)}") from None
    if index.get("unet", [None, None])[1] not in (PICTURES, VIDEOS):
        network = next((key for key in ("unet", "transformer", "prior") if key in index), "no UNet")
        raise SettingsError(f"base {name!r} is a {index.get('_class_name')} ({network}); the cascade needs {NEEDED}")
    return index


def refuse_videos(base: ResolvedBase) -> None:
    """Refuse a text-to-video base where pictures are trained on or made.

    Raises:
        SettingsError: it is one; one line with the way out.
    """
    if refuse_other_kinds(Path(base.location), base.name)["unet"][1] == VIDEOS:
        raise SettingsError(f"base {base.name!r} makes videos, but runs train on pictures and make pictures; sample videos in Python: SelfCascadePipeline")


def names_artifact(reference: str, kind: str) -> bool:
    """Whether a reference means an artifact of that kind rather than a folder or a hub id."""
    return reference.startswith(("s3://", f"{kind}/"))


def fetch_artifact(reference: str, kind: str, store: Store | None) -> tuple[Path, str, str]:
    """Local folder of an artifact, its name and its version. Files that are there and whole are not fetched again; every byte is checked against the manifest.

    Raises:
        SettingsError: no such artifact, or its bytes are not those of its manifest.
    """
    from selfcascade.storage import Store, located, resolve
    from selfcascade.storage.pulling import pull

    if store is None:
        with Store.open(located(reference), read_only=True) as opened:  # keys that may only read are enough
            return fetch_artifact(reference, kind, opened)
    artifact = resolve(store, reference, kind)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "selfcascade"
    folder = cache / artifact.ref.prefix
    for entry in artifact.manifest().objects:
        pull(artifact, entry, folder)
    return folder, artifact.ref.name, artifact.ref.version


def _folder(folder: Path, name: str) -> ResolvedBase:
    refuse_other_kinds(folder, name)
    return ResolvedBase(str(folder), folder_version(folder), name)


def folder_version(folder: Path) -> str:
    """SHA-256 of the sorted listing of (relative path, SHA-256 of the content). Hidden files and Markdown, which no model reads, are left out."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".md" and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    return digest_of(sorted([path.relative_to(folder).as_posix(), _known_digest(path, path.stat().st_size, path.stat().st_mtime_ns)] for path in files))


@lru_cache(maxsize=4096)
def _known_digest(path: Path, size: int, modified: int) -> str:  # keyed by what changes when the content does: a base has gigabytes
    return _file_digest(path)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hub(base: str) -> ResolvedBase:
    import httpx
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError

    try:
        snapshot = Path(DiffusionPipeline.download(base, use_safetensors=True))
    except (OSError, ValueError, HfHubHTTPError, httpx.HTTPError) as error:
        raise SettingsError(
            f"base {base!r} is not on this machine and cannot be fetched from the hub: {_line(error)}; go online once, or give a local folder"
        ) from None
    refuse_other_kinds(snapshot, base)
    return ResolvedBase(str(snapshot), snapshot.name, base)  # the hub's cache names a snapshot by its commit


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
