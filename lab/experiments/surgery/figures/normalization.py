"""Figure of T-15 normalization: swaps of the whole model, norms of single layers, and what norms see over depth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from lab.experiments.surgery.normalization import Normalization
from lab.report import drawing

RISE = "rise of the loss [nat/token]"
#: rise of the loss over that of a uniform guess
SHARE = "damage fraction [1]"
#: swaps in the figure, by what they change: eps, mean, gain, axis, statistics, everything
SWAPS = (
    "rms_norm_eps_10",
    "layer_norm",
    "no_gain",
    "group_norm_8_token",
    "group_norm_1",
    "group_norm_8",
    "batch_norm",
    "batch_norm_published",
    "frozen_scale_first_exact",
    "identity",
)
#: where a bar of a loss that is not finite ends
OVERFLOW = 10.0


def figure(records: Sequence[Normalization]) -> Figure:
    """Swaps everywhere; one layer without norms, and with a constant scale; the stream and its means."""
    layout = [["swaps", "swaps"], ["removed", "frozen"], ["pooled", "token"], ["means", "outputs"]]
    drawn, panels = drawing.mosaic(layout)
    drawing.bars(panels["swaps"], records, _swaps, x_label="replacement of all norms, by family", label=SHARE)
    drawing.set_scale(panels["swaps"], "symlog", 0.01)
    drawing.reference(panels["swaps"], 1, "uniform guess")
    panels["swaps"].set_title(f"Swaps without training; bars at {OVERFLOW:.0f} overflow or go beyond")
    for name, quantity, title in (
        ("removed", "removed_damage", "One layer's norms replaced by identity"),
        ("frozen", "frozen_damage", "By a constant scale, first token exact"),
    ):
        drawing.depth_profiles(panels[name], records, quantity, label=RISE, scale="symlog", linear_below=0.1)
        panels[name].set_title(title)
    for name, quantity, title, label in (
        ("pooled", "layer_output_std", "Residual stream, all elements", "standard deviation [1]"),
        ("token", "layer_output_token_rms", "Residual stream, median token", "root mean square [1]"),
    ):
        drawing.depth_profiles(panels[name], records, quantity, label=label, scale="log")
        panels[name].set_title(title)
    drawing.depth_profiles(panels["means"], records, "mean_to_std_vs_chance", label="|mean| / spread over chance [1]")
    drawing.reference(panels["means"], 1, "random vectors")
    panels["means"].set_title("Channel mean at pre-attention norms")
    drawing.depth_profiles(panels["outputs"], records, "output_std", label="standard deviation [1]", scale="log")
    panels["outputs"].set_title("Output of pre-attention norms")
    drawing.legend(drawn, records)
    return drawn


def describe(records: Sequence[Normalization]) -> str:
    """What layer norm and the removal of norms cost, and where the stream jumps."""
    seen = "; ".join(map(_seen, records))
    return (
        "Rise of the loss when RMSNorm is replaced in the whole model and in single layers, over relative depth; the "
        "residual stream of all elements and of the median token; channel means beside those of random vectors. "
        f"{seen}."
    )


def _swaps(record: Normalization) -> xr.DataArray:
    """Damage fractions of the swaps [swap]; NaN, which leaves a gap, where the record has none."""
    shares = {name: record.damage_fraction(name) for name in SWAPS if name in record.variants}
    # The published layer norm, which takes query and key norms along, stands for the one that does not.
    shares["layer_norm"] = record.fraction(record.layer_norm_damage)
    values = np.clip([shares.get(name, np.nan) for name in SWAPS], -1, OVERFLOW)
    return xr.DataArray(values, {"swap": list(SWAPS)}, ("swap",))


def _seen(record: Normalization) -> str:
    removed = record.removed_damage
    least = int(np.argmin(removed.values))
    return (
        f"{drawing.name_of(record)}: layer norm {record.layer_norm_damage:+.2f} nat per token, one layer without norms "
        f"{float(removed[least]):+.2f} (layer {least}) to {float(removed.max()):+.2f}; the pooled stream grows "
        f"{record.jump:.1f}-fold at layer {record.jump_layer}"
    )
