"""Bytes a second out of the object store through StreamedDataset, beside raw boto3, webdataset's loader and mosaicml-streaming's reader.

The same shards of incompressible pictures lie in one embedded server; every reader hands out every sample once, in one process, as encoded bytes, in key order.
webdataset reads the tars through presigned URLs with its own curl pipe. streaming reads its own format (MDS), written from the same samples, in a process of
its own; it downloads to disk, emptied before each run. Rounds take turns; wall-clock time is compared round by round.

python tests/bench/reading.py [--mib 512] [--rounds 5] [--rate 85] [--peer .venv-peers/bin/python] [--out docs/results/reading.json]

mosaicml-streaming runs in the environment of the peers, which `make test-peers` makes; without it that row is left out. ``--rate`` puts nginx, which must be
installed, before the server and lets each connection have so many MiB a second, as S3 does (AWS names 85 to 90 MB/s for one request): loopback alone is
faster than any network, and faster than SHA-256.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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

LIMITED = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
worker_processes 1;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    client_max_body_size 0;
    location / {{
      proxy_pass {target};
      proxy_set_header Host $http_host;
      proxy_http_version 1.1;
      proxy_buffers 64 64k;
      proxy_max_temp_file_size 0;
      limit_rate {rate}m;
    }}
  }}
}}
"""

STREAMING = """
import json, sys, time, shutil
import peers.conftest  # torchvision imports after it
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


@contextlib.contextmanager
def limited(store: Store, folder: Path, rate: float) -> Iterator[Store]:
    """The same store behind nginx, which lets each connection have ``rate`` MiB a second."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    configuration = folder / "nginx.conf"
    configuration.write_text(LIMITED.format(folder=folder, port=port, target=store.client.meta.endpoint_url, rate=round(rate)))
    process = subprocess.Popen(["nginx", "-p", str(folder), "-c", str(configuration), "-g", "user root;"], stderr=subprocess.DEVNULL)
    try:
        keys = keys_of(folder)
        settings = StoreSettings(endpoint=f"http://127.0.0.1:{port}", access_key=keys["access_key"], secret_key=keys["secret_key"], bucket=store.bucket)
        with Store.open(settings, read_only=True) as opened:
            yield opened
    finally:
        process.terminate()
        process.wait()


def measured(artifact: Artifact, folder: Path, paths: list[Path], arguments: argparse.Namespace, link: str) -> list[Record]:
    """Every reader in turn; a record of each that ours is held against."""
    store = artifact.store
    expected = arguments.mib // SHARD_MIB * (SHARD_MIB * 1024 // PICTURE_KIB) * PICTURE_KIB * 1024
    keys = [artifact.entry(path.name).key for path in paths]
    urls = [store.presign(key) for key in keys]
    readers: dict[str, Callable[[], float]] = {
        "boto3": lambda: timed(lambda: raw(artifact, keys), expected),
        "ours": lambda: timed(lambda: ours(artifact), expected),
        "webdataset": lambda: timed(lambda: theirs(urls), expected),
    }
    if arguments.peer:
        readers["streaming"] = peer(arguments.peer, store, folder)
    seconds: dict[str, list[float]] = {reader: [] for reader in readers}
    for _ in range(arguments.rounds):
        for reader, run in readers.items():
            seconds[reader].append(run())
    rate = {reader: arguments.mib / statistics.median(values) for reader, values in seconds.items()}
    print(link, {reader: f"{value:.0f} MiB/s" for reader, value in rate.items()})
    records = []
    for against, aim in (("boto3", ">= 0.9"), ("webdataset", ">= 1.0"), ("streaming", ">= 1.0")):
        if against not in seconds:
            continue
        ratios = [other / mine for mine, other in zip(seconds["ours"], seconds[against], strict=True)]
        print(link, against, [f"{ratio:.2f}" for ratio in ratios])
        note = f"{rate['ours']:.0f} against {rate[against]:.0f} MiB/s"
        records.append(
            Record(f"reading/speed over {against}/{link}", statistics.median(ratios), "ratio", aim, min(ratios), max(ratios), len(ratios), against, note)
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", type=float, help="MiB a second that a connection has, in a second measurement")
    parser.add_argument("--peer")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, Store.open(StoreSettings(folder=Path(name, "store"))) as store:
        folder = Path(name)
        artifact, paths = publish(store, arguments.mib, folder)
        if arguments.peer:
            write_mds(arguments.peer, store, folder, paths)
        records = measured(artifact, folder, paths, arguments, "loopback")
        if arguments.rate:
            with limited(store, folder, arguments.rate) as behind:
                records += measured(Artifact(behind, artifact.ref), folder, paths, arguments, f"{arguments.rate:g} MiB a second for each connection")
    if arguments.out:
        write(arguments.out, records)


def keys_of(folder: Path) -> dict[str, str]:
    """Those of the embedded store in ``folder``."""
    found: dict[str, str] = json.loads((folder / "store/credentials.json").read_text())
    return found


def peer_variables(store: Store, folder: Path) -> dict[str, str]:
    """Where streaming finds the store."""
    keys = keys_of(folder)
    return os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "AWS_ACCESS_KEY_ID": keys["access_key"],
        "AWS_SECRET_ACCESS_KEY": keys["secret_key"],
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "S3_ENDPOINT_URL": store.client.meta.endpoint_url,
    }


def write_mds(python: str, store: Store, folder: Path, paths: list[Path]) -> None:
    """Write the samples as MDS into the store."""
    script = folder / "peer.py"
    script.write_text(STREAMING)
    variables = peer_variables(store, folder)
    local, remote = str(folder / "mds-local"), f"s3://{store.bucket}/mds"
    subprocess.run([python, str(script), "write", local, remote, *map(str, paths)], env=variables, check=True, capture_output=True)


def peer(python: str, store: Store, folder: Path) -> Callable[[], float]:
    """The run of streaming that reads what :func:`write_mds` wrote."""
    variables = peer_variables(store, folder)
    command = [python, str(folder / "peer.py"), "read", str(folder / "mds-local"), f"s3://{store.bucket}/mds"]

    def run() -> float:
        made = subprocess.run(command, env=variables, check=True, capture_output=True, text=True)
        return float(json.loads(made.stdout.splitlines()[-1])["seconds"])

    return run


if __name__ == "__main__":
    main()
