"""Pictures a second and core from a local HTTP server to shards, beside img2dataset: CPU time of the whole process tree for each further picture.

Both fetch the same large JPEGs, crop the centre, resize and write JPEGs of quality 95 into tars. The cost of a picture is the difference between a long and a
short run, so that neither's start counts; runs take turns. The server's own time is nobody's.

python tests/bench/curation.py PHOTOGRAPHS --peer PYTHON [--sizes 1024 2048] [--rounds 3] [--out docs/results/curation.json]

PYTHON is the interpreter of an environment in which img2dataset is installed.
"""

from __future__ import annotations

import argparse
import http.server
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.records import Record, write

SHORT, LONG = 20, 100

OURS = """
import sys
from pathlib import Path
from selfcascade.config import CurationSettings, StoreSettings
from selfcascade.curation.curate import curate
from selfcascade.storage import Store
table, folder, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
source = {"kind": "urls", "path": table, "allow_private": True, "concurrency": 16, "per_host": 16}
settings = CurationSettings(name="bench", source=source, size=size, encoding="jpeg", filters={"max_aspect": 4}, shard_inputs=1000)
with Store.open(StoreSettings(folder=Path(folder))) as store:
    ref = curate(settings, store)
    from selfcascade.storage import Artifact
    print(Artifact(store, ref).manifest().counts["kept"])
"""

PEER = """
import sys
from pathlib import Path
from img2dataset import download
table, folder, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
if __name__ == "__main__":
    Path(folder, "_tmp").mkdir(parents=True)
    download(url_list=table, input_format="parquet", url_col="url", caption_col="caption", output_format="webdataset", output_folder=folder, processes_count=1,
             thread_count=16, image_size=size, resize_mode="center_crop", resize_only_if_bigger=True, encode_format="jpg", encode_quality=95,
             number_sample_per_shard=1000, disallowed_header_directives=[], incremental_mode="incremental")
    import json
    print(sum(json.loads(path.read_text())["successes"] for path in Path(folder).glob("*_stats.json")))
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, the same file under any leading number: ``/17/name.jpg``."""

    protocol_version = "HTTP/1.1"

    def translate_path(self, path: str) -> str:
        return super().translate_path("/" + path.rpartition("/")[2])

    def log_message(self, format: str, *args: object) -> None:
        """No line a request."""


def serve(folder: Path) -> None:
    """In a process of its own, until it is ended; prints its port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    print(server.server_address[1], flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    server.serve_forever()


def cost(python: str, script: str, table: Path, size: int, count: int) -> float:
    """CPU seconds of the process and all that it waited for."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.py")
        path.write_text(script)
        process = subprocess.Popen(
            [python, str(path), str(table), str(Path(folder, "out")), str(size)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=folder
        )
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or int(said.split()[-1]) != count:
            raise SystemExit(f"{python}: {count} pictures were wanted, it said {said[-300:]!r}")
        return usage.ru_utime + usage.ru_stime


def photographs(folder: Path, side: int) -> list[str]:
    """Names of the JPEGs whose shorter side is at least ``side``."""
    found = []
    for path in sorted(folder.glob("*.jp*g")):
        with Image.open(path) as image:
            if min(image.size) >= side and image.mode == "RGB":
                found.append(path.name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.photographs)
    server = subprocess.Popen(
        [sys.executable, __file__, str(arguments.photographs), "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert server.stdout is not None
    port = int(server.stdout.readline())
    records = []
    try:
        for size in arguments.sizes:
            names = photographs(arguments.photographs, size)
            seconds: dict[str, list[float]] = {"ours": [], "img2dataset": []}
            with tempfile.TemporaryDirectory() as folder:
                tables = {}
                for count in (SHORT, LONG):
                    tables[count] = Path(folder, f"{count}.parquet")
                    urls = [f"http://127.0.0.1:{port}/{number}/{names[number % len(names)]}?{number}" for number in range(count)]
                    pq.write_table(pa.table({"url": urls, "caption": [f"picture {number}" for number in range(count)]}), tables[count])
                for _ in range(arguments.rounds):
                    for name, python, script in (("ours", sys.executable, OURS), ("img2dataset", arguments.peer, PEER)):
                        long, short = (cost(python, script, tables[count], size, count) for count in (LONG, SHORT))
                        seconds[name].append((long - short) / (LONG - SHORT))
            rate = {name: 1 / statistics.median(values) for name, values in seconds.items()}
            ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["img2dataset"], strict=True)]
            print(size, {name: f"{value:.2f} pictures a second and core" for name, value in rate.items()}, "ratios", [f"{ratio:.2f}" for ratio in ratios])
            note = f"{rate['ours']:.1f} against {rate['img2dataset']:.1f} pictures a second and core, to {size} pixels"
            against = "img2dataset, one process, 16 threads"
            made = (statistics.median(ratios), "ratio", ">= 2.0", min(ratios), max(ratios), len(ratios), against, note)
            records.append(Record(f"curation/pictures a second and core, to {size} px", *made))
    finally:
        server.kill()
        server.wait()
    if arguments.out:
        write(arguments.out, records)


if __name__ == "__main__":
    main()
