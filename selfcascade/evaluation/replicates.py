"""What the half-samples of a report said: the small file from which any two of its methods, and those of reports on the same prompts, can be compared."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from selfcascade.evaluation.intervals import standard_error
from selfcascade.evaluation.results import METRICS, Difference

_SCHEMA = pa.schema([("label", pa.string()), ("metric", pa.string()), ("value", pa.float64()), ("replicates", pa.list_(pa.float64()))])
_PROMPTS = b"prompts"


@dataclass(frozen=True, slots=True)
class Replicates:
    """Of every method and metric: the value over all pictures, and those of the half-samples, which are of the same prompts for every method.

    Two reports of equal settings draw the same halves of equally many prompts and real pictures, so what they say may be joined where the prompts are the same.
    """

    prompts: int
    values: Mapping[str, Mapping[str, float]]
    """By label and metric. KID's is over all pairs, not over drawn subsets."""
    drawn: Mapping[str, Mapping[str, Tensor]]
    """By label and metric, (half-samples,) float64; a metric without errors has none."""

    def joined(self, other: Replicates) -> Replicates:
        """With the methods of ``other``; one that both have is taken from here.

        Raises:
            ValueError: the counts of prompts differ.
        """
        if self.prompts != other.prompts:
            raise ValueError(f"half-samples of {self.prompts} and of {other.prompts} prompts cannot be paired")
        return Replicates(self.prompts, {**other.values, **self.values}, {**other.drawn, **self.drawn})

    def difference(self, first: str, second: str, metric: str) -> Difference | None:
        """``second`` minus ``first``, with the error of a paired difference where both were halved; None where one of them has no such number."""
        one, two = (self.values.get(label, {}).get(metric) for label in (first, second))
        if one is None or two is None:
            return None
        halves = [self.drawn.get(label, {}).get(metric) for label in (first, second)]
        error = None if halves[0] is None or halves[1] is None else standard_error(halves[1] - halves[0], self.prompts)
        return Difference(first=first, second=second, metric=metric, value=two - one, error=error)

    def differences(self, labels: list[str]) -> Iterator[Difference]:
        """Of every two of ``labels``, in every metric that can be better."""
        for first, second in combinations(labels, 2):
            for metric in METRICS:
                if metric.judged and (found := self.difference(first, second, metric.name)) is not None:
                    yield found

    def to_parquet(self) -> bytes:
        """A row for each metric of each method."""
        rows = [
            {"label": label, "metric": metric, "value": value, "replicates": None if (halves := self.drawn[label].get(metric)) is None else halves.tolist()}
            for label, values in self.values.items()
            for metric, value in values.items()
        ]
        buffer = io.BytesIO()
        table = pa.Table.from_pylist(rows, schema=_SCHEMA).replace_schema_metadata({_PROMPTS: str(self.prompts)})
        pq.write_table(table, buffer, compression="zstd")
        return buffer.getvalue()

    @classmethod
    def of_parquet(cls, data: bytes) -> Replicates:
        """What :meth:`to_parquet` wrote."""
        table = pq.read_table(io.BytesIO(data))
        values: dict[str, dict[str, float]] = {}
        drawn: dict[str, dict[str, Tensor]] = {}
        for row in table.to_pylist():
            values.setdefault(row["label"], {})[row["metric"]] = row["value"]
            of_label = drawn.setdefault(row["label"], {})
            if row["replicates"] is not None:
                of_label[row["metric"]] = torch.tensor(row["replicates"], dtype=torch.float64)
        return cls(int(table.schema.metadata[_PROMPTS]), values, drawn)
