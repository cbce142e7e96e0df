"""Figure of T-18 spectral-guided PEFT: gains and forgetting by configuration, perplexity by size, ranks by spectrum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.experiments.surgery.spectral_peft import SpectralPeft
from lab.report import drawing

POINTS = "change of accuracy [points]"


def figure(records: Sequence[SpectralPeft]) -> Figure:
    """Changes of accuracy at both rates, perplexity over trainable parameters, ranks of B, and the sweep of rates."""
    drawn, panels = drawing.mosaic([["id", "ood"], ["aggressive", "perplexity"], ["ranks", "sweep"]])
    _gains(panels["id"], records, "id_gains", "In distribution, gentle rate")
    _gains(panels["ood"], records, "ood_gains", "Out of distribution, gentle rate")
    _gains(panels["aggressive"], records, "aggressive_ood_gains", "Out of distribution, 40 times the rate")
    drawing.scatter(
        panels["perplexity"],
        records,
        _share_of_uniform,
        _text_rises,
        x_label="trainable parameters / those of A [1]",
        y_label="rise of text loss [nat/token]",
    )
    panels["perplexity"].set_title("Other text, gentle rate")
    drawing.reference(panels["perplexity"], 0, "before training")
    drawing.scatter(
        panels["ranks"],
        records,
        "region_effective_rank",
        "region_rank",
        x_label="effective rank ratio of the weights [1]",
        y_label="rank of B [1]",
    )
    panels["ranks"].set_title("Ranks by matrix and region")
    _sweep(panels["sweep"], records)
    drawing.legend(drawn, records)
    return drawn


def describe(records: Sequence[SpectralPeft]) -> str:
    """What A and H gain and lose at either rate in each record."""
    seen = "; ".join(_standing(record) for record in records)
    return (
        "Change of accuracy by adapters of several rank allocations, in and out of distribution and at two learning "
        f"rates, loss on other text over their size, ranks over effective ranks, and a sweep of rates. {seen}."
    )


def _gains(axes: Axes, records: Sequence[SpectralPeft], quantity: str, title: str) -> None:
    drawing.bars(axes, records, quantity, x_label="configuration [name]", label=POINTS)
    axes.set_title(title)


def _sweep(axes: Axes, records: Sequence[SpectralPeft]) -> None:
    drawing.curves(
        axes, records, _rises_of_sweep, x_label="learning rate of A [1]", label="rise of text loss [nat/token]"
    )
    drawing.set_scale(axes, "linear")
    axes.set_xscale("log")
    axes.set_title("Uniform ranks at several rates")


def _share_of_uniform(record: SpectralPeft) -> xr.DataArray:
    return _over(record, [record.trainable(name) / record.trainable("A") for name in _names(record)])


def _text_rises(record: SpectralPeft) -> xr.DataArray:
    return _over(record, [record.text_rise(name) for name in _names(record)])


def _names(record: SpectralPeft) -> list[str]:
    return [str(name) for name in record.id_gains["configuration"].values]


def _over(record: SpectralPeft, values: list[float]) -> xr.DataArray:
    return xr.DataArray(values, dims="configuration", coords={"configuration": _names(record)})


def _rises_of_sweep(record: SpectralPeft) -> xr.DataArray:
    if record.has("sweep_text_loss"):
        rates, values = record.sweep("text_loss")
        rises = values - float(record.mean("base_text_loss"))
    else:
        rates, values = record.sweep("text_perplexity")
        rises = np.log(values / record.perplexity())
    return xr.DataArray(rises, dims="learning_rate", coords={"learning_rate": rates})


def _standing(record: SpectralPeft) -> str:
    parts = [f"{name} {_signed(record, name)}" for name in ("A", "H") if name in _names(record)]
    return f"{drawing.name_of(record)}: {', '.join(parts)}"


def _signed(record: SpectralPeft, name: str) -> str:
    gentle = f"{record.gain('id', name):+.1f} in and {record.gain('ood', name):+.1f} points out of distribution"
    if name not in record.aggressive_ood_gains["configuration"].values:
        return gentle
    return f"{gentle}, {record.gain('ood', name, rate='aggressive'):+.1f} out at the higher rate"
