"""What the atlas offers for download, as CSV: the numbers of each experiment, and all verdicts.

No JSON beside it: that would be the committed snapshots once more, and a tenth of the site.
"""

from __future__ import annotations

import csv
import io
import json
import lzma
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

from lab.report.recorded import Snapshot
from lab.report.results import Results

NUMBERS = ("subject", "condition", "variable", "unit", "labels", "value", "low", "high")
VERDICTS = (
    "claim",
    "kind",
    "experiment",
    "subject",
    "condition",
    "where",
    "verdict",
    "measured",
    "threshold",
    "support",
)


def downloads(results: Results) -> Iterator[tuple[str, bytes]]:
    """Path in the site and content of every file, compressed with xz, which takes a third less than gzip."""
    yield "data/verdicts.csv.xz", _compressed(_table(VERDICTS, _verdicts(results)))
    for name in results.by_experiment:
        mine = [snapshot for snapshot in results.snapshots if snapshot.address.experiment == name]
        if mine:
            table = _table(NUMBERS, (row for snapshot in mine for row in _numbers(snapshot)))
            yield f"data/{name}.csv.xz", _compressed(table)


def _compressed(text: str) -> bytes:
    return lzma.compress(text.encode(), preset=9)  # holds no time, so that the same numbers give the same file


def _numbers(snapshot: Snapshot) -> Iterator[tuple[Any, ...]]:
    """One row per number; an interval that is kept of a derived profile follows with its bounds and no value."""
    place = (snapshot.address.subject, snapshot.address.condition)
    for name, entry in snapshot.content["numbers"].items():
        for labels, value in zip(_labels(entry, entry["dims"]), entry["values"], strict=True):
            yield (*place, name, entry["unit"], labels, value, None, None)
    for name, entry in snapshot.content.get("bands", {}).items():
        dims = [dim for dim in entry["dims"] if dim != "bound"]
        half = len(entry["values"]) // 2
        bounds = zip(entry["values"][:half], entry["values"][half:], strict=True)
        for labels, (low, high) in zip(_labels(entry, dims), bounds, strict=True):
            yield (*place, name, entry["unit"], labels, None, low, high)


def _labels(entry: dict[str, Any], dims: Iterable[str]) -> Iterator[str]:
    dims = list(dims)
    for labels in product(*(entry["coords"][dim] for dim in dims)):
        yield " ".join(f"{dim}={label}" for dim, label in zip(dims, labels, strict=True))


def _verdicts(results: Results) -> Iterator[tuple[Any, ...]]:
    for statement in results.statements:
        for column in results.columns:
            cell = results.cell(statement.id, column)
            for one in cell.verdicts if cell else ():
                told = (statement.id, statement.kind, statement.records[0])
                measured = json.dumps(one.measured) if isinstance(one.measured, (list, bool)) else one.measured
                place = (column.subject, column.condition, one.where)
                yield (*told, *place, one.verdict, measured, one.threshold, one.support)


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
