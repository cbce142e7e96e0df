"""Differences as text for a terminal and as Markdown for a page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from lab.snapshots import drift, provenance
from lab.snapshots.differences import Difference, VerdictMove

PLACES = 6
SHOWN = drift.SHOWN


def text(found: Sequence[Difference]) -> list[str]:
    """A paragraph per snapshot that moved, and a line per one of which the provenance alone is other."""
    return [line for difference in found for line in _paragraph(difference)]


def conclusion(found: Sequence[Difference], before: str, after: str) -> str:
    """In one line: how many snapshots were compared, and how many moved."""
    drifted = [difference for difference in found if difference.is_drift]
    counts = [
        f"{sum(difference.status == 'both' and bool(difference.moves) for difference in found)} with other numbers",
        f"{sum(bool(difference.verdicts) for difference in found)} with other verdicts",
        f"{sum(difference.status == 'appeared' for difference in found)} new",
        f"{sum(difference.status == 'vanished' for difference in found)} gone",
    ]
    said = f"drift in {len(drifted)} of {len(found)} snapshots" if drifted else f"no drift in {len(found)} snapshots"
    return f"{said}, {before} -> {after}" + (f": {', '.join(counts)}" if drifted else "")


def markdown(found: Sequence[Difference]) -> list[str]:
    """A section per snapshot that moved."""
    lines: list[str] = []
    for difference in found:
        if difference.is_drift:
            lines += ["", f"#### {_title(difference)}", "", *_section(difference)]
    return lines


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    every = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in every]


def _paragraph(difference: Difference) -> list[str]:
    address = difference.address
    name = f"{address.experiment} of {address.subject} ({address.condition})"
    if difference.status != "both":
        return [f"{name}: {difference.status}, {difference.headline}"]
    if not difference.is_drift:
        return [f"{name}: {'; '.join(difference.changed[:SHOWN])}"] if difference.changed else []
    lines = [f"{name}: {difference.headline}"]
    lines += [f"  {line}" for line in drift.by_quantity(difference.moves)]
    lines += [f"  {line}" for line in drift.allowances(address.experiment, difference.moves)]
    lines += [f"  {line}" for line in _verdict_lines(difference.verdicts)]
    return lines + [f"  also changed: {line}" for line in provenance.cut(difference.changed)]


def _section(difference: Difference) -> list[str]:
    if difference.status != "both":
        return [f"{difference.status.capitalize()}: {difference.headline}."]
    lines = [f"{difference.headline[0].upper()}{difference.headline[1:]}."]
    if difference.moves:
        moves = drift.farthest(difference.moves)
        rows = [[f"`{move.name()}`", move.change, more] for move, more in moves[:SHOWN]]
        rest = [f"`{move.variable}`" for move, _ in moves[SHOWN:]]
        lines += ["", *table(["farthest number of each quantity", "snapshot → now", "and"], rows)]
        lines += ["", f"And {len(rest)} more quantities: {', '.join(rest)}."] if rest else []
        lines += [
            "",
            *(f"- {_escaped(line)}" for line in drift.allowances(difference.address.experiment, difference.moves)),
        ]
    if difference.verdicts:
        verdicts = _verdict_rows(difference.verdicts)
        lines += ["", *table(["claim", "where", "was", "is", "measured"], verdicts[: 4 * SHOWN])]
        lines += ["", f"And {len(verdicts) - 4 * SHOWN} more."] if len(verdicts) > 4 * SHOWN else []
    changed = [_escaped(line) for line in provenance.cut(difference.changed)] or ["nothing: same provenance"]
    return [*lines, "", f"What else changed: {'; '.join(changed)}."]


def _title(difference: Difference) -> str:
    address = difference.address
    return f"`{address.experiment}` of {address.subject} ({address.condition})"


def _by_change(verdicts: Sequence[VerdictMove]) -> list[list[VerdictMove]]:
    groups: defaultdict[tuple[str, tuple[str, str]], list[VerdictMove]] = defaultdict(list)
    for move in verdicts:
        groups[move.claim, move.verdicts].append(move)
    return list(groups.values())


def _verdict_lines(verdicts: Sequence[VerdictMove]) -> list[str]:
    lines = []
    for moves in _by_change(verdicts):
        was, now = moves[0].verdicts
        place = f" at {_places(moves)}" if moves[0].where else ""
        measured = f" ({_measured(moves[0])})" if _measured(moves[0]) else ""
        lines.append(f"{moves[0].claim}{place}: {was} -> {now}{measured}")
    return lines


def _verdict_rows(verdicts: Sequence[VerdictMove]) -> list[list[str]]:
    return [[moves[0].claim, _places(moves), *moves[0].verdicts, _measured(moves[0])] for moves in _by_change(verdicts)]


def _places(moves: Sequence[VerdictMove]) -> str:
    more = f" and {len(moves) - PLACES} more" if len(moves) > PLACES else ""
    return ", ".join(move.where for move in moves[:PLACES]) + more


def _measured(move: VerdictMove) -> str:
    """`measured 2.1 -> 1.9, needed >= 2`, as far as it is known."""
    was, now = move.before.get("measured"), move.after.get("measured")
    values = " -> ".join(str(value) for value in (was, now) if value is not None)
    needed = move.after.get("threshold") or move.before.get("threshold")
    parts = [f"measured {values}"] if values else []
    return ", ".join(parts + ([f"needed {needed}"] if needed else []))


def _cell(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _escaped(line: str) -> str:
    return line.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
