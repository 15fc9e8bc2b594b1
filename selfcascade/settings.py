"""What a frozen settings model is: two kinds of field, a canonical digest, YAML in, dotted overrides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError


class SettingsError(ValueError):
    """A setting that the user must change; the message is one line that names it and the way out."""


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """SHA-256, in hex, of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def where(default: Any = ..., *, description: str, **constraints: Any) -> Any:
    """A field that says where or how a run happens (store, workers, paths). It never enters a digest."""
    return Field(default, description=description, json_schema_extra={"where": True}, **constraints)


def later(default: Any, *, description: str, **constraints: Any) -> Any:
    """A field that says what is computed and that came after runs were published: at its default it enters no digest, so that they keep their address."""
    return Field(default, description=description, json_schema_extra={"later": True}, **constraints)


class Settings(BaseModel):
    """Frozen, closed model. Fields say *what* is computed unless they are declared with :func:`where`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    FORMAT: ClassVar[int] = 1
    """Raised by hand whenever the stage's code would give other bytes for equal settings."""

    def what(self) -> dict[str, Any]:
        """The fields that shape the result, nested, as plain JSON values, with the stage's ``FORMAT``."""
        fields = {
            name: value
            for name, field in type(self).model_fields.items()
            if not (_has(field, "where") or ((value := getattr(self, name)) == field.default and _has(field, "later")))
        }
        return {"format": self.FORMAT} | {name: _plain(value) for name, value in fields.items()}

    def digest(self) -> str:
        """SHA-256 of :meth:`what`: equal work has an equal digest, whatever the store, the workers or the host."""
        return digest_of(self.what())

    @classmethod
    def from_yaml(cls, path: Path, overrides: list[str] | None = None) -> Self:
        """Settings from a YAML file, changed by ``overrides`` such as ``adaptation.steps=400``.

        Raises:
            SettingsError: the file is missing or no mapping, or a key or value does not fit; names file and key.
        """
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            raise SettingsError(f"settings file {path} does not exist") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise SettingsError(f"settings file {path} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(tree, dict):
            raise SettingsError(f"settings file {path} must hold a mapping of settings, not a {type(tree).__name__}")
        return cls.from_tree(tree, overrides, origin=str(path))

    @classmethod
    def from_tree(cls, tree: dict[str, Any], overrides: list[str] | None = None, *, origin: str = "settings") -> Self:
        """As :meth:`from_yaml`, from a mapping that was read already."""
        # What the kind of a thing decides comes first: another kind drops what was said of the one before.
        for override in sorted(overrides or [], key=lambda override: not override.partition("=")[0].strip().endswith(".kind")):
            tree = _override(tree, override)
        return cls._validated(tree, origin)

    def changed(self, changes: Mapping[str, Any], *, origin: str = "settings") -> Self:
        """These settings but for ``changes``: values by dotted key, such as ``{"cascade.start": 0.3}``.

        Raises:
            SettingsError: a key or value does not fit; names it after ``origin``.
        """
        tree = self.model_dump()
        for dotted in sorted(changes, key=lambda dotted: not dotted.endswith(".kind")):
            tree = _replaced(tree, dotted.split("."), changes[dotted], origin=f"{origin}: {dotted}")
        return self._validated(tree, origin)

    @classmethod
    def _validated(cls, tree: dict[str, Any], origin: str) -> Self:
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise SettingsError(_one_line(error, origin)) from None


def _has(field: Any, mark: str) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get(mark))


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.what()
    if isinstance(value, SecretStr):
        raise TypeError("a secret must be declared with where()")
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        raise TypeError("a path must be declared with where(): its content belongs to the inputs")
    return value


def _override(tree: dict[str, Any], override: str) -> dict[str, Any]:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted.strip():
        raise SettingsError(f"--set {override!r} is not of the form key.name=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    return _replaced(tree, dotted.strip().split("."), value, origin=f"--set {override!r}")


def _replaced(tree: dict[str, Any], keys: list[str], value: Any, *, origin: str) -> dict[str, Any]:
    head, *rest = keys
    if not rest:
        if head == "kind" and tree.get("kind", value) != value:
            return {"kind": value}
        return {**tree, head: value}
    inner = tree.get(head, {})
    if not isinstance(inner, dict):
        raise SettingsError(f"{origin}: {head!r} is a value, not a group of settings")
    return {**tree, head: _replaced(inner, rest, value, origin=origin)}


def _one_line(error: ValidationError, origin: str) -> str:
    parts = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            parts.append(f"{name} is not a setting")
        elif item["type"] == "missing":
            parts.append(f"{name} is required")
        else:
            message = item["msg"].removeprefix("Value error, ")
            parts.append((f"{name}: {message} (got {item['input']!r})" if item["loc"] else message)[:300])
    return f"{origin}: " + "; ".join(parts)
