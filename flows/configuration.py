"""The shipped runs, and how a run's settings are found, changed and written with a meaning beside each key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import yaml

from selfcascade.config import PipelineSettings
from selfcascade.settings import Settings, SettingsError

FOLDER = Path(__file__).parent / "configs"


def shipped() -> list[str]:
    """Names of the shipped runs, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(reference: str) -> Path:
    """The file behind ``--config``: a path as it stands, else a shipped run of that name.

    Raises:
        SettingsError: neither exists; the message lists what is shipped.
    """
    path = Path(reference)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    if reference in shipped():
        return FOLDER / f"{reference}.yaml"
    raise SettingsError(f"--config {reference!r} is neither a file nor a shipped run; shipped: {', '.join(shipped())}")


def load(reference: str, overrides: list[str] | None = None) -> PipelineSettings:
    """Settings of the run ``reference`` changed by ``overrides`` such as ``adaptation.steps=400``."""
    return PipelineSettings.from_yaml(find(reference), overrides)


def dump(settings: PipelineSettings) -> str:
    """Every resolved setting as YAML, secrets masked."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def annotated(text: str) -> str:
    """The YAML settings file ``text`` in the order of the models, each key below a comment with its description.

    The comment block at the top, up to the first blank line, is kept. Running it on its own output changes nothing.
    """
    header = text.split("\n\n", 1)[0].rstrip() if text.startswith("#") else ""
    tree = yaml.safe_load(text) or {}
    body = "\n".join(_lines(tree, PipelineSettings.model_validate(tree), indent=""))
    return "\n\n".join(part for part in (header, body) if part) + "\n"


def _lines(tree: dict[str, Any], settings: Settings, indent: str) -> list[str]:
    fields = type(settings).model_fields
    lines: list[str] = []
    for key in (name for name in fields if name in tree):
        value, held = tree[key], getattr(settings, key)
        group = isinstance(value, dict) and isinstance(held, Settings)
        meaning = fields[key].description or (_summary(type(held)) if group else None)
        if meaning is None:
            raise SettingsError(f"setting {key} of {type(settings).__name__} has no description")
        choices = get_args(fields[key].annotation)
        if len(choices) > 1 and all(isinstance(choice, str) for choice in choices):
            meaning += f" ({' | '.join(choices)})"
        if not indent and lines:
            lines.append("")
        lines.append(f"{indent}# {meaning}")
        if group:
            lines.append(f"{indent}{key}:")
            lines += _lines(value, held, indent + "  ")
        else:
            lines.append(f"{indent}{key}: {_scalar(value)}")
    return lines


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True).removesuffix("\n").removesuffix("\n...")


def _summary(model: type[Settings]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]


if __name__ == "__main__":
    for name in shipped():
        path = FOLDER / f"{name}.yaml"
        path.write_text(annotated(path.read_text(encoding="utf-8")), encoding="utf-8")
