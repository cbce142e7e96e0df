"""Figure of T-2 layer knockout: damage over depth, greedy pruning, and the synergy of pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.experiments.layers.layer_knockout import LayerKnockout
from lab.report import drawing


def figure(records: Sequence[LayerKnockout]) -> Figure:
    """Rise of the loss without each layer; the loss along greedy pruning; synergy of every pair, record by record."""
    paired = [record for record in records if drawing.value(record, "synergy") is not None]
    layout = [["damage", "damage"], ["pruning", "agreement"]]
    names = [f"synergy {index}" for index in range(len(paired))]
    layout += [[*names[start : start + 2], "."][:2] for start in range(0, len(names), 2)]
    drawn, panels = drawing.mosaic(layout)
    _damage(panels, records)
    drawing.curves(
        panels["pruning"],
        records,
        _pruning_ratio,
        x=_removed_share,
        x_label="share of layers removed, least harmful first",
        label="loss / intact loss [1]",
    )
    drawing.set_scale(panels["pruning"], "log")
    drawing.depth_profiles(panels["agreement"], records, "top1_agreement", label="top token unchanged [share]")
    for name, record in zip(names, paired, strict=True):
        drawing.heatmap(
            panels[name],
            record.synergy_matrix,
            title=drawing.name_of(record),
            label="synergy of a pair [nat/token]",
            x_label="skipped layer",
            y_label="skipped layer",
            scale="diverging",
        )
    drawing.legend(drawn, records)
    return drawn


def describe(records: Sequence[LayerKnockout]) -> str:
    """Which layer each record cannot do without, and which it misses least."""
    seen = "; ".join(_extremes(record) for record in records)
    return (
        "Rise of the completion loss when one decoder layer is skipped, over relative depth; the loss along greedy "
        f"pruning, the share of unchanged top tokens, and the synergy of pairs of layers. {seen}."
    )


def _damage(panels: dict[str, Axes], records: Sequence[LayerKnockout]) -> None:
    axes = panels["damage"]
    label = "rise of the loss [nat/token]"
    drawing.depth_profiles(axes, records, "loss_delta", label=label, scale="symlog")
    axes.set_title("One layer skipped")
    panels["pruning"].set_title("Layers removed one after the other")
    panels["agreement"].set_title("One layer skipped: predictions kept")


def _pruning_ratio(record: LayerKnockout) -> xr.DataArray:
    return record.pruning_loss / record.pruning_loss.sel(step=0)


def _removed_share(record: LayerKnockout, losses: xr.DataArray) -> np.ndarray:
    share: np.ndarray = losses.step.values / record.n_layers
    return share


def _extremes(record: LayerKnockout) -> str:
    most, least = record.layers_by_damage[0], record.layers_by_damage[-1]
    rise = record.loss_delta
    return (
        f"{drawing.name_of(record)}: most at layer {most} ({float(rise.sel(layer=most)):+.2f} nat per token), "
        f"least at layer {least} ({float(rise.sel(layer=least)):+.3f})"
    )
