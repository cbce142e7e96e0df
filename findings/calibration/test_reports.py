"""What a run leaves for those who did not watch it: the gate's message, JUnit XML, Markdown and JSON."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from lab.snapshots import drift

pytestmark = pytest.mark.calibration

MOVED = {"loss": [3.0] * 4, "layer_loss": [[1.1] * 4, [2.0] * 4, [2.5] * 4]}


@pytest.fixture
def moved(suite):
    """The toy suite after its numbers were recorded and have moved; the next run measures anew."""
    suite.publish()
    suite.run("--snapshot-update")
    suite.values(MOVED)
    return suite


def test_the_gates_message_is_one_screen_and_its_first_line_tells(moved):
    result = moved.run("--fresh", "-k", "toy_matches and tiny")
    said = [line for line in result.outlines if line.startswith("E ")]
    assert [line.removeprefix("E").strip() for line in said] == [
        "assert toy of tiny (quick-bfloat16): 3 of 4 numbers moved by more than their tolerance, "
        "in 2 of 2 quantities, at 2 of 3 layers",
        "loss: 0.99 -> 3 nat/token (+203.03%, 203 x the tolerance)",
        "layer_loss[layer=2]: 3.99 -> 2.5 nat/token (-37.34%, 37.3 x the tolerance); 1 more at layer 0",
        "tolerance of loss, layer_loss: 1 % (toys are exact to a percent)",
        "what else changed:",
        "nothing: same provenance",
        "if that is right, record it with --snapshot-update",
    ]
    assert "provenance" not in " ".join(line for line in result.outlines if line not in said)
    assert len(result.outlines) < 40


def test_the_message_names_what_changed_since_the_snapshot(moved):
    recorded = moved.recorded()
    recorded["provenance"] |= {"libraries": {"torch": "1.0"}, "subject": "0" * 64, "processor": "AVX512"}
    moved.snapshot().write_text(json.dumps(recorded))
    result = moved.run("--fresh", "-k", "toy_matches", "-vv")  # pytest cuts it, where pyproject.toml does not
    result.stdout.fnmatch_lines(
        [
            "E*what else changed:",
            "E*weights: 000000000000 -> toy weights",
            "E*processor: AVX512 -> TOY",
            "E*libraries.torch: 1.0 -> *",
        ]
    )


def test_the_instruments_source_is_part_of_the_provenance(moved):
    recorded = moved.recorded()
    assert len(recorded["provenance"]["instruments"]) == 64
    assert recorded["provenance"]["processor"] == "TOY"


def test_junit_xml_tells_of_every_claim(moved):
    moved.run("--fresh", "--junitxml", "junit.xml")
    cases = {case.get("name"): case for case in ElementTree.parse(moved.folder / "junit.xml").iter("testcase")}
    properties = {item.get("name"): item.get("value") for item in cases["test_every_layer[tiny-L02]"].iter("property")}
    assert properties == {
        "claim": "X-1.1b", "kind": "corrected", "statement": "Every layer's loss is at most three.",
        "subject": "tiny", "source": "measured", "where": "L02", "verdict": "holds", "recorded": "refuted",
        "measured": "2.5", "threshold": "<= 3", "support": "1.0",
    }  # fmt: skip
    (failure,) = cases["test_every_layer[tiny-L02]"].iter("failure")
    assert "the snapshot of tiny says refuted (measured 3.99, needed <= 3); now the claim holds" in failure.text
    (failure,) = cases["test_toy_matches_snapshot[tiny]"].iter("failure")
    assert "3 of 4 numbers moved" in failure.get("message")
    (skipped,) = cases["test_prompts[tiny]"].iter("skipped")
    assert "holds no prompt_loss" in skipped.get("message")
    (expected,) = cases["test_every_layer[famous-L02]"].iter("skipped")
    assert expected.get("type") == "pytest.xfail"
    assert "refuted: measured 4" in expected.get("message")


MARKDOWN = """\
### Findings: 3 failed, 7 passed, 1 xfailed, 2 skipped

Drift in 1 of 2 snapshots, snapshots -> this run: 1 with other numbers, 1 with other verdicts, 0 new, 0 gone.

#### `toy` of tiny (quick-bfloat16)

3 of 4 numbers moved by more than their tolerance, in 2 of 2 quantities, at 2 of 3 layers.

| farthest number of each quantity | snapshot → now | and |
| --- | --- | --- |
| `loss` | 0.99 -> 3 nat/token (+203.03%, 203 x the tolerance) |  |
| `layer_loss[layer=2]` | 3.99 -> 2.5 nat/token (-37.34%, 37.3 x the tolerance) | 1 more at layer 0 |

- tolerance of loss, layer\\_loss: 1 % (toys are exact to a percent)

| claim | where | was | is | measured |
| --- | --- | --- | --- | --- |
| X-1.1 |  | holds | refuted | measured 3.0, needed < 2 |
| X-1.1b | L02 | refuted | holds | measured 2.5, needed <= 3 |

What else changed: nothing: same provenance.

#### Failures

| test | said |
| --- | --- |
"""
VERDICTS = """\
#### Verdicts

| subject | source | holds | refuted | not applicable | fragile |
| --- | --- | --- | --- | --- | --- |
| famous | published | 4 | 1 | 1 | 0 |
| tiny | measured | 3 | 1 | 1 | 0 |
"""


def test_the_summary_opens_with_what_is_wrong(moved):
    moved.run("--fresh", "--summary", "summary.md")
    text = (moved.folder / "summary.md").read_text()
    assert text.startswith(MARKDOWN)
    assert text.endswith(VERDICTS)


def test_the_summary_of_a_quiet_run_is_short(suite):
    suite.run("--snapshot-update")
    suite.run("--summary", "summary.md")
    lines = (suite.folder / "summary.md").read_text().splitlines()
    assert lines[0] == "### Findings: 4 passed, 1 xfailed, 1 skipped"
    assert lines[2] == "No drift in 1 snapshots, snapshots -> this run."
    assert len(lines) == 9


def test_githubs_step_summary_is_appended_to(suite, monkeypatch):
    path = suite.folder / "step.md"
    path.write_text("what another step wrote\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    suite.run("--collect-only")
    assert path.read_text() == "what another step wrote\n"
    suite.run("-k", "X-1.1")
    suite.run("-k", "X-1.1")
    text = path.read_text()
    assert text.startswith("what another step wrote\n### Findings:")
    assert text.count("### Findings:") == 2


def test_a_summary_that_cannot_be_written_is_one_line(suite, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(suite.folder / "nowhere" / "step.md"))
    result = suite.run("-k", "X-1.10")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines(["ERROR: cannot write the step summary *nowhere/step.md*"])
    assert "INTERNALERROR" not in str(result.stdout)


def test_failures_beside_drift_are_in_the_summary(suite):
    suite.claims("def test_an_instrument():\n    assert 1 + 1 == 3, 'it cannot add'\n", "test_instrument")
    suite.values({"error": "the loss of prompt 3 is not finite"})
    suite.run("--summary", "summary.md")
    text = (suite.folder / "summary.md").read_text()
    assert "### Findings: 1 failed, 6 errors" in text
    assert "| `test_instrument.py::test_an_instrument` | AssertionError: it cannot add |" in text
    assert "the loss of prompt 3 is not finite" in text


def test_a_file_that_cannot_be_collected_is_in_the_summary(suite):
    suite.claims("import nothing_of_the_kind\n", "test_broken")
    suite.run("--summary", "summary.md")
    text = (suite.folder / "summary.md").read_text()
    assert text.startswith("### Findings: 1 errors")
    assert "| `test_broken.py` | " in text


def test_drift_file_holds_every_move(moved):
    moved.run("--fresh", "--drift", "drift.json")
    content = json.loads((moved.folder / "drift.json").read_text())
    famous, tiny = content["differences"]
    assert (famous["moves"], famous["verdicts"]) == ([], [])
    assert tiny["address"] == {"subject": "tiny", "condition": "quick-bfloat16", "experiment": "toy"}
    assert [(move["variable"], move["before"], move["after"], move["unit"]) for move in tiny["moves"]] == [
        ("loss", 0.99, 3, "nat/token"),
        ("layer_loss", 3.99, 2.5, "nat/token"),
        ("layer_loss", 0.99, 1.1, "nat/token"),
    ]
    assert [(move["key"], move["before"]["verdict"], move["after"]["verdict"]) for move in tiny["verdicts"]] == [
        ("X-1.1", "holds", "refuted"),
        ("X-1.1b L02", "refuted", "holds"),
    ]


def test_another_subject_is_no_drift(moved):
    moved.run("--subject", "small", "--against", "tiny", "--fresh", "--drift", "drift.json", "--summary", "summary.md")
    assert json.loads((moved.folder / "drift.json").read_text())["differences"] == []
    assert "rift" not in (moved.folder / "summary.md").read_text()


def test_workers_report_as_one_process_does(moved):
    result = moved.run_apart("-n", "2", "--fresh", "--summary", "summary.md", "--drift", "drift.json")
    result.assert_outcomes(failed=3, passed=7, xfailed=1, skipped=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert (moved.folder / "summary.md").read_text().startswith(MARKDOWN)
    assert len(json.loads((moved.folder / "drift.json").read_text())["differences"]) == 2


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("-k", "famous"), pytest.ExitCode.OK),
        (("-k", "toy_matches"), pytest.ExitCode.TESTS_FAILED),
        (("-k", "nothing-of-the-kind"), pytest.ExitCode.NO_TESTS_COLLECTED),
        (("--subject", "nobody"), pytest.ExitCode.USAGE_ERROR),
    ],
)
def test_exit_codes_are_pytests(moved, arguments, code):
    assert moved.run("--fresh", *arguments, "--summary", "summary.md", "--drift", "drift.json").ret == code


def test_quantities_come_by_what_moved_farthest_in_them():
    found = [drift.Move("a", "", 5), drift.Move("b", "", 3), drift.Move("b", "", 2), drift.Move("a", "", 1)]
    assert [(move.variable, move.share) for move, _ in drift.farthest(found)] == [("a", 5), ("b", 3)]
