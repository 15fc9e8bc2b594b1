"""Near duplicates: pictures whose 64-bit perceptual hashes differ in few bits, found by a banded index and settled in a fixed order.

Two hashes that differ in at most ``d`` of 64 bits agree in at least ``r`` of ``d + r`` bands, wherever the differing bits lie. So for every choice of ``r``
bands the pairs that agree there are candidates (Manku, Jain and Das Sarma, WWW 2007), and none is missed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, islice, pairwise
from math import comb

import duckdb
import numpy as np
import pyarrow as pa

from selfcascade.curation.database import BATCH, database, fill, rows_of

BITS = 64
SCHEMA = pa.schema([("key", pa.string()), ("hash", pa.uint64()), ("area", pa.int64()), ("fixed", pa.bool_())])


@dataclass(frozen=True, slots=True)
class Hashed:
    """A picture as far as this stage looks at it."""

    key: str
    phash: int
    """64 bits."""
    area: int
    """Pixels of the source: of near duplicates the largest survives."""
    fixed: bool = False
    """It is of another dataset: it survives, whatever it is near to."""


def near_duplicates(pictures: Iterable[Hashed], *, distance: int) -> dict[str, tuple[str, int]]:
    """Pictures that are left out: the survivor that each is near to, and in how many bits they differ, by key.

    Pictures are settled one after another: those of other datasets, then by area, largest first, then by key. One is left out if a survivor before it is within
    ``distance``; so no two survivors are near duplicates, and a chain of small changes does not pull in what is far from its end.

    Args:
        pictures: in any order, keys unique; they go to disk where memory does not hold them.
        distance: most bits in which near duplicates differ, 0 to 16.
    """
    if not 0 <= distance <= 16:
        raise ValueError(f"distance={distance} must be from 0 to 16")
    with database() as connection:
        fill(connection, "pictures", SCHEMA, _batches(pictures))
        connection.execute(
            """
            CREATE TABLE ranked AS
            SELECT key, hash, fixed, row_number() OVER (ORDER BY fixed DESC, CASE WHEN fixed THEN 0 ELSE area END DESC, key) AS rank FROM pictures
            """
        )
        # Equal hashes share one fate, so the first stands for all of them: a thousand blank pictures are one row of the index.
        connection.execute("CREATE TABLE firsts AS SELECT hash, min(rank) AS rank, bool_or(fixed) AS fixed FROM ranked GROUP BY hash")
        connection.execute("CREATE TABLE pairs (first BIGINT, second BIGINT, bits TINYINT)")
        [(count,)] = connection.sql("SELECT count(*) FROM firsts").fetchall()
        for mask in masks(distance, count):
            connection.execute(
                f"""
                INSERT INTO pairs
                SELECT a.rank, b.rank, bit_count(xor(a.hash, b.hash))
                FROM firsts a JOIN firsts b ON (a.hash & {mask}::UBIGINT) = (b.hash & {mask}::UBIGINT)
                WHERE a.rank < b.rank AND bit_count(xor(a.hash, b.hash)) <= {distance}
                """
            )
        survivor: dict[int, tuple[int, int]] = {}
        fixed = {rank for (rank,) in rows_of(connection.sql("SELECT rank FROM firsts WHERE fixed"))}
        for first, second, bits in rows_of(connection.sql("SELECT DISTINCT first, second, bits FROM pairs ORDER BY first, bits, second")):
            if first not in survivor and second not in fixed:
                survivor.setdefault(second, (first, bits))
        return dict(_named(connection, survivor))


def masks(distance: int, count: int) -> Iterator[int]:
    """The bits that each pass compares, for ``count`` different hashes: as many passes, and as wide, as costs least."""
    if distance == 0:
        return
    agreeing = min(range(1, 6), key=lambda bands: _cost(bands, distance, count))
    edges = [round(BITS * band / (distance + agreeing)) for band in range(distance + agreeing + 1)]
    bands = [(1 << high) - (1 << low) for low, high in pairwise(edges)]
    for chosen in combinations(bands, agreeing):
        yield sum(chosen)


def _cost(agreeing: int, distance: int, count: int) -> float:
    """Rows hashed, weighed against candidates looked at: a row costs as much as twenty candidates."""
    bands = distance + agreeing
    return comb(bands, agreeing) * (20 * count + count**2 / 2 ** (BITS * agreeing / bands) / 2)


def _named(connection: duckdb.DuckDBPyConnection, survivor: dict[int, tuple[int, int]]) -> Iterator[tuple[str, tuple[str, int]]]:
    """From ranks of firsts to keys of all pictures."""
    found = pa.table(
        {
            "second": pa.array(list(survivor), pa.int64()),
            "first": pa.array([first for first, _ in survivor.values()], pa.int64()),
            "bits": pa.array([bits for _, bits in survivor.values()], pa.int8()),
        }
    )
    connection.register("settled", found)
    rows = rows_of(
        connection.sql(
            """
        SELECT r.key, s.key, coalesce(settled.bits, 0)
        FROM ranked r
        JOIN firsts f USING (hash)
        LEFT JOIN settled ON settled.second = f.rank
        JOIN ranked s ON s.rank = coalesce(settled.first, f.rank)
        WHERE NOT r.fixed AND r.rank <> s.rank
        ORDER BY r.key
        """
        )
    )
    for key, first, bits in rows:
        yield key, (first, bits)


def _batches(pictures: Iterable[Hashed]) -> Iterator[pa.RecordBatch]:
    remaining = iter(pictures)
    while part := list(islice(remaining, BATCH)):
        columns = (
            pa.array([each.key for each in part], pa.string()),
            pa.array(np.array([each.phash for each in part], np.uint64)),
            pa.array([each.area for each in part], pa.int64()),
            pa.array([each.fixed for each in part], pa.bool_()),
        )
        yield pa.RecordBatch.from_arrays(list(columns), schema=SCHEMA)
