"""CPU seconds of an evaluation (FID, KID, the same of patches, precision and recall) beside torch-fidelity, torchmetrics, and the bare passes of the network.

Two folders of PNG of 1024 px, two patches of 64 px a picture, one thread, everything in one process from the files to the numbers, in turns. Time is that of
the processor, so that other work on the machine does not enter it; over the bare network by the clock too, which tells whether it waits for pictures. Ours
makes what a report holds, with errors by half-samples, spectra and objects, which the others do not; torchmetrics is called as its documentation shows, a
metric for each of the four distances, and has no precision and recall. Both peers are given the patches as tensors. With ``--network inception-v3``
torch-fidelity and torchmetrics run their own Inception-v3 on the same weights, else all run the network that the wheel brings. Memory is the growth
of this process's peak from few pictures to many through ``selfcascade evaluate SET SET``'s reader.

.venv-peers/bin/python tests/bench/evaluation.py [--pictures 32] [--rounds 3] [--network efficientnet-lite0] [--out evaluation.json]

`make test-peers` makes that environment.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))
import peers.conftest  # noqa: F401  # torchvision imports after it
from bench.records import Record, table, write
from inception_weights import save_inception, save_pictures

from selfcascade.config import EvaluationSettings, FeatureSettings
from selfcascade.curation.ahead import PICTURES, mapped
from selfcascade.evaluation.crops import crop_corners, cut
from selfcascade.evaluation.features import as_batch, load_features
from selfcascade.evaluation.metrics import measure
from selfcascade.evaluation.networks.network import FeatureNetwork
from selfcascade.evaluation.sets import PictureSet
from selfcascade.evaluation.tables import CropPlan, Extraction, Look, Picture
from selfcascade.storage import ArtifactRef

SIDE, PATCH, PATCHES, BATCH, SUBSET = 1024, 64, 2, 16, 16


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def opened(folder: Path) -> Iterator[NDArray[np.uint8]]:
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            yield np.asarray(image.convert("RGB"))


def patches(rank: int, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return cut(image, crop_corners(rank, size=(SIDE, SIDE), side=PATCH, count=PATCHES, seed=0), PATCH)


def seen(extraction: Extraction, numbered: tuple[int, Path]) -> Look:
    number, path = numbered
    with Image.open(path) as image:
        return extraction.look(number, Picture(f"{number:05d}", f"{number:05d}", np.asarray(image.convert("RGB"))))


def ours(settings: EvaluationSettings, network: FeatureNetwork, folders: tuple[Path, Path]) -> None:
    """From the pictures to the rows of a report; threads look at pictures while the network is at others."""
    tables = {}
    for label, folder in zip(("real", "tuned"), folders, strict=True):
        plan = CropPlan((SIDE, SIDE), PATCH, PATCHES, seed=0)
        extraction = Extraction(network, small=(128, 128), crops=plan, batch=BATCH)
        for look in mapped(partial(seen, extraction), enumerate(sorted(folder.iterdir())), ahead=PICTURES):
            extraction.take(look)
        tables[label] = extraction.result()
    count = len(tables["real"])
    sets = [
        PictureSet(label=label, method=label, ref=ArtifactRef(kind="samples", name=label, version="0" * 64, uri="s3://x"), height=SIDE, width=SIDE, count=count)
        for label in tables
    ]
    rows = measure(settings, sets, tables).rows
    assert all(rows[0].numbers[name].error is not None for name in ("kid_r", "fid_r", "pkid_r", "pfid_r"))


def bare(network: FeatureNetwork, pictures: int) -> None:
    """The passes alone, of pictures that have the network's size already."""
    batch = torch.rand(BATCH, 3, network.kind.side, network.kind.side) * 255
    for _ in range(2 * pictures * (1 + PATCHES) // BATCH):
        network.embed(batch)


class Patches(Dataset[Tensor]):
    """Of a folder, in memory: (3, 64, 64) uint8 each."""

    def __init__(self, folder: Path) -> None:
        self.found = [torch.from_numpy(each).permute(2, 0, 1) for rank, image in enumerate(opened(folder)) for each in patches(rank, image)]

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: int) -> Tensor:
        return self.found[index]


def fidelity(folders: tuple[Path, Path], options: dict[str, object]) -> None:
    import torch_fidelity

    for inputs, shares in ((tuple(map(str, folders)), True), (tuple(map(Patches, folders)), False)):
        torch_fidelity.calculate_metrics(
            input1=inputs[1], input2=inputs[0], cuda=False, fid=True, kid=True, prc=shares, kid_subset_size=SUBSET,
            batch_size=BATCH, cache=False, save_cpu_ram=True, verbose=False, **options,
        )  # fmt: skip


def torchmetrics(folders: tuple[Path, Path], distances: Callable[[], tuple[nn.Module, nn.Module]]) -> None:
    whole, cropped = distances(), distances()
    for folder, real in zip(folders, (True, False), strict=True):
        images = list(enumerate(opened(folder)))
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            batches = (as_batch([image for _, image in part]), as_batch([each for rank, image in part for each in patches(rank, image)]))
            for metrics, batch in zip((whole, cropped), batches, strict=True):
                for metric in metrics:
                    metric.update(batch, real=real)
    for metric in (*whole, *cropped):
        metric.compute()


def peers_of(network: FeatureNetwork, weights: Path | None, folders: tuple[Path, Path]) -> dict[str, Callable[[], None]]:
    """Both peers on the network: their own Inception-v3 where there are ``weights`` for it."""
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
    from torchmetrics.image.kid import KernelInceptionDistance

    class Given(FeatureExtractorBase):
        """The network under torch-fidelity's interface."""

        def __init__(self, name: str, features_list: list[str], **_: object) -> None:
            super().__init__(name, features_list)
            self.network = network

        def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
            return (self.network(pictures).clone(),)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("all",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "all"

    if weights is None:
        torch_fidelity.register_feature_extractor("given", Given)
        options: dict[str, object] = {"feature_extractor": "given"}
        feature: nn.Module = network
    else:
        options = {"feature_extractor": "inception-v3-compat", "feature_extractor_weights_path": str(weights)}
        feature = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
        feature.num_features = 2048

    def distances() -> tuple[nn.Module, nn.Module]:
        return FrechetInceptionDistance(feature=feature), KernelInceptionDistance(feature=feature, subset_size=SUBSET)

    return {"torch-fidelity": lambda: fidelity(folders, options), "torchmetrics": lambda: torchmetrics(folders, distances)}


MEMORY = """
import sys
from pathlib import Path
import torch
from torch import nn
from selfcascade.config import EvaluationSettings
from selfcascade.evaluation.feature_cache import FeatureCache
from selfcascade.evaluation.measured_side import SideMeasuring
from selfcascade.evaluation.networks.network import FeatureNetwork, NetworkKind
from selfcascade.evaluation.sides import read_side
torch.set_num_threads(1)
class Means(nn.Module):
    def forward(self, pictures):
        return nn.functional.adaptive_avg_pool2d(pictures, (26, 26)).flatten(1)[:, :256].clone()
network = FeatureNetwork(NetworkKind("means", 256, 299, "", ""), Means())
settings = EvaluationSettings()
measuring = SideMeasuring(settings, network, {}, device="cpu", cache=FeatureCache(Path(sys.argv[1], ".cache")))
read_side(sys.argv[1], settings, measuring, {}, lambda: None, ())
# Not ru_maxrss, which a child takes over from the process that started it.
print(next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


def peak(folder: Path) -> float:
    """MiB of a process that reads a side."""
    return float(subprocess.run([sys.executable, "-c", MEMORY, str(folder)], check=True, capture_output=True, text=True).stdout)


def memory(home: Path, few: int, many: int) -> Record:
    """Growth a picture, in MiB; a picture takes 3 of them decoded. The pictures are 64, again and again under further names."""
    paths = sorted(save_pictures(home / "memory", 64, seed=0, side=SIDE, coarse=24).iterdir())
    peaks = []
    for first, count in ((64, few), (few, many)):
        for number in range(first, count):
            (home / "memory" / f"{number:05d}.png").symlink_to(paths[number % 64])
        peaks.append(peak(home / "memory"))
    growth = (peaks[1] - peaks[0]) / (many - few)
    note = f"{few} to {many} pictures of {SIDE} px, 3 MiB each; {peaks[0]:.0f} and {peaks[1]:.0f} MiB"
    return Record("evaluation/MiB_a_picture", growth, "MiB", "<= 0.1", growth, growth, 1, f"{few} pictures", note)


def compared(settings: EvaluationSettings, folders: tuple[Path, Path], pictures: int, rounds: int) -> list[Record]:
    chosen = settings.features
    network = load_features(chosen)
    sides = {"bare": lambda: bare(network, pictures), "ours": lambda: ours(settings, network, folders)} | peers_of(network, chosen.weights, folders)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    clock: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name, run in sides.items():
            before, begin = cpu_seconds(), time.perf_counter()
            run()
            seconds[name].append(cpu_seconds() - before)
            clock[name].append(time.perf_counter() - begin)
            print(f"{turn} {name}: {seconds[name][-1]:.1f} s, {clock[name][-1]:.1f} s by the clock", flush=True)
    waits = [mine / bare for mine, bare in zip(clock["ours"], clock["bare"], strict=True)]
    note = f"{2 * pictures} pictures of {SIDE} px, {os.cpu_count()} cores; both networks on one thread, threads beside ours look at the pictures"
    figure = f"evaluation/{chosen.network}/over_bare_network_by_the_clock"
    records = [Record(figure, statistics.median(waits), "ratio", "<= 1.1", min(waits), max(waits), rounds, "the network's passes alone", note)]
    for name, aim in (("torch-fidelity", ">= 1.3"), ("torchmetrics", ">= 1.3"), ("bare", "<= 1.1")):
        over = [(mine / other if name == "bare" else other / mine) for mine, other in zip(seconds["ours"], seconds[name], strict=True)]
        figure = "over_bare_network" if name == "bare" else f"faster_than_{name}"
        medians = " and ".join(f"{1000 * statistics.median(seconds[side]) / (2 * pictures):.0f} ms {side}" for side in ("ours", name))
        note = f"{2 * pictures} pictures of {SIDE} px; a picture: {medians}"
        against = "the network's passes alone" if name == "bare" else name
        records.append(Record(f"evaluation/{chosen.network}/{figure}", statistics.median(over), "ratio", aim, min(over), max(over), rounds, against, note))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=32, help="of each of the two sets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--network", choices=["efficientnet-lite0", "inception-v3", "none"], default="efficientnet-lite0", help="none: memory alone")
    parser.add_argument("--memory", type=int, default=1024, help="pictures of the larger set, beside a quarter of them; 0 leaves memory out")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer.*")
    records = []
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        if arguments.network != "none":
            weights = save_inception(home / "inception.pth") if arguments.network == "inception-v3" else None
            chosen = EvaluationSettings(
                features=FeatureSettings(network=arguments.network, weights=weights, batch=BATCH), crop=PATCH, crops_per_image=PATCHES, kid_subset=SUBSET
            )
            folders = (
                save_pictures(home / "real", arguments.pictures, seed=0, side=SIDE, coarse=24, noise=3),
                save_pictures(home / "generated", arguments.pictures, seed=10_000, side=SIDE, coarse=20, noise=4),
            )
            records += compared(chosen, folders, arguments.pictures, arguments.rounds)
        if arguments.memory:
            records.append(memory(home, arguments.memory // 4, arguments.memory))
    print(table(records))
    if arguments.out:
        write(arguments.out, records)


if __name__ == "__main__":
    main()
