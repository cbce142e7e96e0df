"""Figure of T-7 layer linearization gap: curvature and rounding over depth, and layers as matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.experiments.layers.linearization_gap import LinearizationGap
from lab.report import drawing

#: Range of the recoveries that are drawn: an interval of a layer that is worth next to nothing has no bounds.
RECOVERIES = (-0.5, 1.2)


def figure(records: Sequence[LinearizationGap]) -> Figure:
    """Gap without and with rounding over depth, the gap against the move, consistency, and recovery by matrices."""
    drawn, panels = drawing.panels(3, 2)
    gap, rounded, move, consistency, recovery, variance = panels
    drawing.depth_profiles(gap, records, "ungated_gap", label="gap at moves of 5 % [1]", scale="log")
    gap.set_title("Without rounding; published: de-noised")
    drawing.depth_profiles(rounded, records, "rounded_gap", label="gap at moves of 5 % [1]", scale="log")
    rounded.set_title("With rounding, as published")
    _same_range(gap, rounded)
    _moves(move, records)
    drawing.depth_profiles(consistency, records, _consistency, label="cosine of J u [1]")
    consistency.set_title("Jacobians in different prompts")
    drawing.depth_profiles(recovery, records, "replaced_recovery", label="recovered loss [share of knockout]")
    recovery.set_title("A matrix in the layer's place")
    drawing.reference(recovery, 0, "as without the layer")
    recovery.set_ylim(*RECOVERIES)
    drawing.scatter(
        variance, records, "r2", "recovery", x_label="R$^2$ of the update [1]", y_label="recovered loss [share]"
    )
    variance.set_title("Explained variance and recovered loss")
    drawing.legend(drawn, records)
    return drawn


def describe(records: Sequence[LinearizationGap]) -> str:
    """How much of each record's published gap is left without rounding, and what a matrix recovers of a layer."""
    seen = "; ".join(_summary(record) for record in records)
    return (
        "Relative deviation of a layer's response to a move of 5 % from its linear part, over relative depth, without "
        "and with bfloat16 rounding; the gap against the size of the move; agreement of Jacobians across prompts (of "
        "their token means where published); and "
        f"the loss recovered by a matrix in a layer's place. {seen}."
    )


def _moves(axes: Axes, records: Sequence[LinearizationGap]) -> None:
    """Median gap over layers against the size of the move, in both settings."""
    for quantity in (_median_gap, _median_rounded_gap):
        if any(drawing.value(record, quantity) is not None for record in records):
            drawing.curves(axes, records, quantity, x_label="move [share of the state's norm]", label="median gap [1]")
    axes.set_xscale("log")
    drawing.set_scale(axes, "log")
    axes.set_title("Gap against the move, in both settings")


def _median_gap(record: LinearizationGap) -> xr.DataArray:
    return record.gap_by_eps.median("layer")


def _median_rounded_gap(record: LinearizationGap) -> xr.DataArray:
    return record.rounded_gap_by_eps.median("layer")


def _consistency(record: LinearizationGap) -> xr.DataArray:
    # Published figures have the token-averaged form only.
    return record.consistency_token if record.has("jacobian_consistency_token") else record.consistency


def _same_range(*axes: Axes) -> None:
    limits = [panel.get_ylim() for panel in axes]
    for panel in axes:
        panel.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _summary(record: LinearizationGap) -> str:
    plain, rounded = (float(np.median(gap)) for gap in (record.ungated_gap, record.rounded_gap))
    recovery = record.replaced_recovery
    best, worst = (int(recovery["layer"][place(recovery.values)]) for place in (np.argmax, np.argmin))
    return (
        f"{drawing.name_of(record)}: median gap {plain:.3f} without and {rounded:.3f} with rounding, a matrix recovers "
        f"most of layer {best} ({float(recovery.max()):.2f}) and least of layer {worst} ({float(recovery.min()):.2f})"
    )
