"""Where the weights of a network lie: a file or folder of the user's, or the cache of the model hub; downloaded only where that is allowed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from selfcascade.config import FeatureSettings
from selfcascade.settings import SettingsError

MODEL, CONFIG = "model.safetensors", "config.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def sha256_of(path: Path) -> str:
    """SHA-256 of a weights file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_folder(settings: FeatureSettings, *, default: str, others: Sequence[str] = ()) -> Path:
    """Folder in the format of transformers, with ``config.json`` and ``model.safetensors``: pickled weights are not read.

    Args:
        settings: ``weights`` is a folder or a hub id, ``download`` whether the hub may be asked.
        default: hub id where ``weights`` is unset.
        others: files beside those two that the network needs.

    Raises:
        SettingsError: a file is missing; says where it was looked for and what would bring it.
    """
    chosen = str(settings.weights) if settings.weights is not None else default
    needed = (CONFIG, MODEL, *others)
    folder = Path(chosen)
    if not folder.is_dir():
        if settings.weights is not None and not _HUB_ID.fullmatch(chosen):
            raise SettingsError(f"evaluation.features.weights: no folder {chosen}; set it to a folder of transformers, or to a hub id such as {default}")
        folder = _from_hub(chosen, needed, download=settings.download)
    for name in needed:
        if not (folder / name).is_file():
            raise SettingsError(f"evaluation.features.weights: {chosen} has no {name}; {settings.network} needs {', '.join(needed)}")
    return folder


def _from_hub(repository: str, needed: Sequence[str], *, download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(needed), local_files_only=not download))
    except LocalEntryNotFoundError:
        way = "the hub is out of reach" if download else "allow its download by evaluation.features.download=true"
        raise SettingsError(f"{repository} is not in the cache of the model hub; {way}, or set evaluation.features.weights to a folder that holds it") from None
    except (HfHubHTTPError, OSError) as error:
        raise SettingsError(f"{repository} cannot be downloaded: {' '.join(str(error).split())[:120]}") from None
