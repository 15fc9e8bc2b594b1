"""The gate: a report that is worse than another by more than is allowed, and by more than chance, ends its run as failed."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from selfcascade.config import GateSettings
from selfcascade.evaluation.intervals import Interval
from selfcascade.evaluation.report import heading, shown_number
from selfcascade.evaluation.results import NAMED, Metric, Number, Results
from selfcascade.settings import SettingsError

log = logging.getLogger(__name__)


class GateFailed(Exception):
    """A metric is worse than the gate allows; the message names each. The report itself is published."""


@dataclass(frozen=True, slots=True)
class Breach:
    """One number that is worse than it was."""

    label: str
    metric: Metric
    before: Number
    after: Number
    allowed: float

    def __str__(self) -> str:
        values = [shown_number(number.value or 0.0, self.metric) for number in (self.before, self.after)]
        return f"{heading(self.metric)} of {self.label} went from {values[0]} to {values[1]}, allowed are {self.allowed * self.metric.scale:g}"


def check_gate(settings: GateSettings, before: Results, after: Results) -> None:
    """Compare the rows that both reports have.

    A number fails if it is worse by more than ``settings.worse`` allows, and if the 95 % interval of the change, the two taken as independent, does not
    reach what is allowed. Where an error is unknown the value alone decides.

    Raises:
        GateFailed: at least one does.
        SettingsError: the two cannot be compared, or have no method in common; says why.
    """
    why = before.incomparable(after)
    if why:
        raise SettingsError(f"evaluation.gate.against: {why}")
    breaches = breaches_of(settings, before, after)
    for breach in breaches:
        log.error("%s", breach)
    if breaches:
        raise GateFailed(f"{after.name} is worse than {settings.against}: " + "; ".join(map(str, breaches)))


def breaches_of(settings: GateSettings, before: Results, after: Results) -> list[Breach]:
    """Every number that is worse than allowed, in the order of the table."""
    earlier = {row.label: row for row in before.rows}
    found = []
    for row in after.rows:
        if row.label not in earlier:
            continue
        for name, allowed in settings.worse.items():
            metric, one, two = NAMED[name], earlier[row.label].numbers.get(name, Number()), row.numbers.get(name, Number())
            if one.value is None or two.value is None:
                continue
            change = (two.value - one.value) * (-1 if metric.better == "higher" else 1)
            error = 0.0 if one.error is None or two.error is None else math.hypot(one.error, two.error)
            if Interval(change - allowed, error).low > 0:
                found.append(Breach(row.label, metric, one, two, allowed))
    return found
