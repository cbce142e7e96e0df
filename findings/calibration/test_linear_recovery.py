"""Recoveries of layers replaced by matrices, derived from losses that were written down by hand."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from lab.errors import NotApplicable
from lab.records import variable
from lab.statistics.linear_recovery import LinearRecovery

pytestmark = pytest.mark.calibration

#: loss with layers 0 to 3 left out; layer 2 was not replaced, layer 3 costs a tenth of a nat only
KNOCKED_OUT = [4.0, 3.0, np.nan, 2.1]


def measured(**more):
    """A record of two prompts of equal losses, whose token counts therefore do not matter: 2 nat with all layers."""

    def twice(values, unit):
        return variable(("prompt", "layer"), [values, values], unit, "made up")

    losses = {
        "knockout_loss": KNOCKED_OUT,
        "residual_loss": [2.5, 2.1, np.nan, 2.0],
        "normalized_loss": [2.2, 2.3, np.nan, 2.0],
        "all_tokens_loss": [3.0, 2.6, np.nan, 2.0],
    }
    squares = {
        "residual_error_squares": [1.0, 3.0, np.nan, 1.0],
        "residual_deviation_squares": [4.0, 4.0, np.nan, 2.0],
        "all_tokens_error_squares": [2.0, 3.0, np.nan, 1.0],
        "all_tokens_deviation_squares": [20.0, 30.0, np.nan, 2.0],
    }
    data = xr.Dataset(
        {
            "scored_tokens": variable("prompt", [10, 30], "token", "scored tokens"),
            "baseline_loss": variable("prompt", [2.0, 2.0], "nat/token", "made up"),
            **{name: twice(values, "nat/token") for name, values in losses.items()},
            **{name: twice(values, "1") for name, values in squares.items()},
            **more,
        },
        {"layer": [0, 1, 2, 3]},
        {"subject": "made-up", "source": "measured", "condition": "quick"},
    )
    return LinearRecovery(data)


def test_recoveries_of_known_losses():
    """Layer 0 costs 2 nat, of which 1.5 come back; layer 1 costs 1, of which 0.9 do; 3 costs too little to tell."""
    record = measured()
    assert record.knockout_delta.values == pytest.approx([2, 1, np.nan, 0.1], nan_ok=True)
    assert record.recovery["layer"].values.tolist() == [0, 1]
    assert record.recovery.values == pytest.approx([0.75, 0.9])
    assert record.normalized_recovery.values == pytest.approx([0.9, 0.7])
    assert record.best_recovery.values == pytest.approx([0.9, 0.9])
    assert record.replaced_recovery.values == pytest.approx([0.75, 0.9, 1.0])


def test_what_an_exact_first_position_adds():
    record = measured()
    assert record.all_tokens_recovery.values == pytest.approx([0.5, 0.4])
    assert record.best_all_tokens_recovery.values == pytest.approx([0.5, 0.4])
    assert record.exact_first_gain.values == pytest.approx([0.25, 0.5])


def test_explained_variance_of_known_errors():
    record = measured()
    assert record.r2.values == pytest.approx([0.75, 0.25])
    assert record.all_tokens_r2.values == pytest.approx([0.9, 0.9])


def test_ranks_of_cut_maps():
    losses = [[3.0, 2.0], [2.5, 2.2], [np.nan, np.nan], [2.0, 2.0]]
    record = measured(low_rank_loss=variable(("prompt", "layer", "rank"), [losses, losses], "nat/token", "made up"))
    assert record.low_rank_recovery.dims == ("layer", "rank")
    assert record.low_rank_recovery.values == pytest.approx(np.array([[0.5, 1.0], [0.5, 0.8]]))


def test_layers_that_say_nothing_are_named_in_one_line():
    record = measured()
    assert record.of_replaced(record.recovery, 1) == pytest.approx(0.9)
    for layer in (2, 3):
        with pytest.raises(NotApplicable, match="not replaced under this budget"):
            record.of_replaced(record.recovery, layer)


def test_a_layer_that_costs_just_enough_counts():
    """0.15 nat is the least, and counts."""
    record = measured()
    record.data["knockout_loss"].loc[{"layer": 3}] = 2 + 0.15 + 1e-9
    assert record.recovery["layer"].values.tolist() == [0, 1, 3]


def test_published_figures_are_taken_as_they_are():
    """They rest on many tokens: every layer counts that was replaced; and they know maps of all positions only."""
    recovery, r2 = np.linspace(0.2, 0.9, 9), np.linspace(0.6, 0.8, 9)
    recovery[1] = np.nan
    data = xr.Dataset(
        {
            "knockout_loss_delta": variable(
                "layer", np.where(np.isnan(recovery), np.nan, 0.01), "nat/token", "made up"
            ),
            "recovery_residual": variable("layer", recovery, "fraction", "made up"),
            "r2_residual": variable("layer", r2, "fraction", "made up"),
        },
        {"layer": np.arange(9)},
        {"subject": "made-up", "source": "published", "condition": "published"},
    )
    record = LinearRecovery(data)
    assert record.recovery["layer"].values.tolist() == [0, 2, 3, 4, 5, 6, 7, 8]
    assert record.all_tokens_recovery.values.tolist() == np.delete(recovery, 1).tolist()
    assert record.r2.values.tolist() == r2.tolist()
    for asked in (lambda: record.exact_first_gain, record.require_unseen):
        with pytest.raises(NotApplicable, match="no map with an exact first position that is scored on prompts"):
            asked()
    # Spearman over the eight layers that both hold
    assert record.correlation(record.all_tokens_r2, record.recovery) == pytest.approx(1)
