"""Generation at scale: planning by number of prompts, what orchestration costs, how long the device waits, and two processes against one.

Planning runs in a process of its own: seconds, and the peak of resident memory over what the process held after it had planned two prompts. A run under
Prefect (the flow `generate`, its server running) alternates with the same library calls from a plain process pool, on equal settings and new names. The device
waits whenever the process that samples is between two batches, from the first one to the last; on a CPU it is the one core of torch's thread. All sample with
the shipped base at four times its pixels.

python tests/bench/operations.py [--only planning] [--rounds 3] [--chunks 8] [--chunk 16] [--out operations.json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.records import Record, table, write

from selfcascade.config import CascadeSettings, ExecutionSettings, GenerationSettings, Method, PromptSettings, StoreSettings
from selfcascade.generation.generate import GenerationPlan, generate_units, part_of, plan_generation, publish_generation
from selfcascade.storage import Store

COUNTS = (10_000, 100_000, 1_000_000)
WORDS = ("red", "blue", "apple", "cat", "house", "sun", "on", "with", "two", "green", "dog", "tree")


def prompt_file(folder: Path, count: int) -> Path:
    """Different prompts of a dozen words."""
    path = folder / f"{count}.txt"
    if not path.exists():
        with path.open("w") as file:
            for number in range(count):
                file.write(f"{number} " + " ".join(WORDS[number // 12**place % 12] for place in range(11)) + "\n")
    return path


def settings(folder: Path, name: str, arguments: argparse.Namespace, *, method: Method = "direct", seed: int = 0) -> GenerationSettings:
    """``chunks`` units of ``chunk`` samples, 256 px, one thread; direct sampling leaves no latents behind that a second run would find."""
    prompts = PromptSettings(file=prompt_file(folder, arguments.chunks * arguments.chunk))
    cascade = CascadeSettings(height=256, width=256, steps=arguments.steps)
    return GenerationSettings(name=name, method=method, prompts=prompts, cascade=cascade, seed=seed, chunk=arguments.chunk, batch=min(16, arguments.chunk))


def summary(name: str, values: list[float], unit: str, aim: str, against: str, note: str = "") -> Record:
    return Record(f"operations/{name}", statistics.median(values), unit, aim, min(values), max(values), len(values), against, note)


def planning(store: Store, folder: Path, arguments: argparse.Namespace) -> list[Record]:
    records = []
    for count in COUNTS:
        path = prompt_file(folder, count)
        words = [sys.executable, __file__, "--plan", str(path), str(store.settings.folder)]
        runs = [json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1]) for _ in range(arguments.rounds)]
        most = count == COUNTS[-1]
        note = f"imports and a plan of two prompts before it: {statistics.median(run['before'] for run in runs):.0f} MiB"
        records.append(summary(f"planning/{count}/seconds", [run["seconds"] for run in runs], "s", "< 60" if most else "", f"{count:,} prompts of a text file"))
        records.append(
            summary(f"planning/{count}/memory", [run["more"] for run in runs], "MiB", "< 200" if most else "", f"{count:,} prompts of a text file", note)
        )
    return records


def plan_alone(path: Path, store_folder: Path) -> None:
    """In a process of its own: plan, and print seconds and memory."""
    few = path.with_name("few.txt")
    few.write_text("a\nb\n")
    with Store.open(StoreSettings(folder=store_folder)) as store:
        plan_generation(GenerationSettings(prompts=PromptSettings(file=few)), store)
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        started = time.perf_counter()
        plan_generation(GenerationSettings(prompts=PromptSettings(file=path)), store)
        print(json.dumps({"seconds": time.perf_counter() - started, "before": before, "more": _memory("VmHWM") - before}))


def _memory(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def unit(run: GenerationSettings, store: StoreSettings, part: GenerationPlan) -> int:
    with Store.open(store) as opened:
        return sum(report.count for report in generate_units(run, opened, part, tuple(part.chunks), "cpu"))


def orchestration(store: Store, folder: Path, arguments: argparse.Namespace) -> list[Record]:
    """The flow over plain calls."""
    from selfcascade_flows.server import PrefectServer

    execution = ExecutionSettings(workers=arguments.workers, device="cpu")

    def plain(name: str) -> None:
        run = settings(folder, name, arguments)
        plan = plan_generation(run, store)
        with ProcessPoolExecutor(execution.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            parts = [part_of(run, store, plan, [index]) for index in plan.todo]
            assert sum(pool.map(unit, [run] * len(parts), [store.settings] * len(parts), parts)) == plan.samples
        publish_generation(run, store, plan)

    with PrefectServer() as server:
        from selfcascade_flows.generate import generate
        from selfcascade_tasks.workers import close_workers

        server.wait()

        def flow(name: str) -> None:
            generate(settings(folder, name, arguments), store.settings, execution)
            close_workers()

        seconds: dict[str, list[float]] = {"plain": [], "flow": []}
        for turn in range(arguments.rounds + 1):
            for name, run in [("plain", plain), ("flow", flow)][:: 1 if turn % 2 else -1]:
                value = timed(lambda name=name, run=run, turn=turn: run(f"{name}-{turn}"))  # type: ignore[misc]
                if turn:  # the first round warms up
                    seconds[name].append(value)
    ratios = [flow / plain for flow, plain in zip(seconds["flow"], seconds["plain"], strict=True)]
    note = f"{arguments.chunks} units of {arguments.chunk} samples, {execution.workers} workers, {statistics.median(seconds['plain']):.0f} s"
    return [summary("orchestration", ratios, "ratio", "<= 1.05", "the same library calls from a process pool", note)]


@contextmanager
def watched() -> Iterator[list[tuple[float, float]]]:
    """Begin and end of all that the device is asked to compute."""
    from selfcascade.generation import sampling

    spans: list[tuple[float, float]] = []
    fitting = sampling.fitting

    def noted(*given: Any) -> Any:
        begun = time.perf_counter()
        try:
            return fitting(*given)
        finally:
            spans.append((begun, time.perf_counter()))

    sampling.fitting = noted  # type: ignore[assignment]
    try:
        yield spans
    finally:
        sampling.fitting = fitting


def idle(store: Store, folder: Path, arguments: argparse.Namespace) -> list[Record]:
    """Share of the time in which the device waits, with and without overlap."""
    from selfcascade.generation import samples

    def share(name: str, seed: int, size: int) -> float:
        run = settings(folder, name, arguments, method="tuning-free", seed=seed)
        plan = plan_generation(run, store)
        with watched() as spans:
            for start in range(0, plan.units, size):
                generate_units(run, store, plan, plan.todo[start : start + size], "cpu")
        return 100 * (1 - sum(end - begun for begun, end in spans) / (spans[-1][1] - spans[0][0]))

    shares: dict[str, list[float]] = {"overlapped": [], "one after another": []}
    mapped = samples.mapped
    for turn in range(arguments.rounds):
        shares["overlapped"].append(share(f"overlapped-{turn}", 2 * turn, 4))
        samples.mapped = lambda function, items, **_: map(function, items)  # type: ignore[assignment]
        try:
            shares["one after another"].append(share(f"serial-{turn}", 2 * turn + 1, 1))
        finally:
            samples.mapped = mapped
    note = f"tuning-free, batches of {min(16, arguments.chunk)}, a store on this machine"
    return [
        summary(f"device idle/{name}", values, "%", "< 3" if name == "overlapped" else "", "time from the first batch to the last", note)
        for name, values in shares.items()
    ]


def processes(store: Store, folder: Path, arguments: argparse.Namespace) -> list[Record]:
    """One worker process over two, each with a thread of its own; they have loaded the base before."""
    from selfcascade_tasks.workers import Workers

    def seconds(count: int, name: str) -> float:
        workers = Workers(count)
        warm = settings(folder, f"warm-{name}", arguments)
        warm_plan, run = plan_generation(warm, store), settings(folder, name, arguments, seed=1)
        plan = plan_generation(run, store)

        def one(run: GenerationSettings, part: GenerationPlan) -> int:
            return workers.run(unit, run, store.settings, part).value

        try:
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(lambda index: one(warm, part_of(warm, store, warm_plan, [index])), warm_plan.todo[:count]))
                return timed(lambda: list(pool.map(lambda index: one(run, part_of(run, store, plan, [index])), plan.todo)))
        finally:
            workers.close()

    ratios = []
    for turn in range(arguments.rounds):
        found = {count: seconds(count, f"processes-{count}-{turn}") for count in ((1, 2) if turn % 2 else (2, 1))}
        ratios.append(found[1] / found[2])
    note = f"{arguments.chunks} units of {arguments.chunk} samples"
    return [summary("two processes over one", ratios, "ratio", ">= 1.7", "one process, a thread each", note)]


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


PARTS = {"planning": planning, "orchestration": orchestration, "idle": idle, "processes": processes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("operations.json"))
    parser.add_argument("--plan", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plan:
        plan_alone(*arguments.plan)
        return
    out = arguments.out.resolve()
    with tempfile.TemporaryDirectory(prefix="selfcascade-") as name:
        os.chdir(name)  # the Prefect server of the flow keeps its database here
        with Store.open(StoreSettings(folder=Path(name, "store"))) as store:
            for part in arguments.only or PARTS:
                records = PARTS[part](store, Path(name), arguments)
                write(out, records)
                print(table(records), flush=True)


if __name__ == "__main__":
    main()
