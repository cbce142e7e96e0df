"""Claims by subjects: the cells of the matrix, and what they add up to."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lab import experiments
from lab.report.claims import Statement
from lab.report.folds import Fold
from lab.report.recorded import Fresh, Snapshot, Verdict, place
from lab.snapshots.addresses import natural

THIS_RUN = "this run"  #: condition of verdicts whose subject has no snapshot, or several


@dataclass(frozen=True, order=True)
class Column:
    """One subject under one condition; published figures come first, then the catalog's order."""

    place: tuple[bool, int, str, str]
    subject: str
    condition: str

    @property
    def published(self) -> bool:
        """Whether it holds published figures."""
        return self.condition == "published"

    @property
    def label(self) -> str:
        """Subject and condition in words."""
        return f"{self.subject}, {self.condition}"

    @property
    def id(self) -> str:
        """What names it in a page's attributes."""
        return f"{self.subject}--{self.condition}".replace(" ", "-")


def column(subject: str, condition: str) -> Column:
    """The column of a subject under a condition."""
    return Column(place(subject, condition), subject, condition)


class Cell(Fold[Verdict]):
    """The verdicts of one claim in one column."""

    @cached_property
    def moved(self) -> list[Verdict]:
        """Those of a fresh run that are not what the snapshot records."""
        return [verdict for verdict in self.verdicts if verdict.recorded]


@dataclass(frozen=True)
class Results:
    """All claims and all verdicts."""

    statements: Sequence[Statement]
    snapshots: Sequence[Snapshot]
    fresh: Sequence[Fresh] = ()

    @cached_property
    def columns(self) -> list[Column]:
        """Subjects and conditions that anything is known of."""
        return sorted({column for _, column in self._places})

    @cached_property
    def labels(self) -> Mapping[str, str]:
        """Column -> the shortest words that tell it from the others: the subject, and its condition where it must."""
        measured = Counter(column.subject for column in self.columns if not column.published)
        alone = {column.id for column in self.columns if not column.published and measured[column.subject] == 1}
        return {column.id: column.subject if column.id in alone else column.label for column in self.columns}

    @cached_property
    def by_experiment(self) -> Mapping[str, list[Statement]]:
        """Claims by the experiment that their verdicts are recorded with; every experiment is here."""
        found: defaultdict[str, list[Statement]] = defaultdict(list)
        for statement in self.statements:
            found[statement.records[0]].append(statement)
        ids = {name: natural(experiments.experiment(name).id) for name in experiments.modules()}
        names = sorted(ids, key=lambda name: (ids[name], -len(found[name]), name))
        return {name: found[name] for name in names}

    def cell(self, claim: str, column: Column) -> Cell | None:
        """The verdicts of a claim in a column; None if there are none."""
        found = self._places.get((claim, column))
        return Cell(tuple(found.values())) if found else None

    def siblings(self, statement: Statement) -> list[Statement]:
        """The claims with the same number and other letters."""
        return [other for other in self._families[statement.stem] if other.id != statement.id]

    def counts(self, statements: Iterable[Statement], column: Column) -> Counter[str]:
        """How many of these claims hold, are refuted or do not apply in a column; a claim of many places is one."""
        cells = [self.cell(statement.id, column) for statement in statements]
        counts = Counter(cell.verdict for cell in cells if cell)
        counts["fragile"] = sum(cell.fragile for cell in cells if cell)
        return counts

    def unstated(self, snapshot: Snapshot) -> list[str]:
        """Claims that a snapshot has verdicts of, but that are stated no more."""
        known = {statement.id for statement in self.statements}
        return sorted({verdict.claim for verdict in snapshot.verdicts} - known, key=natural)

    @cached_property
    def _families(self) -> Mapping[str, list[Statement]]:
        found: defaultdict[str, list[Statement]] = defaultdict(list)
        for statement in self.statements:
            found[statement.stem].append(statement)
        return found

    @cached_property
    def _places(self) -> Mapping[tuple[str, Column], dict[str | None, Verdict]]:
        found: defaultdict[tuple[str, Column], dict[str | None, Verdict]] = defaultdict(dict)
        for snapshot in self.snapshots:
            here = column(snapshot.address.subject, snapshot.address.condition)
            for verdict in snapshot.verdicts:
                found[verdict.claim, here][verdict.where] = verdict
        for row in self.fresh:
            found[row.verdict.claim, self._column_of(row)][row.verdict.where] = row.verdict
        return found

    def _column_of(self, row: Fresh) -> Column:
        """The column that a fresh verdict belongs to: the subject's only one of that source, or one of its own."""
        addresses = {snapshot.address for snapshot in self.snapshots if snapshot.address.subject == row.subject}
        conditions = {address.condition for address in addresses}
        if row.source == "published":
            return column(row.subject, "published")
        measured = conditions - {"published"}
        return column(row.subject, measured.pop() if len(measured) == 1 else THIS_RUN)
