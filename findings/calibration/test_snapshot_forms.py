"""What a snapshot's text looks like, which content is refused and by what name, and how differences travel."""

import copy
import json

import numpy as np
import pytest
import xarray as xr

from lab.errors import UserError
from lab.records import variable
from lab.snapshots import comparison, differences, drift, form, numbers, provenance
from lab.snapshots.addresses import Address
from lab.snapshots.differences import VerdictMove
from lab.snapshots.drift import Move
from lab.snapshots.labels import Label, labels

pytestmark = pytest.mark.calibration

LOSS = {"unit": "nat/token", "dims": ["layer"], "coords": {"layer": [0, 1]}, "values": [1.0, None]}
WHOLE = {
    "experiment": "toy",
    "subject": "tiny",
    "condition": "quick-bfloat16",
    "provenance": {"libraries": {"torch": "2.13"}},
    "numbers": {"loss": LOSS},
    "bands": {"loss": {**LOSS, "coords": {"layer": [5, 6]}}},
    "verdicts": {"X-1.1": {"verdict": "holds", "measured": 1.0}},
}


def changed(path, value):
    """The whole snapshot with one entry, given by its keys joined with /, exchanged or, for `...`, left out."""
    content = copy.deepcopy(WHOLE)
    *parents, last = path.split("/")
    place = content
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return content


def test_a_whole_snapshot_has_no_fault():
    """Bands need not have the labels of the numbers, and a file may hold verdicts alone."""
    assert form.fault(WHOLE) is None
    assert form.fault({"verdicts": WHOLE["verdicts"]}) is None
    assert form.fault({}) is None


@pytest.mark.parametrize(
    ("path", "value", "part"),
    [
        ("numbers", [], "numbers"),
        ("bands", 3, "bands"),
        ("verdicts", [], "verdicts"),
        ("verdicts/X-1.1", "holds", "verdicts (X-1.1)"),
        ("experiment", ..., "experiment"),
        ("subject", 3, "subject"),
        ("condition", None, "condition"),
        ("provenance", [], "provenance"),
        ("numbers/loss", [], "numbers (loss)"),
        ("numbers/loss/unit", ..., "numbers (loss)"),
        ("numbers/loss/dims", "layer", "numbers (loss)"),
        ("numbers/loss/dims", [3], "numbers (loss)"),
        ("numbers/loss/dims", ["layer", "layer"], "numbers (loss)"),
        ("numbers/loss/dims", ["step"], "numbers (loss)"),
        ("numbers/loss/coords", [], "numbers (loss)"),
        ("numbers/loss/coords/layer", "01", "numbers (loss)"),
        ("numbers/loss/coords/layer", [0, "1"], "numbers (loss)"),
        ("numbers/loss/coords/layer", [0, float("inf")], "numbers (loss)"),
        ("numbers/loss/coords/layer", [0, 2**63], "numbers (loss)"),
        ("numbers/loss/values", [1.0], "numbers (loss)"),
        ("numbers/loss/values", [1.0, []], "numbers (loss)"),
        ("numbers/loss/values", [1.0, -(2**63)], "numbers (loss)"),
        ("bands/loss/values", {}, "bands (loss)"),
        ("numbers/more", {**LOSS, "coords": {"layer": [0, 2]}}, "numbers (more, which labels layer otherwise)"),
    ],
)
def test_a_fault_is_told_by_its_part(path, value, part):
    assert form.fault(changed(path, value)) == part


def test_the_text_has_a_line_for_each_part_of_a_variable_and_for_each_verdict():
    content = {"subject": "tiny", "numbers": {"loss": LOSS}, "verdicts": WHOLE["verdicts"]}
    assert numbers.dump(content).splitlines() == [
        "{",
        ' "subject": "tiny",',
        ' "numbers": {',
        '  "loss": {',
        '   "unit": "nat/token",',
        '   "dims": ["layer"],',
        '   "coords": {"layer": [0, 1]},',
        '   "values": [1.0, null]',
        "  }",
        " },",
        ' "verdicts": {',
        '  "X-1.1": {"verdict": "holds", "measured": 1.0}',
        " }",
        "}",
    ]


def test_infinities_are_numbers_beside_numbers():
    content = numbers.of_summary(xr.Dataset({"loss": variable("layer", [1.0, np.inf, -np.inf, np.nan], "nat", "loss")}))
    written = numbers.parse(numbers.dump(content))
    assert written["loss"]["values"] == [1.0, "inf", "-inf", None]
    assert numbers.values_of(written["loss"]).tolist()[:3] == [1.0, np.inf, -np.inf]
    assert np.isnan(numbers.values_of(written["loss"])[3])
    moved = copy.deepcopy(written)
    moved["loss"]["values"][0] = 2.0
    (move,) = drift.of_variable("unknown", "loss", written, moved)
    assert (move.labels, move.before, move.after) == ((Label("layer", 0, ""),), 1.0, 2.0)
    assert numbers.values_of({**LOSS, "values": ["inf", "a"]}).tolist() == ["inf", "a"]


def test_a_snapshot_of_no_experiment_is_one_line():
    with pytest.raises(UserError, match="a snapshot is of 'toy', which is no experiment here; restore it"):
        numbers.to_record(WHOLE)


def test_a_part_of_the_provenance_that_is_no_object_any_more_is_named():
    old, new = {"settings": {"prompts": 28}}, {"settings": None}
    assert provenance.changes(old, new) == ["settings: {'prompts': 28} -> None"]
    assert provenance.changes(new, old) == ["settings: None -> {'prompts': 28}"]


def test_only_whole_numbers_are_numbered_places_and_only_names_name_them():
    found = numbers.of_summary(
        xr.Dataset(
            {
                "loss": variable("scale", [1.0, 2.0], "nat/token", "loss"),
                "scale_name": variable("scale", ["half", "whole"], "name", "name"),
                "norm": variable("tensor", [1.0, 2.0], "1", "norm"),
                "tensor_name": variable("tensor", ["q", "k"], "name", "name"),
            },
            {"scale": [0.5, 1.0]},
        )
    )
    for name in ("loss", "scale_name"):
        found[name]["coords"]["scale"] = [0.5, 1]
    assert labels(found, "loss", [(0,)]) == [(Label("scale", 0.5, ""),)]
    assert labels(found, "norm", [(1,)]) == [(Label("tensor", 1, "name=k"),)]
    found["tensor_name"]["values"][0] = None
    assert labels(found, "norm", [(1,)]) == [(Label("tensor", 1, ""),)], "not every entry has a name"


def test_subjects_are_as_deep_as_their_deepest_profile():
    """Some quantities are of a few layers only, and others of none."""
    few = {"unit": "nat", "dims": ["layer"], "coords": {"layer": [3]}, "values": [1.0]}
    total = {"unit": "nat", "dims": [], "coords": {}, "values": [1.0]}

    def of(subject, depth):
        every = {**few, "coords": {"layer": list(range(depth))}, "values": [1.0] * depth}
        own = {"few": few, "every": every, "total": total}
        return {"experiment": "toy", "subject": subject, "provenance": {}, "numbers": own}

    deep = "a has 4 layers and b has 6: 1 quantities by layer, pair, block or step are not compared; claims are"
    assert deep in comparison.report(of("a", 4), of("b", 6))
    flat, one = of("a", 1), of("b", 1)
    flat["numbers"] = {"total": total, "few": total, "every": total}
    assert any(line.startswith("a has 0 layers and b has 1: ") for line in comparison.report(flat, one))


def test_a_difference_survives_its_way_between_processes():
    address = Address("tiny", "quick-bfloat16", "toy")
    labelled = (Label("layer", 3, ""), Label("pair", 7, "first_layer=1"))
    move = Move("loss", "1 -> 2 nat", 50.0, labelled, 1.0, 2.0, "nat")
    verdict = VerdictMove("X-1.1 L03", {"verdict": "holds"}, {"verdict": "refuted"})
    found = differences.Difference(address, "both", "1 of 2 numbers moved", (move,), (verdict,), ("device: a -> b",))
    assert differences.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_verdicts_join_the_numbers_of_their_snapshot_or_stand_alone():
    first, second = (Address("tiny", "quick-bfloat16", name) for name in ("another", "toy"))
    verdict = VerdictMove("X-1.1", {"verdict": "holds"}, {"verdict": "refuted"})
    found = differences.Difference(second, "both", "none of 2 numbers moved", (), (), ())
    alone, joined = differences.merged({second: found}, {first: [verdict], second: [verdict]})
    assert (alone.address, alone.headline, alone.verdicts) == (first, "the numbers were not compared", (verdict,))
    assert (joined.address, joined.headline, joined.verdicts) == (second, found.headline, (verdict,))
