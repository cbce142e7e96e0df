"""Snapshots: what they hold, what counts as drift, and how they are updated."""

import json
from itertools import combinations

import numpy as np
import pytest
import xarray as xr

from fixtures.snapshots import Snapshots
from lab import experiments, files
from lab.errors import UserError
from lab.experiments import Experiment, Tolerance
from lab.records import Record, variable
from lab.snapshots import drift, form, numbers, provenance
from lab.snapshots.addresses import Address, all_addresses, load, natural
from lab.snapshots.labels import labels, spans

pytestmark = pytest.mark.calibration


def record(loss, layers=(1.0, 2.0), **provenance):
    data = xr.Dataset(
        {
            "loss": variable((), loss, "nat/token", "loss"),
            "layer_loss": variable("layer", layers, "nat/token", "loss per layer"),
            "best": variable("layer", ["a", "b"][: len(layers)], "name", "names"),
        },
        {"layer": np.arange(len(layers))},
        {"experiment": "toy", "subject": "tiny", "source": "measured", "condition": "quick-bfloat16"},
    )
    return Record(data.assign_attrs(provenance=json.dumps(provenance)))


@pytest.fixture(autouse=True)
def tolerances(request, monkeypatch):
    if "suite" in request.fixturenames:  # it has an experiment of its own
        return
    allowed = {"": Tolerance(0.01, 0.0, "a percent"), "loss": Tolerance(0.0, 0.5, "half a nat")}
    toy = Experiment("X-1", "Toy", "?", Record, xr.Dataset, {}, allowed)
    monkeypatch.setattr(experiments, "experiment", lambda name: toy)
    monkeypatch.setattr(experiments, "modules", lambda: {"toy": "toy"})


def moves(before, after):
    return [move.text for move in drift.moves(numbers.of_record(before), numbers.of_record(after))]


def test_moves_within_tolerance_are_none():
    assert moves(record(1.0), record(1.49, layers=(1.009, 2.019))) == []


def test_numbers_belong_to_labels_in_whatever_order():
    """Categories come in the order of the prompts: another order is no drift, another number at a label is."""
    names, values = ["a", "b", "c"], [1.0, 2.0, 3.0]

    def numbers_of(order, changed=0.0):
        found = {"unit": "nat", "dims": ["category"], "coords": {"category": [names[i] for i in order]}}
        return {
            "experiment": "unknown",
            "numbers": {"loss": found | {"values": [values[i] + changed * (i == 1) for i in order]}},
        }

    assert drift.moves(numbers_of((0, 1, 2)), numbers_of((2, 0, 1))) == []
    (move,) = drift.moves(numbers_of((0, 1, 2)), numbers_of((2, 0, 1), changed=0.5))
    assert move.name() == "loss[category=b]"
    twice = numbers_of((0, 1, 2))
    twice["numbers"]["loss"]["coords"]["category"] = ["a", "a", "c"]
    assert drift.is_of_form(drift.moves(numbers_of((0, 1, 2)), twice)[0])


def test_a_move_says_where_from_to_percent_and_share_of_the_tolerance():
    assert moves(record(1.0), record(1.6, layers=(1.0, 2.5))) == [
        "layer_loss[layer=1]: 2 -> 2.5 nat/token (+25.00%, 25 x the tolerance)",
        "loss: 1 -> 1.6 nat/token (+60.00%, 1.2 x the tolerance)",
    ]


@pytest.fixture
def logarithmic(monkeypatch):
    growing = Tolerance(0.01, 0.2, "a factor per layer", logarithmic=True)
    toy = Experiment("X-1", "Toy", "?", Record, xr.Dataset, {}, {"": growing})
    monkeypatch.setattr(experiments, "experiment", lambda name: toy)


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [
        (1e32, 2e32, None),  # ln 2 of 0.2 + 0.01 ln 1e32 = 0.937
        (1e32, 3e32, np.log(3) / (0.2 + 0.01 * np.log(1e32))),
        (1e-32, 3e-32, np.log(3) / (0.2 + 0.01 * np.log(1e32))),
        (1.0, 1.2, None),
        (1.0, 1.25, np.log(1.25) / 0.2),
        (1.0, float("inf"), float("inf")),
        (float("inf"), float("inf"), None),
        (0.0, 0.0, None),
        (0.0, 1e-9, float("inf")),
        (1.0, -1.0, float("inf")),
    ],
)
def test_what_grows_by_factors_is_held_by_its_logarithm(logarithmic, before, after, share):
    found = drift.moves(numbers.of_record(record(before)), numbers.of_record(record(after)))
    assert [move.share for move in found] == ([] if share is None else [pytest.approx(share)])


def test_a_tolerance_of_logarithms_says_so(logarithmic):
    found = drift.moves(numbers.of_record(record(1.0)), numbers.of_record(record(2.0)))
    assert drift.allowances("toy", found) == ["tolerance of loss: 1 % + 0.2 of the logarithm (a factor per layer)"]


def test_nan_equals_nan_and_nothing_else():
    nan = float("nan")
    assert moves(record(nan), record(nan)) == []
    assert moves(record(nan), record(1.0)) == ["loss: nan -> 1 nat/token"]
    assert moves(record(1.0), record(nan)) == ["loss: 1 -> nan nat/token"]


def test_another_form_is_drift():
    before, after = numbers.of_record(record(1.0)), numbers.of_record(record(1.0, layers=(1.0,)))
    assert [move.text for move in drift.moves(before, after)] == [
        "best: other form: labels of layer: 2 -> 1",
        "layer_loss: other form: labels of layer: 2 -> 1",
    ]
    del after["numbers"]["best"]
    assert "best: no longer measured" in [move.text for move in drift.moves(before, after)]
    assert "best: not in the snapshot" in [move.text for move in drift.moves(after, before)]


def test_what_else_changed_comes_in_the_order_in_which_it_explains():
    old = {"libraries": {"torch": "2.10"}, "subject": "a" * 64, "settings": {"prompts": 28, "tokens": None}}
    new = {"libraries": {"torch": "2.13"}, "subject": "b" * 64, "settings": {"prompts": 28, "tokens": 9}, "device": "x"}
    assert provenance.changes(old, new) == [
        f"weights: {'a' * 12} -> {'b' * 12}",
        "settings.tokens: None -> 9",
        "device: not recorded -> x",
        "libraries.torch: 2.10 -> 2.13",
    ]


def test_the_report_tells_how_much_where_the_tolerance_and_what_else_changed():
    before = numbers.of_record(record(1.0, settings={"prompts": 28}, libraries={"torch": "2.10"}))
    after = numbers.of_record(record(2.0, layers=(3.0, 2.0), settings={"prompts": 28}, libraries={"torch": "2.13"}))
    assert drift.report(before, after) == [
        "2 of 5 numbers moved by more than their tolerance, in 2 of 3 quantities, at 1 of 2 layers",
        "  layer_loss[layer=0]: 1 -> 3 nat/token (+200.00%, 200 x the tolerance)",
        "  loss: 1 -> 2 nat/token (+100.00%, 2 x the tolerance)",
        "  tolerance of layer_loss: 1 % (a percent)",
        "  tolerance of loss: 0.5 nat/token (half a nat)",
        "what else changed:",
        "  libraries.torch: 2.10 -> 2.13",
    ]
    assert drift.report(before, before) == [
        "none of 5 numbers moved by more than its tolerance",
        "what else changed:",
        "  nothing: same provenance",
    ]


def test_the_report_is_one_screen():
    layers = np.arange(30)
    losses = {f"loss_{number}": variable("layer", layers + 1.0, "nat/token", "loss") for number in range(40)}
    attributes = {"experiment": "toy", "subject": "tiny", "source": "measured", "condition": "quick-bfloat16"}
    data = xr.Dataset(losses, {"layer": layers}, attributes)
    moved = data.copy()
    moved["loss_7"] = data["loss_7"] * xr.where(data["layer"].isin([0, 4, 5, 6, 7, 29]), 3, 1)
    report = drift.report(numbers.of_record(Record(data)), numbers.of_record(Record(moved)))
    assert report[:2] == [
        "6 of 1200 numbers moved by more than their tolerance, in 1 of 40 quantities, at 6 of 30 layers",
        "  loss_7[layer=0]: 1 -> 3 nat/token (+200.00%, 200 x the tolerance); 5 more at layers 4-7, 29",
    ]
    every = Record(data.map(lambda values: values * 2, keep_attrs=True).assign_attrs(attributes))
    report = drift.report(numbers.of_record(Record(data)), numbers.of_record(every))
    assert report[0].endswith("in 40 of 40 quantities, at all 30 layers")
    assert "  and 32 more quantities: loss_16, loss_17, loss_18 and 29 more" in report
    assert len(report) < 24


def test_numbered_places_say_which_layers_they_are_about():
    """What names pairs, blocks and steps is found by its form, whatever an experiment calls it."""
    data = xr.Dataset(
        {
            "pair_loss": variable("pair", [1.0, 2.0], "nat/token", "loss"),
            "pair_first_layer": variable("pair", [3, 4], "layer", "lower"),
            "pair_second_layer": variable("pair", [7, 8], "layer", "higher"),
            "tensor_norm": variable("tensor", [1.0, 2.0], "1", "norm"),
            "tensor_name": variable("tensor", ["q", "k"], "name", "name"),
            "tensor_count": variable("tensor", [5, 6], "token", "a count, not a name"),
            "pruning_loss": variable("step", [1.0, 2.0, 3.0], "nat/token", "loss"),
            "naive_loss": variable("step", [1.0, 2.0, 3.0], "nat/token", "loss along another path"),
            "pruning_removed_layer": variable("removal", [11, 5], "layer", "removed"),
            "best_layer": variable("layer", [1, 1], "layer", "a finding, not a name"),
            "layer_loss": variable("layer", [1.0, 2.0], "nat/token", "loss"),
        },
        {"step": [0, 1, 2], "removal": [1, 2]},
    )
    found = numbers.of_summary(data)

    def place(name, at):
        (axes,) = labels(found, name, [(at,)])
        return ", ".join(axis.text for axis in axes)

    assert place("pair_loss", 1) == "pair=1 (first_layer=4, second_layer=8)"
    assert place("tensor_norm", 0) == "tensor=0 (name=q)"
    assert place("pruning_loss", 0) == "step=0"
    assert place("pruning_loss", 2) == "step=2 (pruning_removed_layer=5)"
    assert place("naive_loss", 2) == "step=2"
    assert place("layer_loss", 1) == "layer=1"


def test_a_pair_of_the_recorded_knockouts_names_its_layers():
    before = load(Address("smollm2-135m-instruct", "quick-bfloat16", "layer_knockout").path)
    after = json.loads(json.dumps(before))
    after["numbers"]["pair_knockout_loss"]["values"][284] *= 2
    (move,) = drift.of_variable("layer_knockout", "pair_knockout_loss", before["numbers"], after["numbers"])
    first, second = list(combinations(range(30), 2))[284]
    assert move.name() == f"pair_knockout_loss[pair=284 (first_layer={first}, second_layer={second})]"


@pytest.mark.parametrize(
    ("values", "text"), [([], ""), ([4], "4"), ([2, 1], "1, 2"), ([9, 3, 4, 5, 1], "1, 3-5, 9"), ([1, 1, 2, 3], "1-3")]
)
def test_runs_of_layers_are_joined(values, text):
    assert spans(values) == text


def test_an_experiment_that_is_unknown_here_is_compared_exactly():
    before, after = numbers.of_record(record(1.0)), numbers.of_record(record(1.000001))
    assert drift.moves(before, after) == []
    before["experiment"] = after["experiment"] = "forgotten"
    assert "exactly" in drift.report(before, numbers.of_record(record(1.1)) | {"experiment": "forgotten"})[2]


def test_what_is_written_is_what_is_read():
    content = numbers.of_record(record(1 / 3, layers=(float("nan"), 1e-12), settings={"prompts": 28}))
    assert numbers.parse(numbers.dump(content)) == content
    assert content["numbers"]["loss"]["values"] == [0.333333]
    assert content["numbers"]["layer_loss"]["values"] == [None, 1e-12]


def test_text_reads_well_in_a_diff():
    wide = record(1.0).data.drop_vars("best").isel(layer=np.zeros(25, int)).assign_coords(layer=np.arange(25))
    lines = numbers.dump(numbers.of_record(Record(wide))).splitlines()
    values = lines[lines.index('   "values": [') + 1 :][:3]
    assert [line.count("1.0") for line in values] == [10, 10, 5]
    assert max(map(len, lines)) < 120


def test_seconds_and_dates_stay_out():
    content = numbers.of_record(record(1.0, seconds=3.5, date="2026-01-01", threads=2, dtype="bfloat16"))
    assert content["provenance"] == {"dtype": "bfloat16"}


def test_updates_merge(tmp_path, monkeypatch):
    monkeypatch.setenv("DL_FINDINGS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "snapshot.json"
    first = Snapshots()
    first.note_numbers(path, numbers.dump(numbers.of_record(record(1.0))))
    first.note_verdict(path, "T-2.10", None, {"verdict": "holds"})
    first.note_verdict(path, "T-2.9", "L01", {"verdict": "holds"})
    assert first.write() == []
    second = Snapshots()
    second.note_verdict(path, "T-2.10", None, {"verdict": "refuted"})
    second.write()
    content = load(path)
    assert list(content["verdicts"].items()) == [
        ("T-2.9 L01", {"verdict": "holds"}),
        ("T-2.10", {"verdict": "refuted"}),
    ]
    assert content["numbers"] == numbers.of_record(record(1.0))["numbers"]


def test_claims_that_are_stated_no_more_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setenv("DL_FINDINGS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny" / "quick" / "toy.json"
    for stated, expected in [
        (None, ["T-2.1", "T-2.2 L01"]),
        ({"T-2.1", "T-2.2"}, ["T-2.1", "T-2.2 L01"]),
        ({"T-2.1"}, ["T-2.1"]),
    ]:
        first = Snapshots()
        first.note_verdict(path, "T-2.1", None, {"verdict": "holds"})
        first.note_verdict(path, "T-2.2", "L01", {"verdict": "holds"})
        first.write()
        second = Snapshots()
        second.note_verdict(path, "T-2.1", None, {"verdict": "refuted"})
        assert second.write(stated) == ["tiny T-2.2 L01"][: 2 - len(expected)]
        assert list(load(path)["verdicts"]) == expected


@pytest.mark.parametrize("text", ["", "{", "[]", '{"numbers": 1}', '{"verdicts": {"T-2.1": "holds"}}'])
def test_damaged_snapshots_are_one_line(tmp_path, text):
    path = tmp_path / "snapshot.json"
    path.write_text(text)
    with pytest.raises(UserError, match="snapshot") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_every_committed_snapshot_is_of_the_form():
    found = {address: form.fault(files.read_json(address.path, "snapshot")) for address in all_addresses()}
    assert set(found.values()) == {None}, found


def test_numbers_in_ids_count_as_numbers():
    assert sorted(["T-10.1", "T-2.10", "T-2.9b", "T-2.9"], key=natural) == ["T-2.9", "T-2.9b", "T-2.10", "T-10.1"]


# ---- through pytest and syrupy


def test_numbers_pass_after_an_update_and_fail_when_they_move(suite):
    suite.run("-k", "toy_matches").stdout.fnmatch_lines(["E*record it with --snapshot-update"])
    suite.run("--snapshot-update").assert_outcomes(passed=4, xfailed=1, skipped=1)
    suite.run().assert_outcomes(passed=4, xfailed=1, skipped=1)
    suite.values({"loss": [1.0] * 4, "layer_loss": [[1.1] * 4, [2.0] * 4, [4.0] * 4]})
    result = suite.run("--fresh", "-k", "toy_matches")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "E*layer_loss[[]layer=0[]]: 0.99 -> 1.1 nat/token (+11.11%, 11.1 x the tolerance)",
            "E*loss: 0.99 -> 1 nat/token (+1.01%, 1.01 x the tolerance)",
        ]
    )


def test_an_update_of_some_claims_keeps_the_rest(suite):
    suite.run("--snapshot-update")
    before = suite.recorded()
    suite.values({"loss": [3.0] * 4, "layer_loss": [[1.0] * 4] * 3})
    suite.run("--fresh", "--snapshot-update", "-k", "X-1.1 and not X-1.1b").assert_outcomes(xfailed=1)
    after = suite.recorded()
    assert after["verdicts"].pop("X-1.1")["verdict"] == "refuted"
    assert before["verdicts"].pop("X-1.1")["verdict"] == "holds"
    assert after == before


def test_an_update_forgets_claims_that_no_test_states(suite):
    suite.run("--snapshot-update")
    text = (suite.folder / "test_toy.py").read_text()
    suite.claims(text.replace("X-1.1b", "X-1.2").replace("X-1.10", "X-1.3"))
    suite.run()
    assert "X-1.1b L00" in suite.recorded()["verdicts"]
    result = suite.run("--snapshot-update", "-k", "X-1.3")
    result.stdout.fnmatch_lines(
        ["verdicts of claims that no longer exist, taken out: tiny X-1.1b L00, tiny X-1.1b L01, tiny X-1.1b L02, *"]
    )
    assert list(suite.recorded()["verdicts"]) == ["X-1.1", "X-1.3"]


def test_without_the_option_nothing_is_written(suite):
    suite.run()
    assert not suite.snapshot().exists()
    suite.run("--snapshot-update")
    content = suite.snapshot().read_bytes()
    suite.values({"loss": [3.0] * 4, "layer_loss": [[1.0] * 4] * 3})
    suite.run("--fresh")
    assert suite.snapshot().read_bytes() == content


def test_updating_twice_changes_nothing(suite):
    suite.run("--snapshot-update")
    content = suite.snapshot().read_bytes()
    suite.run("--snapshot-update", "--fresh")
    assert suite.snapshot().read_bytes() == content


def test_a_truncated_snapshot_is_one_line_per_test_and_survives_an_update(suite):
    suite.run("--snapshot-update")
    half = suite.snapshot().read_text()[:100]
    suite.snapshot().write_text(half)
    result = suite.run()
    assert "Traceback" not in str(result.stdout)
    result.stdout.fnmatch_lines(["the snapshot *toy.json is not whole JSON*restore it or make it again"])
    suite.run("--snapshot-update")
    assert suite.snapshot().read_text() == half


def test_against_compares_with_another_subject(suite):
    suite.run("--snapshot-update")
    suite.run("--subject", "small", "--against", "tiny").assert_outcomes(passed=4, xfailed=1, skipped=1)
    suite.values({"loss": [3.0] * 4, "layer_loss": [[1.0] * 4] * 3})
    result = suite.run("--subject", "small", "--against", "tiny", "--fresh", "-k", "toy_matches or X-1.1")
    result.stdout.fnmatch_lines(["*on tiny the verdict is holds (measured 0.99, needed < 2); here it is refuted"])
    result.assert_outcomes(passed=2, failed=3)


def test_conditions_have_snapshots_of_their_own(suite, monkeypatch):
    monkeypatch.setattr("fixtures.devices.cuda_devices", lambda: 1)
    suite.run("--snapshot-update")
    suite.run("--snapshot-update", "--dtype", "float32", "--device", "cuda")
    assert suite.snapshot(condition="quick-float32-cuda").exists()
    assert suite.recorded(condition="quick-float32-cuda")["condition"] == "quick-float32-cuda"
