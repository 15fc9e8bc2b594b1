"""Bytes a second out of the object store through StreamedDataset, beside raw boto3, webdataset's loader and mosaicml-streaming's reader.

The same shards of incompressible pictures lie in one embedded server; every reader hands out every sample once, in one process, as encoded bytes, in key order.
webdataset reads the tars through presigned URLs with its own curl pipe. streaming reads its own format (MDS), written from the same samples, in a process of
its own; it downloads to disk, emptied before each run. Rounds take turns; wall-clock time is compared round by round.

python tests/bench/reading.py [--mib 512] [--rounds 5] [--peer PYTHON] [--out reading.json]

PYTHON is the interpreter of an environment in which mosaicml-streaming is installed; without it that row is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import webdataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.records import Record, write

from selfcascade import StreamedDataset
from selfcascade.config import CurationSettings, StoreSettings
from selfcascade.curation import shards
from selfcascade.curation.record import Entry, Picture
from selfcascade.storage import Artifact, Store

SHARD_MIB, PICTURE_KIB = 64, 256

STREAMING = """
import json, sys, time, shutil
from streaming import MDSWriter, StreamingDataset
import os
what, local, remote = sys.argv[1:4]
if what == "write":
    import tarfile
    with MDSWriter(out=remote, columns={"key": "str", "json": "bytes", "png": "bytes", "txt": "bytes"}, size_limit=64 << 20) as out:
        for name in sys.argv[4:]:
            with tarfile.open(name) as tar:
                sample = {}
                for member in tar:
                    key, _, kind = member.name.rpartition(".")
                    sample[kind] = tar.extractfile(member).read()
                    if kind == "txt":
                        out.write(sample | {"key": key})
                        sample = {}
else:
    shutil.rmtree(local, ignore_errors=True)
    begin = time.perf_counter()
    count = total = 0
    for sample in StreamingDataset(local=local, remote=remote, shuffle=False, batch_size=1):
        count += 1
        total += len(sample["png"])
    print(json.dumps({"seconds": time.perf_counter() - begin, "count": count, "bytes": total}))
"""


def publish(store: Store, mib: int, folder: Path) -> tuple[Artifact, list[Path]]:
    """A dataset of ``mib`` MiB whose pictures are noise; also its tars as files."""
    artifact = Artifact.plan(store, "datasets", "bench", CurationSettings(name="bench", size=256), {"source": "0" * 64})
    random = np.random.default_rng(0)
    each = SHARD_MIB * 1024 // PICTURE_KIB
    paths = []
    with artifact.writing():
        for number in range(mib // SHARD_MIB):
            samples = []
            for place in range(each):
                entry = Entry(f"k{number:04d}{place:05d}", "x.png", 1, "sha256:0", "a picture of noise")
                samples.append((entry, Picture(random.bytes(PICTURE_KIB * 1024), "png", 256, 256, "0" * 64, {}), "train"))
            path = folder / shards.tar_name(number)
            shards.write_tar(path, samples)
            artifact.put(path.name, path)
            artifact.put(shards.table_name(number), shards.table_bytes(path, {}, {entry.key: entry.listed for entry, _, _ in samples}))
            artifact.put(shards.stats_name(number), b"{}")
            paths.append(path)
        artifact.publish(counts={})
    return Artifact(store, artifact.ref), paths


def raw(artifact: Artifact, keys: list[str]) -> int:
    """boto3 alone: whole objects, four side by side."""
    store = artifact.store

    def fetch(key: str) -> int:
        body = store.client.get_object(Bucket=store.bucket, Key=key)["Body"]
        return sum(len(chunk) for chunk in body.iter_chunks(2**20))

    with ThreadPoolExecutor(4) as pool:
        return sum(pool.map(fetch, keys))


def ours(artifact: Artifact) -> int:
    return sum(len(sample["png"]) for sample in StreamedDataset(artifact, split="train", shuffle=False, decode="bytes"))


def theirs(urls: list[str]) -> int:
    dataset = webdataset.WebDataset([f"pipe:curl -s -f -L '{url}'" for url in urls], shardshuffle=False)
    return sum(len(sample["png"]) for sample in dataset)


def timed(run: Callable[[], int], expected: int) -> float:
    begin = time.perf_counter()
    found = run()
    seconds = time.perf_counter() - begin
    assert found >= expected, (found, expected)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, Store.open(StoreSettings(folder=Path(name, "store"))) as store:
        folder = Path(name)
        artifact, paths = publish(store, arguments.mib, folder)
        expected = arguments.mib // SHARD_MIB * (SHARD_MIB * 1024 // PICTURE_KIB) * PICTURE_KIB * 1024
        keys = [artifact.entry(path.name).key for path in paths]
        urls = [store.presign(key) for key in keys]
        readers: dict[str, Callable[[], float]] = {
            "boto3": lambda: timed(lambda: raw(artifact, keys), expected),
            "ours": lambda: timed(lambda: ours(artifact), expected),
            "webdataset": lambda: timed(lambda: theirs(urls), expected),
        }
        if arguments.peer:
            readers["streaming"] = peer(arguments.peer, store, folder, paths)
        seconds: dict[str, list[float]] = {reader: [] for reader in readers}
        for _ in range(arguments.rounds):
            for reader, run in readers.items():
                seconds[reader].append(run())
    rate = {reader: arguments.mib / statistics.median(values) for reader, values in seconds.items()}
    print({reader: f"{value:.0f} MiB/s" for reader, value in rate.items()})
    records = []
    for against, aim in (("boto3", ">= 0.9"), ("webdataset", ">= 1.0"), ("streaming", ">= 1.0")):
        if against not in seconds:
            continue
        ratios = [other / mine for mine, other in zip(seconds["ours"], seconds[against], strict=True)]
        print(against, [f"{ratio:.2f}" for ratio in ratios])
        note = f"{rate['ours']:.0f} against {rate[against]:.0f} MiB/s"
        records.append(Record(f"reading/speed_over_{against}", statistics.median(ratios), "ratio", aim, min(ratios), max(ratios), len(ratios), against, note))
    if arguments.out:
        write(arguments.out, records)


def peer(python: str, store: Store, folder: Path, paths: list[Path]) -> Callable[[], float]:
    """Write the samples as MDS into the store, and the run that reads them."""
    script, remote = folder / "peer.py", f"s3://{store.bucket}/mds"
    script.write_text(STREAMING)
    credentials = json.loads((Path(str(store.settings.folder)) / "credentials.json").read_text())
    variables = os.environ | {
        "AWS_ACCESS_KEY_ID": credentials["access_key"],
        "AWS_SECRET_ACCESS_KEY": credentials["secret_key"],
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "S3_ENDPOINT_URL": store.client.meta.endpoint_url,
    }
    local = folder / "mds-local"
    subprocess.run([python, str(script), "write", str(local), remote, *map(str, paths)], env=variables, check=True, capture_output=True)

    def run() -> float:
        made = subprocess.run([python, str(script), "read", str(local), remote], env=variables, check=True, capture_output=True, text=True)
        return float(json.loads(made.stdout.splitlines()[-1])["seconds"])

    return run


if __name__ == "__main__":
    main()
