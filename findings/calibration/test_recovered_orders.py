"""Records of recovered orders, read back from orders that were written down by hand."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from lab.errors import NotApplicable
from lab.records import variable
from lab.statistics.recovered_orders import RecoveredOrders

pytestmark = pytest.mark.calibration

#: where two methods put each of four layers, in two runs
POSITIONS = [[[0, 1, 2, 3], [1, 0, 2, 3]], [[3, 2, 1, 0], [2, 0, 1, 3]]]
#: 1 - 4 inversions / 12
TAU = [[1.0, 2 / 3], [-1.0, 1 / 3]]


class Orders(RecoveredOrders):
    """Runs are what is sampled."""

    sampling = {"seed": None}  # noqa: RUF012


def measured():
    data = xr.Dataset(
        {
            "recovered_position": variable(("method", "seed", "layer"), POSITIONS, "position", "made up"),
            "kendall_tau": variable(("method", "seed"), TAU, "1", "made up"),
            "position_accuracy": variable(("method", "seed"), [[1.0, 0.5], [0.0, 0.25]], "1", "made up"),
        },
        {"method": ["good", "bad"], "seed": [0, 1], "layer": [0, 1, 2, 3]},
        {"subject": "made-up", "source": "measured", "condition": "quick"},
    )
    return Orders(data)


def test_what_two_runs_recovered():
    record = measured()
    assert record.n_layers == 4
    assert record.methods == ["good", "bad"]
    assert record.tau.values == pytest.approx([5 / 6, -1 / 3])
    assert record.exact_share.values == pytest.approx([0.75, 0.125])
    assert record.of("kendall_tau", "bad") == pytest.approx(-1 / 3)
    assert record.runs("kendall_tau", "bad") == pytest.approx([-1, 1 / 3])
    assert record.magnitude("bad") == pytest.approx(2 / 3)
    assert record.ranking(["bad", "good"]) == ["good", "bad"]


def test_orders_are_the_inverse_of_positions():
    record = measured()
    assert record.positions("bad").tolist() == POSITIONS[1]
    assert record.orders("bad").tolist() == [[3, 2, 1, 0], [1, 2, 0, 3]]


def test_pairs_in_the_wrong_order():
    """Of (2, 0, 1, 3), layer 0 stands after layers 1 and 2."""
    wrong = measured().inverted("bad")[1]
    assert np.argwhere(wrong).tolist() == [[0, 1], [0, 2]]
    assert not measured().inverted("good")[0].any()


def test_published_orders_and_means_over_runs_are_one_run():
    published = xr.Dataset(
        {
            "recovered_order": variable(("method", "position"), [[1, 2, 0, 3]], "layer", "made up"),
            "kendall_tau": variable("method", [1 / 3], "1", "made up"),
        },
        {"method": ["bad"]},
        {"subject": "made-up", "source": "published", "condition": "published"},
    )
    record = RecoveredOrders(published)
    assert record.positions("bad").tolist() == [[2, 0, 1, 3]]
    assert record.runs("kendall_tau", "bad") == pytest.approx([1 / 3])
    with pytest.raises(NotApplicable, match="holds no good"):
        record.of("kendall_tau", "good")
    snapshot = Orders(measured().summary().assign_attrs(measured().data.attrs))
    # mean positions 2.5, 1, 1, 1.5: of equals the first layer comes first
    assert snapshot.positions("bad").tolist() == [[3, 0, 1, 2]]
