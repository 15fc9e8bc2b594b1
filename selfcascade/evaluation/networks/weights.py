"""Where the weights of a network lie: a file or folder of the user's, or the cache of the model hub; downloaded only where that is allowed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

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


def config_of(path: Path, model_type: str, name: str) -> dict[str, Any]:
    """The ``config.json`` beside the weights at ``path``.

    Raises:
        SettingsError: it is of another type of model than ``name``.
    """
    config: dict[str, Any] = json.loads(path.with_name(CONFIG).read_text(encoding="utf-8"))
    if config.get("model_type") != model_type:
        raise SettingsError(f"evaluation.features.weights: {path.parent} holds a model of type {config.get('model_type')!r}, not {name}")
    return config


def pretrained(model: Any, path: Path, name: str) -> Any:
    """A model of the class ``model`` of transformers, with the weights at ``path``, in float32.

    Raises:
        SettingsError: the weights are not those of the configuration beside them.
    """
    try:
        loaded, told = model.from_pretrained(path.parent, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise not_loading(path, name, error) from None
    if told["missing_keys"]:
        raise SettingsError(f"evaluation.features.weights: {path} lacks {sorted(told['missing_keys'])[0]}; it is not the {name} of its config.json")
    return loaded


def not_loading(path: Path, name: str, error: Exception) -> SettingsError:
    """What to raise where the folder of ``path`` cannot be loaded as ``name``."""
    return SettingsError(f"evaluation.features.weights: {path.parent} does not load as {name}: {' '.join(str(error).split())[:120]}")


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
