"""A stage has so many tasks under way and no more, and none begins after a failure; on a real server."""

import json
import subprocess
import sys

from conftest import environment

SCRIPT = """
import json, threading, time
from selfcascade_flows.server import PrefectServer

with PrefectServer() as server:
    from prefect import flow, task
    from selfcascade_tasks.progress import StageProgress
    from selfcascade_tasks.record import StageCost, UnitCost
    from selfcascade_tasks.stage import StageRun

    server.wait()
    lock, under_way, most, begun, failed = threading.Lock(), 0, 0, [], threading.Event()

    @task
    def unit(number, fails):
        global under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
            begun.append(number)
        time.sleep(0.05)
        if 0 <= fails < number:
            failed.wait(120)
        with lock:
            under_way -= 1
        if number == fails:
            raise ValueError("boom")
        return UnitCost(unit=number, work=1, seconds=1, cpu_seconds=1, peak_bytes=1, tiers=("fast", "lean"))

    @flow
    def stage(count, fails):
        drawn = 0
        def units():
            nonlocal drawn
            for number in range(count):
                drawn += 1
                future = unit.submit(number, fails)
                yield future
                if number == fails:
                    future.add_done_callback(lambda _: failed.set())  # after the stage's own callback
        cost = StageCost(stage="generate", name="x")
        with StageProgress("generate", "x", start=0, total=2 * count) as progress:
            try:
                StageRun(cost, progress, window=3).wait(units())
            finally:
                print(json.dumps({"most": most, "begun": len(begun), "drawn": drawn, "done": cost.done, "tiers": cost.tiers}), flush=True)

    stage(20, -1)
    begun.clear()
    stage(20, 4, return_state=True)
"""


def test_units_are_submitted_as_others_end_and_none_after_a_failure(tmp_path):
    """Window 3: of twenty units never more than three are under way; when the fifth fails its neighbours in the window have begun at most.

    Units behind the failing one end after it, so that the order does not hang on the machine's load.
    """
    made = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    whole, failed = (json.loads(line) for line in made.stdout.splitlines() if line.startswith("{"))
    assert whole == {"most": 3, "begun": 20, "drawn": 20, "done": 40, "tiers": {"fast": 20, "lean": 20}}, made.stderr[-2000:]
    assert failed["drawn"] <= 7
    assert failed["begun"] <= 7
