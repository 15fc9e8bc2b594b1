"""More than two hundred hostile and broken files in one run: each has a row, none crashes, hangs or fills the memory."""

from __future__ import annotations

import io
import os
import resource
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from selfcascade.curation.reading import read_table
from selfcascade.curation.record import kind_of
from selfcascade.storage import resolve

CAP_MIB = 700
"""Growth of resident memory of the process that curates: a picture of 100 megapixels takes 300 MiB, and two copies of it are made."""
SECONDS = 120
KINDS = {
    "PNG": {},
    "JPEG": {"quality": 90},
    "JPEG progressive": {"quality": 90, "progressive": True},
    "WEBP": {"quality": 80},
    "WEBP lossless": {"lossless": True},
    "GIF": {},
    "TIFF": {},
    "TIFF deflate": {"compression": "tiff_adobe_deflate"},
    "BMP": {},
    "AVIF": {},
}
EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "TIFF": "tif", "BMP": "bmp", "AVIF": "avif"}


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks: bytes, width: int = 40, height: int = 40, bits: int = 8, colour: int = 2) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)) + b"".join(chunks)


def rows_of_zeros(width: int, height: int) -> bytes:
    """Compressed twice as far as a reader expects: a thousand bytes for each of the file."""
    return zlib.compress(bytes((3 * width + 1) * height), 9)


def tiff(entries: list[tuple[int, int, int, int]], data: bytes = b"") -> bytes:
    """Little-endian TIFF with one directory of (tag, type, count, value)."""
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8) + directory + data


def hostile(noise: Image.Image) -> dict[str, bytes]:
    """Content by file name."""
    files: dict[str, bytes] = {}
    encoded = {}
    for kind, options in KINDS.items():
        buffer = io.BytesIO()
        noise.save(buffer, kind.split()[0], **options)
        encoded[kind] = buffer.getvalue()
    for kind, data in encoded.items():
        extension, slug = EXTENSIONS[kind.split()[0]], kind.lower().replace(" ", "-")
        # Cut after every kind of chunk: the first bytes, inside headers, and along the pixels.
        for cut in sorted({1, 4, 8, 12, 20, 33, 60, 120, *(len(data) * share // 10 for share in range(1, 10)), len(data) - 1, len(data) - 12}):
            if 0 < cut < len(data):
                files[f"cut/{slug}-{cut:06d}.{extension}"] = data[:cut]
        random = np.random.default_rng(len(data))
        for number in range(3):
            damaged = bytearray(data)
            for place in random.integers(8, len(data), 12):
                damaged[place] = random.integers(256)
            files[f"damaged/{slug}-{number}.{extension}"] = bytes(damaged)
        files[f"wrong-name/{slug}.{'jpg' if extension == 'png' else 'png'}"] = data
        files[f"tail/{slug}.{extension}"] = data + b"MZ" + bytes(1000)
    for extension in ("png", "jpg", "webp", "gif", "tif", "bmp", "avif"):
        files[f"empty/{extension}.{extension}"] = b""
        files[f"zeros/{extension}.{extension}"] = bytes(4096)
        files[f"html/{extension}.{extension}"] = b"<!doctype html><script>alert(1)</script>" * 20
    exact = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with_icc = {"none": b"", "short": exact[:40], "garbage": os.urandom(600), "huge-count": exact[:128] + b"\xff\xff\xff\xff" + exact[132:]}
    for name, profile in with_icc.items():
        buffer = io.BytesIO()
        noise.save(buffer, "PNG", icc_profile=profile)
        files[f"icc/{name}.png"] = buffer.getvalue()
    for name, exif in {
        "nan": b"Exif\0\0" + tiff([(0x011A, 11, 1, 0x7FC00000), (0x0112, 3, 1, 1)]),
        "orientation-99": b"Exif\0\0" + tiff([(0x0112, 3, 1, 99)]),
        "loop": b"Exif\0\0" + tiff([(0x8769, 4, 1, 8)]),
        "far": b"Exif\0\0" + tiff([(0x010E, 2, 0xFFFFFFF0, 0xFFFFFFF0)]),
        "many": b"Exif\0\0II*\0" + struct.pack("<IH", 8, 65535) + bytes(200),
    }.items():
        buffer = io.BytesIO()
        noise.save(buffer, "JPEG", exif=exif)
        files[f"exif/{name}.jpg"] = buffer.getvalue()
    files |= {
        "bomb/header-60000.png": png(chunk(b"IDAT", b""), width=60_000, height=60_000),
        "bomb/header-2-31.png": png(chunk(b"IDAT", b""), width=2**31 - 1, height=2**31 - 1),
        "bomb/zero-wide.png": png(chunk(b"IDAT", b""), width=0),
        "bomb/pixels-8000.png": png(chunk(b"IDAT", rows_of_zeros(8000, 8000)), chunk(b"IEND", b""), width=8000, height=8000),
        "bomb/text.png": png(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**28), 9)), chunk(b"IDAT", rows_of_zeros(40, 40)), chunk(b"IEND", b"")),
        "bomb/icc.png": png(chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**28), 9)), chunk(b"IDAT", rows_of_zeros(40, 40)), chunk(b"IEND", b"")),
        "bomb/more-rows.png": png(chunk(b"IDAT", zlib.compress(bytes(2**28), 9)), chunk(b"IEND", b"")),
        "bomb/chunk-length.png": b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffIHDR" + bytes(100),
        "bomb/interlaced.png": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 1)) + chunk(b"IDAT", b""),
        "bomb/screen.gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0" + struct.pack("<HHB", 65535, 65535, 0) + b"\x02\x02L\x01\0;",
        "bomb/lzw.gif": b"GIF89a"
        + struct.pack("<HHBBB", 40, 40, 0x80, 0, 0)
        + bytes(6)
        + b",\0\0\0\0"
        + struct.pack("<HHB", 40, 40, 0)
        + b"\x0c\xff"
        + b"\xff" * 255
        + b"\0;",
        "bomb/size.tif": tiff([(256, 4, 1, 2**31 - 1), (257, 4, 1, 2**31 - 1), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 9)]),
        "bomb/strips.tif": tiff([(256, 4, 1, 40), (257, 4, 1, 40), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 2**30, 8), (279, 4, 2**30, 8)]),
        "bomb/loop.tif": b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 0) + struct.pack("<I", 8),
        "bomb/size.bmp": b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
        "bomb/negative.bmp": b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, -40, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
        "bomb/size.webp": b"RIFF\xff\xff\xff\xffWEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0\xff\xff\xff\xff\xff\xff",
        "bomb/marker.jpg": b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\x03\x01\x22\0\x02\x11\x01\x03\x11\x01" + b"\xff" * 5000,
        "bomb/tables.jpg": b"\xff\xd8" + b"\xff\xc4\0\x02" * 30_000,
        "script.svg.png": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/hostname"/></svg>',
        "laughs.png": b'<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;">]><svg>&b;</svg>',
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9999 9999\nshowpage\n",
        "program.jpg": b"\x7fELF" + bytes(2000),
        "many-scans.jpg": encoded["JPEG progressive"][:-2] + encoded["JPEG progressive"][600:-2] * 20 + b"\xff\xd9",
    }
    frames = io.BytesIO()
    noise.save(frames, "GIF", save_all=True, append_images=[noise.rotate(turn) for turn in range(1, 60)], duration=10)
    files["animated/sixty.gif"] = frames.getvalue()
    whole = io.BytesIO()
    Image.new("RGB", (10_000, 9_999), (3, 4, 5)).save(whole, "JPEG", quality=5)
    files["huge/hundred-megapixels.jpg"] = whole.getvalue()
    deep = "/".join(["deep"] * 60)
    files[f"{deep}/x.png"] = encoded["PNG"]
    for number, name in enumerate(
        ["caf\u00e9", "\u732b\u732b", "a b\tc", "-rf", "dot.dot.dot", "\u202egnp", "e\u0301", "emoji \U0001f600", "%00", "'\"`$(id)", "CON", "a" * 200]
    ):
        files[f"names/{number}/{name}.png"] = encoded["PNG"]
    return files


CURATES = """
import resource, sys
from pathlib import Path
from selfcascade.config import CurationSettings, StoreSettings
from selfcascade.curation.curate import curate
from selfcascade.storage import Store
source = {"kind": "folder", "path": sys.argv[1], "captions": "file-name"}
settings = CurationSettings(name="hostile", source=source, size=32, filters={"min_side": 32}, shard_inputs=500)
with Store.open(StoreSettings(folder=Path(sys.argv[2]), bucket="tests", prefix=sys.argv[3])) as store:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(curate(settings, store).version)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.timeout(SECONDS + 60)
def test_every_hostile_file_has_a_row_and_the_run_goes_on(pictures, store, store_settings):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)).resize((48, 40), Image.Resampling.BICUBIC)
    files = hostile(noise)
    assert len(files) >= 200
    for name, data in files.items():
        path = pictures.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    outside = pictures.folder.parent / "outside.png"
    outside.write_bytes(pictures.encode(pictures.noise(seed=77)))
    (pictures.folder / "link-to-file.png").symlink_to(outside)
    (pictures.folder / "link-to-itself.png").symlink_to(pictures.folder / "link-to-itself.png")
    (pictures.folder / "link-to-folder").symlink_to(pictures.folder, target_is_directory=True)
    os.mkfifo(pictures.folder / "pipe.png")
    begin = time.monotonic()
    made = subprocess.run(
        [sys.executable, "-c", CURATES, str(pictures.folder), str(store_settings.folder), store_settings.prefix],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
    )
    assert made.returncode == 0, made.stderr[-2000:]
    assert time.monotonic() - begin < SECONDS
    grown = int(made.stdout.split()[1])
    assert grown < CAP_MIB, f"{grown} MiB"
    rows = read_table(resolve(store, "datasets/hostile")).to_pylist()
    found = {row["source"]: row for row in rows}
    assert set(found) == {*files, "link-to-file.png", "link-to-itself.png", "pipe.png"}
    assert all(row["kept"] or row["reason"] for row in rows)
    kinds = {kind_of(row["reason"]) for row in rows if not row["kept"]}
    assert kinds <= {
        "unreadable", "truncated", "damaged", "empty", "mislabelled", "too many pixels", "animated", "duplicate", "blank", "too small", "colour mode",
        "smaller than the target", "16-bit", "CMYK", "caption too short", "too narrow", "no caption",
    }  # fmt: skip
    assert found["link-to-file.png"]["kept"]
    assert all(not row["kept"] for name, row in found.items() if name.startswith(("bomb/", "empty/", "zeros/", "html/", "wrong-name/", "animated/")))
    for name, row in found.items():
        if name.startswith("cut/") and row["kept"]:
            # What ends a few bytes early has all its pixels: only the mark of the end is gone.
            assert len(files[name]) > 0.9 * max(len(data) for other, data in files.items() if other.rpartition("-")[0] == name.rpartition("-")[0]), name
