"""Small real pictures, good and bad, made by the tests themselves."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from selfcascade.config import CurationSettings, FilterSettings, FolderSource


class Pictures:
    """Makes files in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def noise(width: int = 48, height: int = 40, *, seed: int = 0, channels: int = 3) -> Image.Image:
        """A picture that is not blank."""
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8))

    @staticmethod
    def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    @staticmethod
    def png_header(width: int, height: int) -> bytes:
        """The first bytes of a PNG that claims a size and holds no pixel."""
        fields = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + fields + struct.pack(">I", zlib.crc32(b"IHDR" + fields)) + b"\0\0\0\0IDAT"

    def put(self, name: str, data: bytes, caption: str | bytes | None = "a thing") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if caption is not None:
            path.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
        return path

    def put_bad_ones(self) -> dict[str, str]:
        """One file of every kind that must be rejected; the kind of its reason by its key."""
        noise, encode = self.noise(seed=99), self.encode
        whole = encode(self.noise(64, 64, seed=98), "JPEG")
        wide = Image.fromarray(np.random.default_rng(97).integers(0, 65536, (40, 48), dtype=np.uint16))
        deep = b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in (
                (b"IHDR", struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0)),
                (b"IDAT", zlib.compress((b"\0" + bytes(range(240))) * 40)),
                (b"IEND", b""),
            )
        )
        self.put("animated-gif.gif", encode(noise, "GIF", save_all=True, append_images=[self.noise(seed=96)], duration=50))
        self.put("animated-png.png", encode(noise, "PNG", save_all=True, append_images=[self.noise(seed=96)], duration=50))
        self.put("animated-webp.webp", encode(noise, "WEBP", save_all=True, append_images=[self.noise(seed=96)], duration=50))
        self.put("blank.png", encode(Image.new("RGB", (48, 40), (9, 200, 30))))
        self.put("bomb.png", self.png_header(60_000, 60_000))
        self.put("bomb-below-the-decoders-bound.png", self.png_header(12_000, 12_000))
        self.put("cmyk.jpg", encode(noise.convert("CMYK"), "JPEG"))
        self.put("cmyk.tif", encode(noise.convert("CMYK"), "TIFF"))
        self.put("damaged.png", (lambda data: data[:60] + b"\xff" * 40 + data[100:])(encode(noise)))
        self.put("encoding.png", encode(self.noise(seed=95)), "caf\u00e9".encode("latin-1"))
        self.put("empty.png", b"")
        self.put("gray16.png", encode(wide))
        self.put("gray16.tif", encode(wide, "TIFF"))
        self.put("rgb16.png", b"\x89PNG\r\n\x1a\n" + deep)
        self.put("long.png", encode(self.noise(seed=94)), "x" * 60)
        self.put("mislabelled.png", encode(self.noise(seed=93), "JPEG"))
        self.put("narrow.png", encode(self.noise(160, 40)))
        self.put("small.png", encode(self.noise(20, 20)))
        self.put("target.png", encode(self.noise(30, 30)))
        self.put("text.png", b"this is no picture, whatever the name says\n" * 9)
        self.put("truncated.jpg", whole[: len(whole) // 2])
        self.put("truncated.png", encode(self.noise(seed=92))[:900])
        self.put("uncaptioned.png", encode(self.noise(seed=91)), None)
        self.put("untitled.png", encode(self.noise(seed=90)), " \n")
        (self.folder / "dangling.png").symlink_to(self.folder / "nowhere.png")
        return {
            "animated-gif": "animated",
            "animated-png": "animated",
            "animated-webp": "animated",
            "blank": "blank",
            "bomb": "too many pixels",
            "bomb-below-the-decoders-bound": "too many pixels",
            "cmyk.jpg": "CMYK",
            "cmyk.tif": "CMYK",
            "damaged": "damaged",
            "dangling": "unreadable",
            "encoding": "caption encoding",
            "empty": "empty",
            "gray16.png": "16-bit",
            "gray16.tif": "16-bit",
            "rgb16": "16-bit",
            "long": "caption too long",
            "mislabelled": "mislabelled",
            "narrow": "too narrow",
            "small": "too small",
            "target": "smaller than the target",
            "text": "unreadable",
            "truncated.jpg": "truncated",
            "truncated.png": "truncated",
            "uncaptioned": "no caption",
            "untitled": "caption too short",
        }

    def put_good_ones(self, count: int = 6) -> None:
        for number in range(count):
            self.put(f"good/{number:03d}.png", self.encode(self.noise(40 + number, 36, seed=number)), f"thing {number}")

    def settings(self, **changes: Any) -> CurationSettings:
        fields: dict[str, Any] = {
            "name": "things",
            "source": FolderSource(path=self.folder),
            "size": 32,
            "filters": FilterSettings(min_side=24, max_caption_chars=50),
            "shard_inputs": 8,
        }
        return CurationSettings(**(fields | changes))


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    folder = tmp_path / "pictures"
    folder.mkdir()
    return Pictures(folder)
