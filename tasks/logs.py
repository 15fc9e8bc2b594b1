"""Log lines for machines: one JSON object a line on standard error, with run, stage, artifact and unit, and without secrets."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from pydantic import SecretStr
from pythonjsonlogger.json import JsonFormatter

from selfcascade_tasks.scope import scope

log = logging.getLogger("selfcascade")
OURS = ("selfcascade", "selfcascade_tasks", "selfcascade_flows")
KEPT = ("seconds", "work", "done", "total", "state")
"""Numbers and words that a line may say apart from its message; seconds are of wall time, work is counted as in a unit's cost."""
VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "OTEL_EXPORTER_OTLP_METRICS_HEADERS",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_API_KEY",
)
"""Variables whose values are secrets."""
HIDDEN = "***"
_IN_URLS = re.compile(r"(?<=://)[^\s/@\"]+:[^\s/@\"]+(?=@)|(?<=X-Amz-Signature=)\w+|(?<=X-Amz-Credential=)[\w%/-]+|(?<=X-Amz-Security-Token=)[\w%+/=-]+")


class Lines(JsonFormatter):
    """A record as one line of JSON: time, level, logger, message; what it belongs to, as far as that is known; the error with its traceback."""

    def __init__(self) -> None:
        super().__init__(json_ensure_ascii=False)

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """What the line holds, in order. ``log_data`` is the message, what the record has beside it, and the traceback of its error."""
        at = scope()
        kept = {name: log_data.get(name) for name in KEPT}
        kept["unit"] = log_data.get("unit") or at.unit
        where = {
            "run": at.run or log_data.get("flow_run_id"),
            "flow": at.flow or log_data.get("flow_run_name"),
            "stage": at.stage,
            "artifact": at.artifact,
            "task": log_data.get("task_run_name"),
        }
        said = {name: log_data.get(name) for name in ("time", "level", "logger", "message")}
        found = said | where | kept | {"process": log_data.get("process"), "error": log_data.get("exc_info")}
        return {name: value for name, value in found.items() if value not in (None, "")}

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        """The record's own fields under the names that lines have."""
        super().add_fields(log_data, record, message_dict)
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        log_data |= {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage(), "process": record.process}

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return redacted(super().format(record), scope().secrets)


def redacted(line: str, secrets: Iterable[SecretStr]) -> str:
    """``line``, of JSON, without ``secrets``, values of :data:`VARIABLES`, and what in a URL opens what it names."""
    values = [secret.get_secret_value() for secret in secrets] + [os.environ.get(name, "") for name in VARIABLES]
    for value in sorted(filter(None, values), key=len, reverse=True):
        line = line.replace(json.dumps(value, ensure_ascii=False)[1:-1], HIDDEN)
    return _IN_URLS.sub(HIDDEN, line)


def begin_lines() -> None:
    """From now on this process writes lines of JSON, if its scope says so: ours from INFO on, those of Prefect's runs, warnings of everybody else."""
    root = logging.getLogger()
    if scope().logs != "json" or any(isinstance(handler.formatter, Lines) for handler in root.handlers):
        return
    for handler in [*root.handlers]:
        if isinstance(handler, logging.StreamHandler) and getattr(handler, "stream", None) in (sys.stderr, sys.__stderr__):
            root.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    root.addHandler(handler)
    logging.captureWarnings(True)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)


def say(text: str, level: int = logging.INFO, **fields: object) -> None:
    """A line for whoever watches standard error: as it is, or where lines are JSON as a record with ``fields``, which are of :data:`KEPT`."""
    if scope().logs == "json":
        log.log(level, "%s", text, extra=fields)
    else:
        print(text, file=sys.stderr, flush=True)
