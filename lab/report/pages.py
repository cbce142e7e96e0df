"""The pages of the atlas: what each of them tells, put into its template."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lab import experiments
from lab.report import prose
from lab.report.claims import KINDS, Statement
from lab.report.figures import figure_of
from lab.report.recorded import Snapshot, comparable, dates, records_of
from lab.report.results import Cell, Column, Results
from lab.report.style import themed
from lab.subjects.catalog import catalog

HERE = Path(__file__).parent
NAVIGATION = (
    ("index.html", "Claims"),
    ("discrepancies.html", "Discrepancies"),
    ("subjects/index.html", "Subjects"),
    ("provenance.html", "Provenance"),
)
#: what entries of the provenance are called where their key does not tell
WORDS = {"subject": "digest of the weights", "corpus": "digest of the corpus", "dtype": "precision"}


@dataclass(frozen=True)
class Row:
    """One experiment, as tables list it."""

    name: str
    id: str
    title: str
    claims: int
    counts: dict[str, Counter[str]]


@dataclass(frozen=True)
class Discrepancy:
    """A published claim that the published figures refute, and its siblings."""

    statement: Statement
    experiment: str
    column: Column
    cell: Cell
    siblings: list[tuple[Statement, Cell | None]]
    reasons: Markup


def pages(results: Results) -> Iterator[tuple[str, str]]:
    """Path in the site and HTML of every page."""
    yield _page(results, "index.html", **_index(results))
    for name in results.by_experiment:
        yield _page(results, f"experiments/{name}.html", "experiment.html", **_experiment(results, name))
    yield _page(results, "subjects/index.html", "subjects.html", **_subjects(results))
    for name in subjects(results):
        yield _page(results, f"subjects/{name}.html", "subject.html", **_subject(results, name))
    yield _page(results, "discrepancies.html", discrepancies=discrepancies(results))
    yield _page(results, "provenance.html", sources=[_source(results, snapshot) for snapshot in results.snapshots])


def rows(results: Results, columns: Sequence[Column]) -> list[Row]:
    """Experiments with their counts in these columns."""
    found = []
    for name, statements in results.by_experiment.items():
        experiment = experiments.experiment(name)
        counts = {column.id: results.counts(statements, column) for column in columns}
        found.append(Row(name, experiment.id, experiment.title, len(statements), counts))
    return found


def subjects(results: Results) -> list[str]:
    """Every subject that is catalogued or recorded."""
    return list(dict.fromkeys([*catalog(), *(column.subject for column in results.columns)]))


def discrepancies(results: Results) -> list[Discrepancy]:
    """Published claims that are refuted by published figures, in the order of their ids."""
    found = []
    for statement in results.statements:
        for column in results.columns:
            cell = results.cell(statement.id, column)
            if statement.kind == "published" and column.published and cell and cell.failing:
                siblings = _corrections(results, statement)
                beside = [(sibling, results.cell(sibling.id, column)) for sibling in siblings]
                experiment = experiments.experiment(statement.records[0]).title
                reasons = prose.paragraphs(statement.reasons)
                found.append(Discrepancy(statement, experiment, column, cell, beside, reasons))
    return found


def _corrections(results: Results, statement: Statement) -> list[Statement]:
    """Corrected siblings; other siblings where nobody stated a corrected one."""
    siblings = results.siblings(statement)
    return [sibling for sibling in siblings if sibling.kind == "corrected"] or siblings


# ---- what the pages tell


def _index(results: Results) -> dict[str, Any]:
    matrix = []
    for statement in results.statements:
        cells = [results.cell(statement.id, column) for column in results.columns]
        thresholds = {cell.threshold for cell in cells if cell and cell.judged}
        same = thresholds.pop() if len(thresholds) == 1 else "varies" if thresholds else None
        matrix.append({"statement": statement, "cells": cells, "threshold": same or ("varies" if any(cells) else None)})
    return {
        "statements": results.statements,
        "experiments": rows(results, results.columns),
        "columns": results.columns,
        "matrix": matrix,
        "kinds": KINDS,
        "discrepancies": discrepancies(results),
    }


def _experiment(results: Results, name: str) -> dict[str, Any]:
    experiment = experiments.experiment(name)
    module = import_module(experiments.modules()[name])
    (counted,) = (row for row in rows(results, results.columns) if row.name == name)
    budgets = {budget: _settings(settings) for budget, settings in experiment.budgets.items()}
    told = {
        "question": experiment.question,
        "method": prose.paragraphs((module.__doc__ or "").partition("\n")[2]),
        "path": experiments.modules()[name].replace(".", "/") + ".py",
        "budgets": budgets,
    }
    recorded = any(snapshot.address.experiment == name for snapshot in results.snapshots)
    statements = results.by_experiment[name]
    families = [list(family) for _, family in groupby(statements, key=lambda statement: statement.stem)]
    columns = [column for column in results.columns if counted.counts[column.id].total()] or results.columns
    return {
        "row": dataclasses.asdict(counted) | {"counts": counted.counts} | told,
        "columns": columns,
        "figure": _figure(name, results.snapshots),
        "downloads": recorded,
        "families": [[_claim(results, statement) for statement in family] for family in families],
    }


def _claim(results: Results, statement: Statement) -> dict[str, Any]:
    found = [(column, results.cell(statement.id, column)) for column in results.columns]
    refuting = [column for column, cell in found if column.published and cell and cell.failing]
    return {
        "statement": statement,
        "reasons": prose.paragraphs(statement.reasons),
        "cells": {column.id: cell for column, cell in found if cell},
        "contradicted": statement.kind == "published" and bool(refuting),
        "corrections": [sibling for sibling in results.siblings(statement) if sibling.kind == "corrected"],
        "elsewhere": [one for one in results.siblings(statement) if one.records[0] != statement.records[0]],
    }


def _figure(name: str, snapshots: Sequence[Snapshot]) -> dict[str, Any] | None:
    figure, every = figure_of(name), records_of(name, snapshots)
    if figure is None or not every:
        return None
    records = comparable(every)
    return {
        "svg": Markup(themed(figure.svg(records))),
        "caption": figure.describe(records),
        "bands": any(record.kept_bands for record in records),
        "not_drawn": [f"{one.subject}, {one.condition}" for one in every if not any(one is drawn for drawn in records)],
    }


def _subjects(results: Results) -> dict[str, Any]:
    columns = {name: [column for column in results.columns if column.subject == name] for name in subjects(results)}
    counts = {column.id: results.counts(results.statements, column) for column in results.columns}
    return {"subjects": [(name, catalog().get(name), columns[name]) for name in columns], "counts": counts}


def _subject(results: Results, name: str) -> dict[str, Any]:
    columns = [column for column in results.columns if column.subject == name]
    known = catalog().get(name)
    cells = [(one, column, results.cell(one.id, column)) for one in results.statements for column in columns]
    judged = [(statement, column, cell) for statement, column, cell in cells if cell]
    failing = [row for row in judged if row[0].kind == "published" and row[2].failing]
    parts = [
        ("moved", "Verdicts that moved", [row for row in judged if row[2].moved]),
        ("unsupported", "Published claims that do not hold here", failing),
        ("fragile", "Fragile claims", [row for row in judged if row[2].fragile]),
    ]
    return {
        "name": name,
        "facts": _facts(name) if known else None,
        "device": known.device if known else "cpu",
        "columns": columns,
        "rows": [row for row in rows(results, columns) if any(count.total() for count in row.counts.values())],
        "parts_of_subject": [
            {"id": id, "title": title, "rows": found} for id, title, found in parts if id != "moved" or found
        ],
    }


def _facts(name: str) -> dict[str, str]:
    known = catalog()[name]
    parameters = f"{known.parameters / 1e6:,.0f} million" if known.parameters else "not counted"
    size = f"{known.size_bytes / 1e6:,.0f} MB" if known.size_bytes else "unknown"
    return {
        "architecture": known.architecture,
        "decoder layers": str(known.layers),
        "width": f"{known.width:,}",
        "attention heads": f"{known.heads} of width {known.head_dim}, {known.kv_heads} for keys and values",
        "MLP width": f"{known.mlp_width:,}",
        "vocabulary": f"{known.vocabulary:,}" + (", head tied to the embedding" if known.tied else ""),
        "parameters": parameters,
        "licence": known.licence,
        "source": str(known.source),
        "download": size,
        "prompts are put as": "chat" if known.frame == "chat" else "plain text",
        "needs": "a CUDA device" if known.device == "gpu" else "a CPU",
    }


def _source(results: Results, snapshot: Snapshot) -> dict[str, Any]:
    address, provenance = snapshot.address, snapshot.content["provenance"]
    libraries = provenance.get("libraries", {})
    return {
        "id": f"{address.experiment}-{address.subject}-{address.condition}",
        "experiment": address.experiment,
        "subject": address.subject,
        "condition": address.condition,
        "weights": str(provenance.get("subject", "")),
        "corpus": str(provenance.get("corpus", "")),
        "libraries": ", ".join(f"{name} {version}" for name, version in libraries.items()),
        "day": dates().get(address.path),
        "path": f"snapshots/{address.subject}/{address.condition}/{address.experiment}.json",
        "entries": list(_entries(provenance)),
        "unstated": results.unstated(snapshot),
    }


def _entries(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _entries(value, f"{prefix}{key}, ")
        elif value is not None:
            told = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield f"{prefix}{WORDS.get(prefix + key, key.replace('_', ' '))}", told


def _settings(budget: Any) -> str:
    values = dataclasses.asdict(budget) if dataclasses.is_dataclass(budget) and not isinstance(budget, type) else {}
    return ", ".join(f"{key.replace('_', ' ')} {'all' if value is None else value}" for key, value in values.items())


# ---- templates


@cache
def environment() -> Environment:
    """The templates, which escape what they are given and fail on a name that they are not given."""
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"measured": prose.measured, "threshold": prose.threshold, "support": prose.support}
    made.filters |= {"listed": prose.listed, "css": prose.css_string}
    return made


def _page(results: Results, path: str, template: str | None = None, **told: Any) -> tuple[str, str]:
    navigation = [{"path": place, "title": title} for place, title in NAVIGATION]
    common: dict[str, Any] = {"root": "../" * path.count("/"), "here": path, "navigation": navigation}
    common |= {"labels": results.labels, "fresh": bool(results.fresh)}
    return path, environment().get_template(template or path).render(common | told) + "\n"
