"""Small artifacts, and processes that die, for the tests of the store."""

import hashlib
import io
import json
import os
import tarfile
import traceback
from collections.abc import Callable
from datetime import timedelta

import pyarrow as pa
import pyarrow.parquet as pq

from selfcascade.config import CurationSettings
from selfcascade.storage import Artifact, Store

INPUTS = {"source": "ab" * 32}
NOW = timedelta(0)


def planned(store: Store, size: int = 256, name: str = "pics") -> Artifact:
    return Artifact.plan(store, "datasets", name, CurationSettings(name=name, size=size), INPUTS)


def make(artifact: Artifact, units: int = 2, salt: bytes = b"") -> None:
    """A stage in small: per unit data, then a sidecar derived from the adopted data; then the commit."""
    with artifact.writing():
        for unit in range(units):
            if artifact.has(f"{unit:05d}_stats.json"):
                continue
            entry = artifact.put(f"{unit:05d}.tar", b"data %d " % unit + salt)
            artifact.put(f"{unit:05d}_stats.json", json.dumps({"sha256": entry.sha256}).encode())
        artifact.publish(counts={"units": units})


def content(store: Store, prefix: str = "datasets/") -> dict[str, bytes]:
    """Every object below ``prefix`` but the sequence, which counts runs."""
    return {info.key: store.read(info.key) for info in store.list(prefix) if not info.key.endswith(("sequence.json", "latest.json"))}


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked process; the exit status as waitpid gives it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def shard(keys: list[str]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for key in sorted(keys):
            for suffix, data in (("json", b"{}"), ("png", f"picture {key}".encode()), ("txt", key.encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return sink.getvalue()


def table(keys: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"key": keys, "sha256": [hashlib.sha256(f"original {key}".encode()).hexdigest() for key in keys]}), sink)
    return sink.getvalue()


def dataset(store: Store, size: int, *, publish: bool = True) -> Artifact:
    artifact = planned(store, size)
    for unit, keys in enumerate((["cat", "catfish", "dog"], ["emu", "fox"])):
        artifact.put(f"{unit:05d}.tar", shard(keys))
        artifact.put(f"{unit:05d}.parquet", table(keys))
        artifact.put(f"{unit:05d}_stats.json", b'{"kept": 3}')
    if publish:
        artifact.publish(counts={"kept": 5})
    return artifact


def members(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.getnames()
