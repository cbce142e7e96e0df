"""Figure of T-3 layer swap cost: the matrix of exchanged pairs, its tree of zones, and cost over depth and distance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import linkage

from lab.experiments.layers.layer_swap_cost import LayerSwapCost
from lab.report import drawing
from lab.statistics.clustering import condensed

ZONES = 3


def figure(records: Sequence[LayerSwapCost]) -> Figure:
    """Mean cost of each layer and of each distance; for every record the matrix D and its Ward tree, cut in three."""
    rows = [[f"matrix {index}", f"tree {index}"] for index in range(len(records))]
    drawn, panels = drawing.mosaic([["layer", "distance"], *rows])
    rise = "mean rise of the loss [nat/token]"
    drawing.depth_profiles(panels["layer"], records, "layer_cost", label=rise, scale="symlog")
    panels["layer"].set_title("Exchanged with any other layer")
    drawing.curves(
        panels["distance"],
        records,
        "mean_by_distance",
        x=_relative_distance,
        x_label="distance [layers / number of layers]",
        label=rise,
    )
    drawing.set_scale(panels["distance"], "symlog")
    panels["distance"].set_title("Pairs so far apart")
    for (matrix, tree), record in zip(rows, records, strict=True):
        drawing.heatmap(
            panels[matrix],
            record.relative_cost,
            title=drawing.name_of(record),
            label="rise / intact loss [1]",
            x_label="exchanged layer",
            y_label="exchanged layer",
            scale="log",
        )
        _tree(panels[tree], record)
    drawing.legend(drawn, records)
    return drawn


def describe(records: Sequence[LayerSwapCost]) -> str:
    """The layer most bound to its place, and the cheapest pair."""
    seen = "; ".join(_ends(record) for record in records)
    return (
        "Rise of the completion loss when two decoder layers exchange places: mean over partners at each relative "
        f"depth, mean at each distance, the matrix of all pairs, and its Ward tree cut into {ZONES} zones. {seen}."
    )


def _tree(axes: Axes, record: LayerSwapCost) -> None:
    joins = linkage(condensed(record.cost), "ward", optimal_ordering=True)
    cut = float(joins[-ZONES:, 2][:2].mean())  # between the join that leaves three branches and the next
    drawing.dendrogram(axes, joins, title="Ward tree of the rises", label="height of the join [nat/token]", cut=cut)


def _relative_distance(record: LayerSwapCost, costs: xr.DataArray) -> np.ndarray:
    relative: np.ndarray = costs.distance.values / record.n_layers
    return relative


def _ends(record: LayerSwapCost) -> str:
    dearest, (i, j) = record.layers_by_cost[0], record.pairs_by_cost[0]
    return (
        f"{drawing.name_of(record)}: layer {dearest} costs most ({float(record.layer_cost[dearest]):.2f} nat per token "
        f"on average), layers {i} and {j} exchange most cheaply ({float(record.cost[i, j]):+.3f})"
    )
