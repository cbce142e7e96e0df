"""Two subjects side by side: the report of two small snapshots that were written down by hand."""

from __future__ import annotations

import pytest

from lab.snapshots.comparison import report
from lab.snapshots.drift import SHOWN

pytestmark = pytest.mark.calibration


def entry(values, unit="nat", **coords):
    return {"unit": unit, "dims": list(coords), "coords": coords, "values": values}


def snapshot(name, numbers, **provenance):
    return {"experiment": "made_up", "subject": name, "numbers": numbers, "provenance": provenance}


BEFORE = {
    "cost": entry([1.0, 2.0, 3.0], layer=[0, 1, 2]),
    "norm": entry([1.0, 1.0, 1.0, 1.0], slot=[-1, 0, 1, 2]),
    "loss": entry([2.0]),
    "share": entry([0.5, 0.5], head=[0, 1]),
    "gone": entry([1.0]),
}
AFTER = {
    "cost": entry([1.0, 2.5, 7.0], layer=[0, 1, 2]),
    "norm": entry([1.0, 1.0, 4.0, 1.0], slot=[-1, 0, 1, 2]),
    "loss": entry([2.5]),
    "share": entry([0.5, 0.5, 0.5], head=[0, 1, 2]),
    "come": entry([1.0]),
}


def test_layers_come_first_then_what_belongs_to_none_then_what_cannot_be_compared():
    """Eight numbers are on both sides, 3 + 4 + 1, of which 2 + 1 + 1 differ; nothing is tolerated here."""
    lines = report(
        snapshot("a", BEFORE, subject="x", corpus="u", dtype="bfloat16", device="cpu"),
        snapshot("b", AFTER, subject="y", corpus="v", dtype="float32", device="cpu"),
    )
    assert lines[0] == "4 of 8 numbers differ by more than their tolerance (a -> b)"
    places = sorted(line.partition(":")[0] for line in lines[1:4])
    assert places == ["layer 1", "layer 2", "slot 1"]
    assert [line.partition(":")[0].split()[0] for line in lines[1:4]] == ["layer", "layer", "slot"]
    assert all("cost" in line for line in lines[1:3])
    assert "norm" in lines[3]
    assert lines[4] == "beside the layers:"
    assert lines[5].startswith("  loss: 2 -> 2.5") or lines[5].startswith("  loss: 2.0 -> 2.5")
    assert lines[6:] == [
        "not compared, for their labels differ: share",
        "what else differs:",
        "  dtype: bfloat16 -> float32",
    ]


def test_nothing_differs_from_itself():
    own = snapshot("a", BEFORE, dtype="bfloat16")
    assert report(own, own) == ["0 of 11 numbers differ by more than their tolerance (a -> a)"]


def test_subjects_of_other_depth_are_said_to_be():
    """Nothing by layer is compared where there are more of them."""
    deeper = BEFORE | {"cost": entry([1.0, 2, 3, 4], layer=[0, 1, 2, 3])}
    lines = report(snapshot("a", BEFORE), snapshot("b", deeper))
    assert lines == [
        "0 of 8 numbers differ by more than their tolerance (a -> b)",
        "a has 3 layers and b has 4: 1 quantities by layer, pair, block or step are not compared; claims are",
    ]


def test_only_the_farthest_layers_are_spelled_out():
    many = list(range(SHOWN + 3))
    old, new = ({"cost": entry(values, layer=many)} for values in ([0.0] * len(many), [1.0] * len(many)))
    lines = report(snapshot("a", old), snapshot("b", new))
    assert len(lines) == 1 + SHOWN + 1
    shown = [int(line.split()[1].rstrip(":")) for line in lines[1 : 1 + SHOWN]]
    rest = [int(layer) for layer in lines[-1].removeprefix("and layer ").split(", ")]
    assert sorted(shown + rest) == many
    assert rest == sorted(rest)
