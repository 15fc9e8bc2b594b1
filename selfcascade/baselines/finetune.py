"""What the tuned baselines share: a folder of weights for the base's UNet, beside it a record of the base that they were trained for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from selfcascade.bases import fetch_artifact, names_artifact
from selfcascade.settings import SettingsError, digest_of
from selfcascade.storage import Kind, Store

Way = Literal["lora", "full"]
KINDS: Mapping[Way, Kind] = MappingProxyType({"lora": "adapters", "full": "unets"})
"""Kind of the artifact that holds either. They are two kinds because their readers differ: diffusers' ``load_lora_weights`` takes the one, ``from_pretrained``
of its UNet the other; and so that one run may have both under one name."""
FILES: Mapping[Way, tuple[str, ...]] = MappingProxyType(
    {"lora": ("pytorch_lora_weights.safetensors",), "full": ("config.json", "diffusion_pytorch_model.safetensors")}
)
"""What diffusers reads of either."""
RECORD = "finetune.json"


class Record(BaseModel):
    """What the weights do not say of themselves. A folder from elsewhere may lack it: then nothing is known."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    way: Way
    base: str | None = Field(None, description="name@version of the base")
    size: tuple[int, int] | None = Field(None, description="height and width in pixels of the pictures that it was trained on")
    rank: int | None = Field(None, description="of a LoRA")

    def save(self, folder: Path) -> None:
        """Write it into a folder."""
        (folder / RECORD).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Finetune:
    """Weights that were found."""

    folder: Path
    reference: str
    """As the user asked for them."""
    record: Record

    @property
    def weights(self) -> Path:
        """The safetensors file."""
        return self.folder / FILES[self.record.way][-1]

    @property
    def version(self) -> str:
        """SHA-256 of the files that are read."""
        digests = {}
        for name in (*FILES[self.record.way], RECORD):
            if (self.folder / name).is_file():
                with (self.folder / name).open("rb") as file:
                    digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return digest_of(digests)

    def check_base(self, held: str | None) -> None:
        """Refuse the base ``held``, ``name@version``, if the weights were trained for another.

        Raises:
            SettingsError: names both, and the way out.
        """
        from selfcascade.cascade.families import refuse_other_base  # with it come torch and diffusers, which a look ahead does without

        refuse_other_base(f"{NAMES[self.record.way]} {self.reference!r}", self.record.base, held)


NAMES: Mapping[Way, str] = MappingProxyType({"lora": "LoRA", "full": "fine-tuned UNet"})
"""What messages call either."""


def find_finetune(reference: str, way: Way, store: Store | None = None) -> Finetune:
    """Weights of a tuned baseline.

    Args:
        reference: folder, or artifact (``adapters/name`` of a LoRA, ``unets/name`` of a fine-tuned UNet, each with ``@version``, or ``s3://...``).
        way: which of the two it must be.
        store: where artifacts are looked up; unset: that of an ``s3://`` URI, else that of the default settings, is opened for it.

    Raises:
        SettingsError: there is no such thing, or it is the other of the two, or something else; one line.
    """
    folder = fetch_artifact(reference, KINDS[way], store)[0] if names_artifact(reference, KINDS[way]) else Path(reference)
    if not folder.is_dir():
        raise SettingsError(f"{NAMES[way]} {reference!r} is neither a folder nor an artifact ({KINDS[way]}/NAME)")
    missing = [name for name in FILES[way] if not (folder / name).is_file()]
    if missing:
        other: Way = "full" if way == "lora" else "lora"
        hint = f"; it holds a {NAMES[other]}: use method {other!r}" if all((folder / name).is_file() for name in FILES[other]) else ""
        raise SettingsError(f"{NAMES[way]} {reference!r} has no {missing[0]}{hint}")
    if not (folder / RECORD).is_file():
        return Finetune(folder, reference, Record(way=way))
    try:
        record = Record.model_validate_json((folder / RECORD).read_bytes())
    except ValidationError as error:
        raise SettingsError(f"{NAMES[way]} {reference!r} has a damaged {RECORD}: {error.errors()[0]['msg']}; get it anew") from None
    return Finetune(folder, reference, record)
