"""Figure of layer shuffle recovery: tau of every method, where methods put layers, and what order costs in passes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.experiments.layers.layer_shuffle_recovery import SEEDED, LayerShuffleRecovery
from lab.report import drawing

#: what the reader is shown in place of a variable's name
NAMES = {
    "weight_stats_continuity": "statistics",
    "svd_spectrum": "spectra",
    "layernorm_progression": "gains",
    "tsp_full_weights": "all weights",
    "greedy_cosine": "greedy cosine",
    "fiedler_spectral": "Fiedler",
    "ensemble_rank": "ensemble",
    "activation_flow": "fingerprints",
    "causal_pairwise": "pairwise",
    "greedy_perplexity": "construction",
    "pairwise_bubble": "swaps",
    "simulated_annealing": "annealing",
    "remove_reinsert": "insertions",
    "sort_by_norm": "norm",
    "block_descent": "blocks",
}


def figure(records: Sequence[LayerShuffleRecovery]) -> Figure:
    """Tau of each method; the places that fingerprints and ensemble give; work of searches; exchanges of neighbours."""
    drawn, panels = drawing.mosaic([["tau", "tau"], ["fingerprints", "ensemble"], ["work", "neighbours"]])
    drawing.bars(
        panels["tau"],
        records,
        "tau",
        x_label="what orders the layers",
        label="Kendall's tau [1]",
        names=_names(records),
    )
    panels["tau"].set_ylim(-1, 1.05)
    panels["tau"].tick_params(axis="x", labelrotation=60)
    for panel, method in (("fingerprints", "activation_flow"), ("ensemble", "ensemble_rank")):
        drawing.curves(
            panels[panel],
            records,
            partial(_placed, method=method),
            x=_depth,
            x_label=drawing.DEPTH_LABEL,
            label="recovered place / number of layers [1]",
        )
        panels[panel].set_title(f"Order by {NAMES[method]}")
        panels[panel].plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=0.9, zorder=1)
    _work(panels["work"], records)
    drawing.curves(
        panels["neighbours"],
        records,
        "neighbour_delta",
        x=_depth,
        x_label=drawing.DEPTH_LABEL,
        label="rise of the loss [nat/token]",
    )
    drawing.set_scale(panels["neighbours"], "symlog")
    panels["neighbours"].set_title("A layer and the next exchanged")
    drawing.legend(drawn, records)
    return drawn


def describe(records: Sequence[LayerShuffleRecovery]) -> str:
    """The best method without text, and what swaps make of their seed."""
    return (
        "Kendall's tau of the order of shuffled layers that each method recovers, places given by fingerprints and by "
        "the ensemble, layer work of searches, and the rise of the loss with neighbours exchanged. "
        f"{'; '.join(_ends(record) for record in records)}."
    )


def _names(records: Sequence[LayerShuffleRecovery]) -> list[str]:
    return [NAMES[method] for method in dict.fromkeys(method for record in records for method in record.methods)]


def _placed(record: LayerShuffleRecovery, method: str) -> xr.DataArray:
    places = record.positions(method).mean(axis=0) / record.n_layers
    return xr.DataArray(places, dims="layer", coords={"layer": np.arange(record.n_layers)})


def _depth(record: LayerShuffleRecovery, profile: xr.DataArray) -> np.ndarray:
    depth: np.ndarray = profile[profile.dims[0]].values / record.n_layers
    return depth


def _work(axes: Axes, records: Sequence[LayerShuffleRecovery]) -> None:
    """Tau over layer passes of the searches that begin with a chain, each point named."""
    drawing.scatter(
        axes, records, _passes, _taus, x_label="layer work [passes over all text]", y_label="Kendall's tau [1]"
    )
    for record in records:
        passes, taus = drawing.value(record, _passes), drawing.value(record, _taus)
        if passes is not None and taus is not None:
            for method, x, y in zip(SEEDED, passes.values, taus.values, strict=True):
                axes.annotate(NAMES[method], (x, y), xytext=(3, -3), textcoords="offset points", fontsize=7, va="top")
    axes.margins(x=0.15)  # room for names
    axes.set_title("Searches by loss")


def _passes(record: LayerShuffleRecovery) -> xr.DataArray:
    return record.mean("layer_passes").sel({"method": list(SEEDED)})


def _taus(record: LayerShuffleRecovery) -> xr.DataArray:
    return record.tau.sel({"method": list(SEEDED)})


def _ends(record: LayerShuffleRecovery) -> str:
    textless = [method for method in record.methods if method not in (*SEEDED, "greedy_perplexity")]
    best = record.ranking(textless)[0]
    swaps = record.of("kendall_tau", "pairwise_bubble")
    return (
        f"{drawing.name_of(record)}: without text {NAMES[best]} recover most ({record.of('kendall_tau', best):.2f}), "
        f"swaps by loss turn {record.seed_tau.mean():.2f} into {swaps:.2f}"
    )
