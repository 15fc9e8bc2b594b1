"""The command that makes the samples of a row again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from selfcascade.config import GenerationSettings
from selfcascade.evaluation.results import Lineage
from selfcascade.storage import Manifest
from selfcascade.storage.manifest import plain_settings

_SETTINGS = {
    "base": ("base", "bases"),
    "upsampler": ("upsampler", "upsamplers"),
    "upscaler": ("upscaler", "upscalers"),
    "adapter": ("finetuned", "adapters"),
    "unet": ("finetuned", "unets"),
}
"""Setting behind each input of samples, and its kind where it is an artifact."""


def command_of(manifest: Manifest, lineage: Iterable[Lineage], prompts: str | None) -> str:
    """A line for the shell: every setting that differs from its default, and the inputs.

    An input that is an artifact stands there with its version, another (a shipped base, a folder, a hub id) with its name: the address of the samples
    holds it to its digest.

    Args:
        manifest: of the samples.
        lineage: names the artifacts among the inputs.
        prompts: dataset that the prompts are captions of; None where they are of a file, whose name samples do not keep.
    """
    artifacts = {f"{item.artifact.partition('@')[0]}@{item.version}": item.artifact for item in lineage}
    given: dict[str, Any] = {"name": _run_of(manifest), "method": manifest.settings["method"]}
    for role, value in manifest.inputs.items():
        if role in _SETTINGS:
            setting, kind = _SETTINGS[role]
            given[setting] = artifacts.get(f"{kind}/{value.removeprefix(kind + '/')}", value.rpartition("@")[0] or value)
    given["prompts.dataset" if prompts else "prompts.file"] = prompts or "PROMPTS"
    given |= dict(_changed(manifest.settings, plain_settings(GenerationSettings())))
    return " ".join(["selfcascade generate --config defaults", *(f"--set {shlex.quote(f'generation.{name}={_text(value)}')}" for name, value in given.items())])


def _run_of(manifest: Manifest) -> str:
    """What ``generation.name`` was: the command adds the method to it, and of direct sampling the eta."""
    method = manifest.settings["method"]
    label = f"direct-eta-{manifest.settings['cascade']['eta']:g}".replace(".", "-") if method == "direct" else method
    return manifest.name.removesuffix(f"-{label}") or manifest.name


def _changed(found: Mapping[str, Any], default: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of the settings that are not at their default."""
    for name, value in sorted(found.items()):
        before = default.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            yield from _changed(value, before, f"{prefix}{name}.")
        elif value != before and name != "format":
            yield prefix + name, value


def _text(value: Any) -> str:
    """As YAML reads it back: plain where that is the text itself, else as JSON."""
    if isinstance(value, str):
        try:
            if yaml.safe_load(value) == value:
                return value
        except yaml.YAMLError:
            pass
    return json.dumps(value, ensure_ascii=False)
