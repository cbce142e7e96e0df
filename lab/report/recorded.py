"""What is recorded: the committed snapshots, and the verdicts of a fresh run."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from lab import experiments, files, paths
from lab.errors import UserError
from lab.records import Record
from lab.snapshots.addresses import UPDATE, WHAT, Address, all_addresses, load
from lab.snapshots.numbers import to_record
from lab.subjects.catalog import catalog

VERDICTS = ("holds", "refuted", "not applicable")
#: a claim that holds on fewer resamples than this is fragile (DESIGN, `fixtures.support`)
FRAGILE = 0.95
PARTS = ("experiment", "subject", "condition", "provenance", "numbers")


@dataclass(frozen=True)
class Verdict:
    """One claim, at one place, on one record.

    Attributes:
        claim: its id.
        where: layer, matrix, pair (`L07`), or None.
        verdict: one of `VERDICTS`.
        measured: what the claim compared; a number, text, or a list of them.
        threshold: what it needed, `>= 2.4`.
        support: share of bootstrap resamples in which it holds; None where nothing was sampled.
        recorded: what the snapshot says, where a fresh run says something else; else None.
    """

    claim: str
    where: str | None
    verdict: str
    measured: Any = None
    threshold: str | None = None
    support: float | None = None
    recorded: str | None = None

    @property
    def fragile(self) -> bool:
        """Whether the claim holds, but not on most resamples of the prompts."""
        return self.verdict == "holds" and self.support is not None and self.support < FRAGILE


@dataclass(frozen=True)
class Snapshot:
    """A committed snapshot."""

    address: Address
    content: dict[str, Any]

    @cached_property
    def record(self) -> Record:
        """Its numbers as the record that they came from.

        Raises:
            UserError: the numbers are not whole.
        """
        try:
            return to_record(self.content)
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(self.address.path, f"its numbers do not fit together ({error})") from error

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """Its verdicts, as recorded."""
        found = []
        for key, values in self.content.get("verdicts", {}).items():
            claim, _, where = key.partition(" ")
            if values.get("verdict") not in VERDICTS:
                raise _broken(self.address.path, f"its verdict of {key} is {values.get('verdict')!r}")
            known = {name: values.get(name) for name in ("measured", "threshold", "support")}
            found.append(Verdict(claim, where or None, values["verdict"], **known))
        return found


def snapshots() -> list[Snapshot]:
    """All committed snapshots, in the order of their paths.

    Raises:
        UserError: one is truncated, of another form, or of an experiment that does not exist.
    """
    return [_read(address) for address in all_addresses()]


def records_of(name: str, found: Iterable[Snapshot]) -> list[Record]:
    """The records of an experiment: published figures, then the subjects in the order of `place`."""
    mine = [snapshot for snapshot in found if snapshot.address.experiment == name]
    ordered = sorted(mine, key=lambda one: place(one.address.subject, one.address.condition))
    return [snapshot.record for snapshot in ordered]


def comparable(records: Sequence[Record]) -> list[Record]:
    """Those of an experiment's records that one figure shows: every subject once, beside its published figures.

    Where a subject was measured under several conditions, it is the one that most subjects were measured under.
    """
    common = Counter(record.condition for record in records)
    chosen: dict[tuple[str, bool], Record] = {}
    for record in records:
        key = record.subject, record.source == "published"
        if key not in chosen or common[record.condition] > common[chosen[key].condition]:
            chosen[key] = record
    return list(chosen.values())


def place(subject: str, condition: str) -> tuple[bool, int, str, str]:
    """The order of everything: published figures first, then the catalog's order, then names."""
    known = list(catalog())
    return condition != "published", known.index(subject) if subject in known else len(known), subject, condition


@dataclass(frozen=True)
class Fresh:
    """A verdict of a run that has just ended, with its subject and source (`published` or `measured`)."""

    subject: str
    source: str
    experiment: str
    verdict: Verdict


def fresh_verdicts(path: Path) -> list[Fresh]:
    """The verdicts file of a run (`--verdicts`); claims that could not be judged there are left out.

    Raises:
        UserError: no such file, or not of that form.
    """
    what = "verdicts file"
    rows = files.read_json(path, what)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"the {what} {path} is no array of results; write it with pytest findings --verdicts FILE")
    try:
        return [_fresh(row) for row in rows if row["verdict"] is not None]
    except (KeyError, TypeError) as error:
        raise UserError(f"the {what} {path} has a result without {error}; write it anew") from error


def _fresh(row: dict[str, Any]) -> Fresh:
    recorded = row["recorded"] if row["recorded"] != row["verdict"] else None
    known = (row["measured"], row["threshold"], row["support"])
    verdict = Verdict(row["claim"], row["where"], row["verdict"], *known, recorded)
    return Fresh(row["subject"], row["source"], row["experiment"], verdict)


@cache
def dates() -> dict[Path, str]:
    """Snapshot -> day of its last commit, `2026-07-04`; empty where there is no git or no repository."""
    command = ["git", "log", "--format=:%cs", "--name-only", "--relative", "--", str(paths.SNAPSHOTS)]
    try:
        log = subprocess.run(command, cwd=paths.REPOSITORY, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(reversed(list(_days(log))))  # the log begins with the latest


def _days(log: str) -> Iterator[tuple[Path, str]]:
    day = ""
    for line in log.splitlines():
        if line.startswith(":"):
            day = line[1:]
        elif line:
            yield paths.REPOSITORY / line, day


def _read(address: Address) -> Snapshot:
    content = load(address.path)
    missing = [part for part in PARTS if part not in content]
    if missing:
        raise _broken(address.path, f"it has no {', '.join(missing)}")
    if address.experiment not in experiments.modules():
        raise UserError(f"the {WHAT} {address.path} is of no experiment that is here; remove it")
    told = tuple(content[part] for part in ("subject", "condition", "experiment"))
    if told != (address.subject, address.condition, address.experiment):
        raise _broken(address.path, f"it says that it is of {'/'.join(map(str, told))}")
    return Snapshot(address, content)


def _broken(path: Path, why: str) -> UserError:
    return UserError(f"the {WHAT} {path} is damaged: {why}; restore it, or record it anew with {UPDATE}")
