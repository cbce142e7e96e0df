"""Figure of T-9 weight spectra: effective ranks against random matrices, by matrix and depth, and heads' circuits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.experiments.layers.weight_spectra import ROUTING, VALUES, WeightSpectra
from lab.report import drawing

RELATIVE = "relative effective rank [1]"


def figure(records: Sequence[WeightSpectra]) -> Figure:
    """Relative effective rank: means by matrix, profiles over depth, every matrix; and the circuits of heads."""
    layout = [["types", "types"], ["routing", "values"], ["gate", "up"], ["qk", "ov"]]
    names = [f"matrices {index}" for index in range(len(records))]
    layout += [[*names[start : start + 2], "."][:2] for start in range(0, len(names), 2)]
    drawn, panels = drawing.mosaic(layout)
    _means(panels["types"], records)
    _profile(panels["routing"], records, ROUTING, "Q and K over depth")
    _profile(panels["values"], records, VALUES, "V and O over depth")
    _profile(panels["gate"], records, ("gate_proj",), "Gate over depth")
    _profile(panels["up"], records, ("up_proj",), "Up over depth")
    for circuit, title in (("qk", "Query-key circuits, mean head"), ("ov", "Output-value circuits, mean head")):
        label = "effective rank / random product [1]"
        drawing.depth_profiles(panels[circuit], records, partial(_circuit, circuit=circuit), label=label)
        panels[circuit].set_title(title)
    for name, record in zip(names, records, strict=True):
        _matrices(panels[name], record)
    drawing.legend(drawn, records)
    return drawn


def describe(records: Sequence[WeightSpectra]) -> str:
    """Where routing and values stand in each record, and its lowest matrix."""
    seen = "; ".join(_standing(record) for record in records)
    return (
        "Effective rank of the weight matrices relative to random matrices of their shapes: means by type, profiles "
        f"over relative depth, circuits of heads, and every matrix of every layer. {seen}."
    )


def _means(axes: Axes, records: Sequence[WeightSpectra]) -> None:
    drawing.bars(axes, records, _type_means, x_label="matrix", label=RELATIVE, names=_short_names(records))
    drawing.reference(axes, 1, "random matrix")
    axes.set_title("Mean over layers")


def _profile(axes: Axes, records: Sequence[WeightSpectra], names: Sequence[str], title: str) -> None:
    drawing.depth_profiles(
        axes, records, lambda record: record.of(record.relative_rank, *names), label="relative rank [1]"
    )
    drawing.reference(axes, 1, "random matrix")
    axes.set_title(title)


def _matrices(axes: Axes, record: WeightSpectra) -> None:
    values = record.relative_rank.sel(matrix=record.matrices).transpose("matrix", "layer")
    drawing.heatmap(
        axes, values, title=drawing.name_of(record), label="relative rank [1]", x_label="layer", y_label="matrix"
    )
    axes.set_box_aspect(None)
    axes.set_yticks(range(len(record.matrices)), [name.removesuffix("_proj") for name in record.matrices])


def _short_names(records: Sequence[WeightSpectra]) -> list[str]:
    names = dict.fromkeys(name for record in records for name in record.matrices)
    return [name.removesuffix("_proj") for name in names]


def _type_means(record: WeightSpectra) -> xr.DataArray:
    return record.type_means(record.relative_rank, record.matrices)


def _mean_of(record: WeightSpectra, names: Sequence[str]) -> xr.DataArray:
    return record.of(record.relative_rank, *names)


def _circuit(record: WeightSpectra, circuit: str) -> xr.DataArray:
    return record.relative_circuit_ratio(circuit).mean("head")


def _standing(record: WeightSpectra) -> str:
    routing, values = (record.mean_of(record.relative_rank, *names) for names in (ROUTING, VALUES))
    (layer, name), *_ = record.extremes(record.relative_rank, 1)
    lowest = float(np.nanmin(record.entries(record.relative_rank)))
    return (
        f"{drawing.name_of(record)}: Q and K at {routing:.2f} of a random matrix's rank, V and O at {values:.2f}, "
        f"lowest {name} of layer {layer} ({lowest:.2f})"
    )
