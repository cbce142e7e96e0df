"""What `python -m lab figure` and `python -m lab report` do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from lab import experiments, published
from lab.errors import UserError
from lab.records import Record
from lab.report import readme, site
from lab.report.claims import statements
from lab.report.figures import ExperimentFigure, figure_of
from lab.report.recorded import Snapshot, comparable, fresh_verdicts, records_of, snapshots
from lab.report.results import Results
from lab.subjects.catalog import catalog


def draw(name: str, subjects: Sequence[str], output: Path) -> list[Path]:
    """Draw an experiment's figure from the committed snapshots: of these subjects under all conditions, or all once.

    Args:
        name: an experiment, or an agenda id. Where several experiments share the id, the first, which is the one
            with published figures, takes the file's name, and the others add their own to it.

    Raises:
        UserError: no such experiment or subject, nothing recorded, or an ending that is no format.
    """
    chosen = _experiments(name)
    found = snapshots()
    _require_known(subjects, found)
    drawn: list[tuple[ExperimentFigure, list[Record]]] = []
    for experiment in chosen:
        figure = figure_of(experiment)
        every = records_of(experiment, found)
        records = [record for record in every if record.subject in subjects] if subjects else comparable(every)
        if figure is not None and records:
            drawn.append((figure, records))
    if not drawn:
        raise UserError(_nothing(chosen, subjects))
    outputs = [output, *(output.with_stem(f"{output.stem}-{figure.name}") for figure, _ in drawn[1:])]
    for (figure, records), path in zip(drawn, outputs, strict=True):
        figure.save(records, path)
    return outputs


def results(verdicts: Path | None = None) -> Results:
    """Claims, committed snapshots, and the verdicts of a fresh run, if there is a file of them."""
    return Results(statements(), snapshots(), fresh_verdicts(verdicts) if verdicts else ())


def report(folder: Path, verdicts: Path | None) -> tuple[Path, int]:
    """Write the atlas; returns its first page and the size of the site in bytes."""
    site.require_writable(folder)
    made = site.build(results(verdicts))
    return site.write(made, folder) / "index.html", site.size(made)


def update_readme(path: Path) -> list[Path]:
    """Write the generated part of a README and the figure that it shows; returns the files."""
    return readme.write(results(), path)


def _experiments(name: str) -> list[str]:
    """Experiments of this name or agenda id, those with published figures first."""
    if name in experiments.modules():
        return [name]
    found = experiments.name_of(name)
    if found:
        return sorted(found, key=lambda one: (not published.path(one).exists(), one))
    ids = {experiments.experiment(one).id for one in experiments.modules()}
    raise UserError(f"unknown experiment {name!r}: {_hint(name, [*ids, *experiments.modules()])}")


def _require_known(subjects: Sequence[str], found: Sequence[Snapshot]) -> None:
    known = {*catalog(), *(snapshot.address.subject for snapshot in found)}
    for subject in subjects:
        if subject not in known:
            raise UserError(f"unknown subject {subject!r}: {_hint(subject, known)}")


def _hint(name: str, known: Sequence[str] | set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.4)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(known))}"


def _nothing(chosen: Sequence[str], subjects: Sequence[str]) -> str:
    names = " and ".join(chosen)
    if not any(figure_of(name) for name in chosen):
        return f"{names} has no figure; add lab/experiments/<group>/figures/{chosen[0]}.py"
    of = f" of {', '.join(subjects)}" if subjects else ""
    options = "".join(f" --subject {subject}" for subject in subjects)
    return f"nothing is recorded of {names}{of}; pytest findings -k {chosen[0]}{options} --snapshot-update records it"
