"""The look ahead: what a command would do, what of it is done, how many bytes and how long. Writes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from selfcascade.config import PipelineSettings
from selfcascade.settings import SettingsError
from selfcascade.storage import Store
from selfcascade_flows import rates
from selfcascade_flows.configuration import dump
from selfcascade_flows.outlook import Step, steps_of
from selfcascade_flows.store_commands import readable
from selfcascade_tasks.record import earlier_costs


@dataclass(frozen=True)
class Preview:
    """Every step of a command with the seconds that it is expected to take, None where nobody knows."""

    settings: PipelineSettings
    steps: tuple[tuple[Step, float | None], ...]

    @property
    def seconds(self) -> float | None:
        """Of all that is left; None when a part of it is unknown."""
        known = [seconds for _, seconds in self.steps if seconds is not None]
        return sum(known) if len(known) == len(self.steps) else None

    @property
    def bytes(self) -> int:
        """Of what is left, so far as they are known."""
        return sum(step.bytes or 0 for step, _ in self.steps)

    def text(self) -> str:
        """Resolved settings, then a line for each step."""
        rows = [("stage", "artifact", "units", "finished", "bytes", "time")]
        for step, seconds in self.steps:
            state = "published" if step.published else str(step.done)
            rows.append((step.stage, step.address or f"{step.name} (an input is not made yet)", str(step.units), state, _bytes(step.bytes), _time(seconds)))
        rows.append(("all", "", "", "", _bytes(self.bytes), _time(self.seconds)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([dump(self.settings), *lines, "", f"Bytes and time are estimates of what is left, times by {rates.SOURCE}. Nothing was written."])

    def check(self, max_hours: float | None, max_bytes: int | None) -> None:
        """Hold the plan against a budget.

        Raises:
            SettingsError: it exceeds the budget, or hours are limited and the time is unknown.
        """
        if max_hours is not None:
            if self.seconds is None:
                raise SettingsError(f"--max-hours {max_hours:g}: the time is unknown before a first run; run a smaller one, or leave the option out")
            if self.seconds > max_hours * 3600:
                raise SettingsError(f"the plan takes about {_time(self.seconds)}, more than --max-hours {max_hours:g}; ask for less or raise it")
        if max_bytes is not None and self.bytes > max_bytes:
            raise SettingsError(f"the plan stores about {_bytes(self.bytes)}, more than --max-bytes {max_bytes}; ask for less or raise it")


def preview(stage: str, run: PipelineSettings) -> Preview:
    """What ``selfcascade <stage>`` would do.

    Raises:
        SettingsError: what the command itself would refuse.
    """
    with Store.open(run.store, read_only=True) as store:
        costs = earlier_costs(store)
        steps = [(step, rates.seconds_of(step, run, costs)) for step in steps_of(stage, run, store)]
    return Preview(run, tuple(steps))


def _bytes(size: int | None) -> str:
    return "unknown" if size is None else readable(size)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
