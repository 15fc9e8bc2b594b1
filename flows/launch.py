"""What a stage command does around its flow: the look ahead, the budget, the servers, a clean end at Ctrl-C, the last words."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack

from selfcascade.config import PipelineSettings
from selfcascade.settings import SettingsError
from selfcascade_flows.server import PrefectServer
from selfcascade_flows.stages import Stage, flow_of

UI = "http://127.0.0.1:4200"
"""Where `make ui` serves."""


def launch(stage: Stage, settings: PipelineSettings, *, dry_run: bool, max_hours: float | None, max_bytes: int | None, debug: bool) -> int:
    """Run one stage, or all with ``run``; show what it would do instead with ``dry_run``.

    Raises:
        SettingsError: what the user must change, or a plan beyond the budget, which is not started.
    """
    if dry_run or max_hours is not None or max_bytes is not None:
        from selfcascade_flows.preview import preview

        look = preview(stage, settings)
        if dry_run:
            print(look.text())
        look.check(max_hours, max_bytes)
        if dry_run:
            return 0
    with PrefectServer() as server, ExitStack() as end:
        from prefect import tags

        from selfcascade_tasks.cluster import is_here
        from selfcascade_tasks.metrics import check_metrics, close_metrics
        from selfcascade_tasks.stage import logged
        from selfcascade_tasks.store import opened
        from selfcascade_tasks.workers import close_workers

        check_metrics(settings.execution)
        end.callback(close_metrics)
        end.callback(close_workers)
        store = opened(settings.store)  # before any flow, so that a wrong key or address ends here in one line
        address = settings.execution.address
        if store.is_embedded and address is not None and not is_here(address):
            raise SettingsError(f"execution.address: the machines of {address} cannot reach the embedded store of this one; set store.endpoint")
        flow, arguments = flow_of(stage, settings)
        _quiet(debug or settings.execution.logs == "json")
        server.wait()
        with tags("selfcascade", settings.name), logged(settings.store, settings.execution):
            state = flow(**arguments, return_state=True)
        run = str(state.state_details.flow_run_id)
        where = f"Prefect UI of this run:  {f'make ui  and open  {UI}' if server.is_ours else _ui()}/runs/flow-run/{run}"
        try:
            result = state.result()
        except SettingsError:
            raise
        except Exception:
            print(where, file=sys.stderr)
            raise
        _told_by(stage)(store, result, run)
        print(where)
    return 0


def _told_by(stage: Stage) -> Callable[..., None]:
    """What prints the result of a stage."""
    from selfcascade_flows import results

    return results.tell_report if stage in ("run", "evaluate") else results.tell_artifact


def _ui() -> str:
    """Where the server of ``PREFECT_API_URL`` has its UI."""
    from prefect.settings import PREFECT_UI_URL

    return str(PREFECT_UI_URL.value() or os.environ["PREFECT_API_URL"].removesuffix("/api"))


def _quiet(debug: bool) -> None:
    """Keep what Prefect says of a failed run off the terminal: the command says it in one line, the UI has the rest."""
    if debug:
        return

    def passes(record: logging.LogRecord) -> bool:
        return not record.name.startswith(("prefect.flow_runs", "prefect.task_runs"))

    for handler in logging.getLogger().handlers:
        handler.addFilter(passes)
