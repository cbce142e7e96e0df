"""The part of the README that is generated: one figure, the verdict matrix, and where text and data disagree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from lab import files, paths
from lab.errors import UserError
from lab.report import drawing, output, prose
from lab.report.pages import Discrepancy, discrepancies, rows
from lab.report.recorded import comparable, records_of
from lab.report.results import Column, Results
from lab.report.style import SETTINGS

BEGIN = "<!-- results: written by `python -m lab report --readme README.md` -->"
END = "<!-- results: end -->"
FIGURE, QUANTITY = "layer_knockout", "loss_delta"  #: the profile that the README shows
DRAWING = paths.DATA / "figures" / f"{FIGURE}.svg"
LEGEND = (
    "✓ holds, ✗ refuted, – not applicable; ≈ of those that hold, fragile (support below 0.95). A claim about every "
    "layer counts once, and holds if it holds at all of them."
)


def write(results: Results, readme: Path) -> list[Path]:
    """Write the generated part between its markers, and the figure; returns the files.

    Raises:
        UserError: no such file, or a file without the markers.
    """
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {readme}: {error.strerror or error}") from error
    updated = update(text, generated(results), readme)
    files.write_text(DRAWING, figure(results))
    files.write_text(readme, updated)
    return [readme, DRAWING]


def figure(results: Results) -> str:
    """The figure that the README shows: what skipping each layer costs, as an SVG file."""
    with matplotlib.rc_context(SETTINGS):  # type: ignore[arg-type]
        drawn, (axes,) = drawing.panels()
        records = comparable(records_of(FIGURE, results.snapshots))
        label = "rise of the loss [nat/token]"
        drawing.depth_profiles(axes, records, QUANTITY, label=label, scale="symlog")
        drawing.legend(drawn, records)
    return output.svg_file(drawn, title="One decoder layer skipped", description=_alternative(results))


def update(text: str, part: str, readme: Path) -> str:
    """The text with another generated part.

    Raises:
        UserError: the markers are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{readme} has no place for results; write these two lines into it: {BEGIN} and {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{part}\n{END}{rest.split(END)[1]}"


def generated(results: Results) -> str:
    """The generated part, as Markdown."""
    image = f"![{_alternative(results)}]({DRAWING.relative_to(paths.REPOSITORY).as_posix()})"
    return "\n".join([image, "", *_matrix(results), "", LEGEND, *_contradicted(discrepancies(results))])


def _alternative(results: Results) -> str:
    subjects = [drawing.name_of(record) for record in comparable(records_of(FIGURE, results.snapshots))]
    return f"Rise of the completion loss when one decoder layer is skipped, over relative depth: {'; '.join(subjects)}"


def _contradicted(found: Sequence[Discrepancy]) -> list[str]:
    if not found:
        return []
    first = {one.experiment: one for one in reversed(found)}
    lines = [f"- {_discrepancy(one)}" for one in found if first[one.experiment] is one]
    said = f"**{len(found)} published sentences are refuted by the published figures themselves.** The first of each"
    return ["", f"{said} experiment; the atlas has a page of all:", "", *lines]


def _matrix(results: Results) -> list[str]:
    columns = results.columns
    lines = [f"| experiment | {' | '.join(map(_heading, columns))} |", f"|---|{'---|' * len(columns)}"]
    for row in rows(results, columns):
        cells = [_counts(row.counts[column.id]) for column in columns]
        if any(cells):
            lines.append(f"| {row.id} {row.title} | {' | '.join(cells)} |")
    return lines


def _heading(column: Column) -> str:
    return f"{column.subject}<br>{column.condition}"


def _counts(counts: Counter[str]) -> str:
    marks = (("holds", "✓"), ("refuted", "✗"), ("not applicable", "–"), ("fragile", "≈"))
    return "&nbsp; ".join(f"{counts[name]} {mark}" for name, mark in marks if counts[name])


def _discrepancy(one: Discrepancy) -> str:
    measured, needed = prose.measured(one.cell.measured), prose.threshold(one.cell.threshold)
    holding = [sibling for sibling, cell in one.siblings if cell and cell.verdict == "holds"]
    instead = f" → {holding[0].id}: {holding[0].text}" if holding else ""
    compared = ", ".join(f"{name} {value}" for name, value in (("measured", measured), ("needed", needed)) if value)
    return f"{one.statement.id}: {one.statement.text}{f' ({compared})' if compared else ''}{instead}"
