"""What the terminal shows at the end of a run: every claim if they are few, else counts by experiment."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fixtures import summary
from fixtures.verdicts import Result

pytestmark = pytest.mark.calibration


def result(claim, verdict, *, where=None, subject="smollm2-135m-instruct", source="measured", support=None):
    name = {"T-2": "layer_knockout", "T-11": "quantization"}[claim.partition(".")[0]]
    return Result(claim, "published", "A sentence.", name, subject, source, where, verdict=verdict, support=support)


RESULTS = [
    result("T-11.1", "holds"),
    *(result("T-2.1", verdict, where=f"L{at:02d}") for at, verdict in enumerate(["holds", "not applicable", "holds"])),
    *(result("T-2.2", verdict, where=f"L{at:02d}") for at, verdict in enumerate(["holds", "refuted"])),
    result("T-2.3", "not applicable"),
    result("T-2.4", "holds", support=0.7),
    result("T-2.5", "refuted", support=0.1),
    result("T-2.6", None),
    result("T-2.1", "holds", subject="qwen3-4b-instruct-2507", source="published"),
]


def cells(text: str) -> list[list[str]]:
    return [row.split() for row in text.splitlines() if row.strip().startswith("T-")]


def test_a_claim_about_every_layer_counts_once_and_holds_if_it_holds_at_all_of_them() -> None:
    rows = cells(summary.overview(summary.ordered(RESULTS), 200, colour=False))
    knockout = "T-2 layer_knockout 1 ✓ 2 ✓ 2 ✗ 1 – 1 not judged 1 ≈"  # published first
    assert [" ".join(row) for row in rows] == [knockout, "T-11 quantization 1 ✓"]


class Reporter:
    """As much of pytest's terminal as the summary writes to."""

    isatty = True

    def __init__(self, verbosity: int = 0):
        self.verbosity, self._tw, self.lines = verbosity, SimpleNamespace(fullwidth=120, hasmarkup=False), []

    def write_sep(self, sign: str, title: str) -> None:
        self.lines.append(title)

    def write_line(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize(("most", "rows"), [(7, True), (6, False)])
def test_more_claims_than_fit_a_table_are_counted(monkeypatch, most, rows) -> None:
    monkeypatch.setattr(summary, "MOST_ROWS", most)
    reporter = Reporter()
    summary.print_summary(reporter, RESULTS)
    printed = "\n".join(reporter.lines)
    assert ("T-2.4" in printed) is rows
    assert ("7 claims: ✓ hold" in printed) is not rows
    assert "smollm2-135m-instruct (measured): 5 holds, 2 refuted, 2 not applicable, 1 not judged; 1 fragile" in printed


@pytest.mark.parametrize("isatty", [True, False])
def test_a_log_is_not_cut_to_a_terminals_width(monkeypatch, isatty) -> None:
    monkeypatch.setattr(summary, "MOST_ROWS", 6)
    monkeypatch.setattr(Reporter, "isatty", isatty)
    reporter = Reporter()
    reporter._tw.fullwidth = 40
    summary.print_summary(reporter, RESULTS)
    assert ("qwen3-4b-instruct-2507" in reporter.lines[1]) is not isatty


def test_quiet_runs_print_the_totals_only() -> None:
    reporter = Reporter(verbosity=-1)
    summary.print_summary(reporter, RESULTS)
    assert len(reporter.lines) == 3
