"""Which findings transfer, and which layers of two subjects differ: what the summary and `--against` say."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest

from fixtures import devices, transfer
from fixtures.options import Options
from fixtures.verdicts import Result
from lab import experiments, paths
from lab.experiments import Experiment, Tolerance
from lab.records import Record
from lab.snapshots import comparison
from lab.subjects.catalog import default_subject, facts

pytestmark = pytest.mark.calibration

ORIGINAL = "qwen3-4b-instruct-2507"
HOLDS, REFUTED = {"verdict": "holds"}, {"verdict": "refuted"}


# ---- transfer


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Write a subject's verdicts on T-2 into an empty snapshot folder."""
    monkeypatch.setattr(paths, "SNAPSHOTS", tmp_path)

    def write(subject: str, condition: str, verdicts: dict) -> None:
        path = tmp_path / subject / condition / "layer_knockout.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"verdicts": verdicts}))

    return write


def result(claim: str, verdict: str | None, where: str | None = None, subject: str = "mine") -> Result:
    return Result(claim, "corrected", "...", "layer_knockout", subject, "measured", where, verdict)


def options(model: str | None = "mine", **changes) -> Options:
    usual = {
        "measured": (), "published": False, "chosen": True, "gpu": False, "calibration": True, "against": None,
        "worker": None, "corpus": None, "budget": "quick", "dtype": "bfloat16", "device": None, "fresh": False,
        "verdicts": None, "drift": None, "summary": None, "step_summary": None, "update": False,
    }  # fmt: skip
    return Options(model=model, **(usual | changes))


RESULTS = [
    result("T-2.1", "holds"),
    result("T-2.2", "holds", "L00"),
    result("T-2.2", "refuted", "L01"),
    result("T-2.3", "refuted"),
    result("T-2.4", "holds"),
    result("T-2.5", "not applicable"),
    result("T-2.10", "holds"),
    result("T-2.1", "refuted", subject="another"),
]


def test_findings_are_counted_by_claim_and_the_others_are_named(recorded):
    """Layers fold into one verdict; what was judged on one side only, or holds nowhere, does not count."""
    recorded(ORIGINAL, "published", {"T-2.1": HOLDS, "T-2.2 L00": HOLDS, "T-2.3": HOLDS, "T-2.5": HOLDS})
    recorded(
        default_subject(), "quick-bfloat16", {"T-2.3": REFUTED, "T-2.4": REFUTED, "T-2.10": HOLDS, "T-2.11": HOLDS}
    )
    assert transfer.report(RESULTS, options(), 100)[1:] == [
        f"{ORIGINAL} (published): 1 of 3 findings that hold there hold here",
        "  lost here (2): T-2.2, T-2.3",
        f"{default_subject()} (quick-bfloat16): 1 of 1 findings that hold there hold here",
        "  hold only here (1): T-2.4",
    ]


def test_a_model_measured_on_a_gpu_is_held_against_the_defaults_own_condition(recorded):
    recorded(default_subject(), "quick-bfloat16", {"T-2.1": HOLDS})
    assert transfer.report(RESULTS, options(device="cuda"), 100)[2:] == [
        f"{default_subject()} (quick-bfloat16): 1 of 1 findings that hold there hold here"
    ]


def test_what_is_not_recorded_or_not_whole_is_said(recorded, tmp_path):
    recorded(ORIGINAL, "published", {})
    (tmp_path / ORIGINAL / "published" / "layer_knockout.json").write_text("")
    first, second = transfer.report(RESULTS, options(), 100)[1:]
    assert "is empty; restore it" in first
    assert second == f"{default_subject()} (quick-bfloat16): no verdicts recorded to compare with"


def test_without_a_model_or_a_verdict_nothing_is_said(recorded):
    assert transfer.report(RESULTS, options(model=None), 100) == []
    assert transfer.report([result("T-2.1", None)], options(), 100) == []


def test_long_lists_of_ids_are_wrapped_between_ids():
    many = tuple(f"T-2.{n}" for n in range(40))
    lines = list(transfer.Transfer("a", "published", (), many, ()).lines(60))
    assert max(map(len, lines)) <= 60
    assert " ".join(line.strip() for line in lines[1:]) == f"lost here (40): {', '.join(many)}"


# ---- comparison


def numbers(subject: str, layers: list[float], loss: float = 1.0) -> dict:
    """A snapshot with one number per layer, one per family and layer, and one of the whole model."""
    labels = list(range(len(layers)))
    return {
        "experiment": "toy",
        "subject": subject,
        "provenance": {"subject": f"weights of {subject}", "corpus": f"text of {subject}", "dtype": "bfloat16"},
        "numbers": {
            "knockout": {"unit": "nat", "dims": ["layer"], "coords": {"layer": labels}, "values": layers},
            "update": {
                "unit": "1", "dims": ["family", "layer"], "coords": {"family": ["a"], "layer": labels},
                "values": [2 * value for value in layers],
            },
            "loss": {"unit": "nat", "dims": [], "coords": {}, "values": [loss]},
        },
    }  # fmt: skip


@pytest.fixture
def percent(monkeypatch):
    """An experiment whose numbers may differ by a percent."""
    toy = Experiment("X-1", "Toy", "?", Record, lambda: None, {}, {"": Tolerance(0.01, 0.0, "a percent")})
    monkeypatch.setattr(experiments, "experiment", lambda name: toy)
    monkeypatch.setattr(experiments, "modules", lambda: {"toy": "toy"})


@pytest.mark.usefixtures("percent")
def test_layers_that_differ_are_named_the_farthest_first_with_both_values():
    before, after = numbers("base", [1.0, 2.0, 4.0]), numbers("tuned", [1.1, 2.0, 5.0], loss=1.5)
    after["numbers"]["update"]["values"][2] = 8.0
    assert comparison.report(before, after) == [
        "4 of 7 numbers differ by more than their tolerance (base -> tuned)",
        "layer 2: knockout 4 -> 5 nat (+25.00%, 25 x the tolerance)",
        "layer 0: knockout 1 -> 1.1 nat (+10.00%, 10 x the tolerance); 1 more",
        "beside the layers:",
        "  loss: 1 -> 1.5 nat (+50.00%, 50 x the tolerance)",
    ]


@pytest.mark.usefixtures("percent")
def test_all_layers_that_differ_are_named_but_few_are_told_at_length():
    layers = [float(layer + 1) for layer in range(12)]
    after = numbers("tuned", [value * (1.5 if layer != 3 else 1) for layer, value in enumerate(layers)])
    lines = comparison.report(numbers("base", layers), after)
    assert len([line for line in lines if line.startswith("layer ")]) == comparison.SHOWN
    assert any(line.startswith("and layer ") and "3," not in line for line in lines)


@pytest.mark.usefixtures("percent")
def test_other_numbers_of_layers_are_one_line():
    lines = comparison.report(numbers("base", [1.0, 2.0]), numbers("deeper", [1.0, 2.0, 3.0], loss=2.0))
    assert lines == [
        "1 of 1 numbers differ by more than their tolerance (base -> deeper)",
        "beside the layers:",
        "  loss: 1 -> 2 nat (+100.00%, 100 x the tolerance)",
        "base has 2 layers and deeper has 3: 2 quantities by layer, pair, block or step are not compared; claims are",
    ]


@pytest.mark.usefixtures("percent")
def test_other_labels_and_circumstances_are_named():
    before, after = numbers("base", [1.0]), numbers("tuned", [1.0])
    after["numbers"]["update"]["coords"]["family"] = ["b"]
    after["provenance"] = {**after["provenance"], "dtype": "float32"}
    assert comparison.report(before, after)[1:] == [
        "not compared, for their labels differ: update",
        "what else differs:",
        "  dtype: bfloat16 -> float32",
    ]


@pytest.mark.usefixtures("percent")
def test_what_was_measured_on_one_subject_only_is_no_difference():
    before, after = numbers("base", [1.0]), numbers("tuned", [1.0])
    more = copy.deepcopy(after)
    more["numbers"]["new"] = more["numbers"]["loss"]
    assert comparison.differences(before, more) == []


def test_against_what_was_not_recorded_is_one_line(suite):
    """Nothing at all is a mistake; nothing under this condition leaves nothing to compare."""
    ask = ("--subject", "tiny", "--against", "small", "-k", "toy_matches", "-rs")
    suite.run(*ask).stderr.fnmatch_lines(
        ["ERROR: nothing of small was recorded; run --subject small --snapshot-update*"]
    )
    suite.run("--subject", "small", "--dtype", "float32", "--snapshot-update")
    run = suite.run(*ask)
    run.assert_outcomes(skipped=1)
    run.stdout.fnmatch_lines(["SKIPPED*no snapshot of small under quick-bfloat16 to compare with; record one with *"])


def test_against_a_published_subject_means_its_published_verdicts(suite):
    suite.publish()
    suite.run("--snapshot-update", "-m", "published")
    run = suite.run("--subject", "tiny", "--against", "famous", "-m", "measured", "-k", "X-1.1b", "-rx")
    run.assert_outcomes(passed=2, xfailed=1)
    run.stdout.fnmatch_lines(["*L02] - refuted as on famous: measured 3.99, needed <= 3"])


# ---- devices


@pytest.mark.parametrize(
    ("device", "worker", "count", "expected"),
    [
        ("cuda", 0, 2, "cuda:0"),
        ("cuda", 3, 2, "cuda:1"),
        ("cuda", None, 2, "cuda"),
        ("cuda", 1, 0, "cuda"),
        ("cuda:1", 0, 2, "cuda:1"),
        ("cpu", 1, 2, "cpu"),
    ],
)
def test_workers_take_cuda_devices_in_turn(monkeypatch, device, worker, count, expected):
    monkeypatch.setattr(devices, "cuda_devices", lambda: count)
    chosen = options(device=device, worker=worker)
    subject = facts(default_subject())
    assert chosen.device_of(subject) == expected
    assert chosen.condition_of(subject) == ("quick-bfloat16" if device == "cpu" else "quick-bfloat16-cuda")


def test_the_worker_is_known_by_its_id():
    assert devices.worker_index(SimpleNamespace(workerinput={"workerid": "gw11"})) == 11
    assert devices.worker_index(SimpleNamespace()) is None
