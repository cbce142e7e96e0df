"""Figure of T-4 residual geometry: dimension, angles, norms and updates of the residual stream over depth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.experiments.layers.residual_geometry import EMBEDDING, ResidualGeometry
from lab.report import drawing

DEPTH = "relative depth [layers / number of layers]"


def figure(records: Sequence[ResidualGeometry]) -> Figure:
    """Dimension of the states, as they are and robust, angles between tokens, norms, updates, and the final state."""
    drawn, axes = drawing.panels(4, 2)
    raw, robust, alike, gap, norm, final, ratio, alignment = axes
    dimension = "participation ratio [dimensions]"
    _sites(raw, records, "participation_ratio", dimension, scale="log")
    raw.set_title("Dimension of the states")
    _sites(robust, records, "robust_participation_ratio", dimension, scale="log")
    robust.set_title("Without the norms of single tokens")
    together = [limit for axis in (raw, robust) for limit in axis.get_ylim()]
    for axis in (raw, robust):
        axis.set_ylim(min(together), 1.15 * max(together))
    _sites(alike, records, "cosine_raw_mean", "mean cosine of two tokens [cosine]")
    alike.set_title("How alike tokens are")
    _sites(gap, records, "category_gap", "within minus between [cosine]")
    gap.set_title("Categories of prompts told apart")
    _sites(norm, records, "norm_mean", "mean norm of the state [norm]", scale="log")
    norm.set_title("Growth of the stream")
    _sites(final, records, "cosine_to_final", "cosine with the final state [cosine]")
    final.set_title("The way to the final state")
    drawing.depth_profiles(ratio, records, "update_ratio", label="norm of update / output [ratio]")
    ratio.set_title("Size of the updates")
    drawing.depth_profiles(alignment, records, "update_alignment", label="update and input [cosine]")
    drawing.reference(alignment, 0, "orthogonal")
    alignment.set_title("Direction of the updates")
    drawing.legend(drawn, records)
    return drawn


def describe(records: Sequence[ResidualGeometry]) -> str:
    """Where each record's dimension is lowest, and what is left of that without the norms of single tokens."""
    seen = "; ".join(_lowest(record) for record in records)
    return (
        "Residual stream over relative depth: effective dimension of the token states, as they are and without the "
        "norms of single tokens, mean cosine of two tokens, gap between categories of prompts, mean norm, cosine with "
        f"the final state, and size and direction of each layer's update. Lowest dimension between the ends: {seen}."
    )


def _sites(
    axes: Axes, records: Sequence[ResidualGeometry], name: str, label: str, scale: drawing.Scale = "linear"
) -> None:
    drawing.curves(axes, records, name, x=_depth, x_label=DEPTH, label=label)
    axes.set_xlim(-0.02, 1.02)
    drawing.set_scale(axes, scale)


def _depth(record: ResidualGeometry, profile: xr.DataArray) -> np.ndarray:
    """Relative depth of each site: embedding 0, last layer 1."""
    depth: np.ndarray = (profile["site"].values - EMBEDDING) / record.n_layers
    return depth


def _lowest(record: ResidualGeometry) -> str:
    dimension = record.interior(record.participation_ratio)
    site = int(dimension.idxmin())
    robust = float(record.robust_participation_ratio.sel(site=site))
    lowest = f"{drawing.name_of(record)}: {float(dimension.min()):.1f} after layer {site}"
    return f"{lowest}, where the robust one is {robust:.0f}"
