"""The drawing kit of the figures: panels over relative depth, matrices, points, bars and trees.

An experiment's figure is a module `lab/experiments/<group>/figures/<name>.py` with `figure(records)` and
`describe(records)`, see `lab.report.figures`. It builds its panels here:

    figure, (axes,) = drawing.panels()
    depth_profiles(axes, records, "loss_delta", label="rise of the loss [nat/token]")
    legend(figure, records)

A function that draws records skips those that lack the quantity, and says so in the panel if none has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import CenteredNorm, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lab.errors import NotApplicable
from lab.records import Record
from lab.report.scales import Scale, plain, set_scale
from lab.report.style import DIVERGING, INK, MUTED, SEQUENTIAL, looks

__all__ = [
    "Quantity",
    "Scale",
    "bars",
    "curves",
    "dendrogram",
    "depth_profiles",
    "heatmap",
    "legend",
    "mosaic",
    "name_of",
    "panels",
    "reference",
    "relative_depth",
    "scatter",
    "set_scale",
    "value",
]

WIDTH = 7.2  #: inches; a page's column, and two columns of a paper
PANEL_HEIGHT = 2.6  #: inches
DEPTH_LABEL = "relative depth [layer / number of layers]"
#: So many names of bars stand side by side in half of a page; names up to this length do so in any number.
UPRIGHT_NAMES, SHORT_NAME = 8, 4

#: a property of the records by name, or a function of a record; only a named one has a band
Quantity = str | Callable[[Any], xr.DataArray]


def panels(rows: int = 1, columns: int = 1, *, height: float = PANEL_HEIGHT, **more: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure and its panels, row by row.

    Args:
        rows, columns: of panels.
        height: of one row, inches.
        more: arguments of `Figure.subplots`, e.g. `sharex`, `width_ratios`.
    """
    figure = Figure(figsize=(WIDTH, height * rows + 0.4))
    FigureCanvasSVG(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **more)
    return figure, list(axes.ravel())


def mosaic(layout: Sequence[Sequence[str]], *, height: float = PANEL_HEIGHT) -> tuple[Figure, dict[str, Axes]]:
    """An empty figure whose panels span cells of a grid, by the names in the layout; `.` leaves a cell empty."""
    figure = Figure(figsize=(WIDTH, height * len(layout) + 0.4))
    FigureCanvasSVG(figure)
    return figure, dict(figure.subplot_mosaic([list(row) for row in layout]))


def value(record: Record, quantity: Quantity, at: Mapping[str, Any] | None = None) -> xr.DataArray | None:
    """A quantity of a record, with some dimensions fixed by label; None if the record does not hold it."""
    try:
        found: xr.DataArray = getattr(record, quantity) if isinstance(quantity, str) else quantity(record)
        return found.sel(at) if at else found
    except (NotApplicable, KeyError):  # published figures and small budgets lack variables, or labels of them
        return None


def relative_depth(record: Record, profile: xr.DataArray) -> np.ndarray:
    """Relative depth of each entry of a profile over `layer` (layer / L) or `slot` ((slot + 1) / L).

    `slot` -1 is the embedding, so that the last slot, the model's output, has depth 1.
    """
    (dimension,) = profile.dims
    labels: np.ndarray = profile[dimension].values
    if dimension not in ("layer", "slot"):
        raise TypeError(f"a profile over {dimension!r} has no depth; draw it with `curves` and an x of its own")
    own = len(labels) - (dimension == "slot")
    n_layers = getattr(record, "n_layers", own)
    depth: np.ndarray = (labels + (dimension == "slot")) / n_layers
    return depth


def depth_profiles(
    axes: Axes,
    records: Sequence[Record],
    quantity: Quantity,
    *,
    label: str,
    at: Mapping[str, Any] | None = None,
    scale: Scale = "linear",
    linear_below: float = 0.1,
) -> list[Record]:
    """Draw a quantity [layer] or [slot] of every record over relative depth, with its bootstrap band.

    Args:
        quantity: see `Quantity`; the band is `record.band(quantity)`.
        label: of the y axis, with the unit: `rise of the loss [nat/token]`.
        at: fixes other dimensions of the quantity by label, e.g. `{"position": "last"}`.
        scale: of the y axis, see `set_scale`.

    Returns:
        The records that were drawn.
    """
    drawn = curves(axes, records, quantity, x=relative_depth, x_label=DEPTH_LABEL, label=label, at=at)
    axes.set_xlim(-0.02, 1.02)
    set_scale(axes, scale, linear_below)
    return drawn


def curves(
    axes: Axes,
    records: Sequence[Record],
    quantity: Quantity,
    *,
    x: Callable[[Any, xr.DataArray], np.ndarray] | None = None,
    x_label: str,
    label: str,
    at: Mapping[str, Any] | None = None,
) -> list[Record]:
    """Draw a quantity of one dimension of every record over its own labels, or over what `x(record, values)` gives.

    Returns the records that were drawn; see `depth_profiles` for the arguments.
    """
    drawn = []
    for record, look in zip(records, looks(records), strict=True):
        profile = value(record, quantity, at)
        if profile is None:
            continue
        places = profile[profile.dims[0]].values if x is None else x(record, profile)
        band = record.band(quantity) if isinstance(quantity, str) else None
        if band is not None:
            low, high = ((band.sel(at) if at else band).sel(bound=bound).values for bound in ("low", "high"))
            axes.fill_between(places, low, high, color=look.colour, alpha=0.18, linewidth=0)
        axes.plot(places, profile.values, **look.line())
        drawn.append(record)
    return _labelled(axes, drawn, x_label, label)


def scatter(
    axes: Axes, records: Sequence[Record], x: Quantity, y: Quantity, *, x_label: str, y_label: str
) -> list[Record]:
    """Draw one quantity of every record against another of the same shape, a point per label."""
    drawn = []
    for record, look in zip(records, looks(records), strict=True):
        across, up = value(record, x), value(record, y)
        if across is not None and up is not None:
            axes.plot(across.values.ravel(), up.values.ravel(), **look.points())
            drawn.append(record)
    return _labelled(axes, drawn, x_label, y_label)


def bars(
    axes: Axes, records: Sequence[Record], quantity: Quantity, *, x_label: str, label: str, names: Sequence[str] = ()
) -> list[Record]:
    """Draw a quantity of one dimension as groups of bars, a group per label and a bar per record, with its interval.

    Args:
        names: what the groups are called; the labels of the dimension by default.
    """
    having = [record for record in records if value(record, quantity) is not None]
    groups = list(dict.fromkeys(label for record in having for label in _labels(record, quantity)))
    thick = 0.8 / max(1, len(having))
    appearance = dict(zip(map(id, records), looks(records), strict=True))
    for number, record in enumerate(having):
        found = value(record, quantity)
        assert found is not None
        offset = (number - (len(having) - 1) / 2) * thick
        places = np.array([groups.index(label) for label in _labels(record, quantity)]) + offset
        axes.bar(places, found.values, thick, **appearance[id(record)].bar())
        band = record.band(quantity) if isinstance(quantity, str) else None
        if band is not None:
            axes.vlines(places, band.sel(bound="low").values, band.sel(bound="high").values, color=INK, linewidth=1)
    _name_groups(axes, list(map(str, names or groups)))
    axes.grid(False, axis="x")
    return _labelled(axes, having, x_label, label)


def _name_groups(axes: Axes, names: Sequence[str]) -> None:
    """Names under their groups: upright and in lines, or slanted where many would run into each other."""
    slanted = len(names) > UPRIGHT_NAMES and max(map(len, names)) > SHORT_NAME
    if slanted:
        axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=7)
        axes.tick_params(axis="x", labelrotation=50)
        for label in axes.get_xticklabels():
            label.set(horizontalalignment="right", rotation_mode="anchor")
    else:
        axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=7)


def heatmap(
    axes: Axes,
    matrix: np.ndarray | xr.DataArray,
    *,
    title: str,
    label: str,
    x_label: str = "layer",
    y_label: str = "layer",
    scale: Literal["linear", "log", "diverging"] = "linear",
    limits: tuple[float, float] | None = None,
    extent: tuple[float, float, float, float] | None = None,
) -> None:
    """Draw a matrix [row, column] with its colour bar; NaN stays empty. Rows and columns are layers unless labelled.

    Args:
        title: usually the record's, see `name_of`.
        label: of the colour bar, with the unit.
        scale: `diverging` is symmetric about 0; `log` leaves entries of 0 and below empty.
        limits: least and greatest colour; by default those of the data (of 98 % of it if diverging).
        extent: left, right, bottom, top of the matrix, where rows and columns are not numbered 0, 1, ...
    """
    values = np.asarray(matrix, dtype=float)
    if scale == "log":
        values = np.where(values > 0, values, np.nan)
    norm = _norm(values, scale, limits)
    colours = DIVERGING if scale == "diverging" else SEQUENTIAL
    # Nearest neighbour keeps the file at one pixel per entry, and the entries sharp at any size.
    drawn = axes.imshow(values, cmap=colours, norm=norm, interpolation="nearest", extent=extent, aspect="auto")
    bar = axes.figure.colorbar(drawn, ax=axes, extend="both" if limits or scale == "diverging" else "neither")
    bar.set_label(label)
    if scale == "log":
        bar.ax.yaxis.set_major_formatter(FuncFormatter(plain))
    bar.outline.set_visible(False)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.set_box_aspect(values.shape[0] / values.shape[1] if 0.5 <= values.shape[0] / values.shape[1] <= 2 else None)
    axes.grid(False)
    if extent is None:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))


def dendrogram(
    axes: Axes, linkage: np.ndarray, *, title: str, label: str, names: Sequence[Any] = (), cut: float | None = None
) -> None:
    """Draw a tree of clusters.

    Args:
        linkage: scipy's [n - 1, 4].
        label: of the y axis, the distance at which two branches join, with the unit.
        names: of the leaves; numbers by default.
        cut: height at which a dashed line cuts the tree.
    """
    from scipy.cluster.hierarchy import dendrogram as layout

    tree = layout(linkage, no_plot=True, labels=list(names) or None)
    for x, y in zip(tree["icoord"], tree["dcoord"], strict=True):
        axes.plot(x, y, color=INK, linewidth=0.9)
    leaves = 5 + 10 * np.arange(len(tree["ivl"]))  # scipy sets leaves 10 apart
    axes.set_xticks(leaves, [str(leaf) for leaf in tree["ivl"]], rotation=90, fontsize=6 if len(leaves) <= 30 else 5)
    if cut is not None:
        axes.axhline(cut, color=MUTED, linestyle="--", linewidth=0.9)
    axes.set(xlabel="layer", ylabel=label, title=title)
    axes.set_ylim(bottom=0)
    axes.grid(False, axis="x")


def reference(axes: Axes, at: float, text: str, *, vertical: bool = False) -> None:
    """Draw a dashed line at a value of the y (or x) axis, and say what it is."""
    line = axes.axvline if vertical else axes.axhline
    line(at, color=MUTED, linestyle="--", linewidth=0.9, zorder=1)
    where = (at, 0.98) if vertical else (0.99, at)
    transform = axes.get_xaxis_transform() if vertical else axes.get_yaxis_transform()
    anchor = {"ha": "left", "va": "top"} if vertical else {"ha": "right", "va": "bottom"}
    axes.text(*where, text, transform=transform, color=MUTED, fontsize=7.5, **anchor)  # type: ignore[arg-type]


def legend(figure: Figure, records: Sequence[Record], *, bands: bool = True) -> None:
    """One legend for all panels, above them: subjects, which numbers are published, and what a band is."""
    handles = [Line2D([], [], label=look.label, **look.line()) for look in looks(records)]
    if bands and any(record.kept_bands or record.sampling_sizes for record in records):
        label = "95 % bootstrap interval"
        handles.append(Line2D([], [], color=MUTED, alpha=0.3, linewidth=6, label=label))
    figure.legend(handles=handles, loc="outside upper left", ncols=min(3, len(handles)), handlelength=2.6)


def name_of(record: Record) -> str:
    """Subject, and `published` where the numbers are: the title of a panel that shows one record."""
    return looks([record])[0].label


def _labels(record: Record, quantity: Quantity) -> list[Any]:
    found = value(record, quantity)
    assert found is not None
    labels: list[Any] = found[found.dims[0]].values.tolist()
    return labels


def _labelled(axes: Axes, drawn: list[Record], x_label: str, label: str) -> list[Record]:
    axes.set(xlabel=x_label, ylabel=label)
    if not drawn:
        axes.text(0.5, 0.5, "not in these records", transform=axes.transAxes, ha="center", color=MUTED)
    return drawn


def _norm(values: np.ndarray, scale: str, limits: tuple[float, float] | None) -> Normalize:
    finite = values[np.isfinite(values)]
    if scale == "diverging":
        reach = max(map(abs, limits)) if limits else float(np.quantile(np.abs(finite), 0.98)) if finite.size else 1.0
        return CenteredNorm(0, reach or 1.0)
    low, high = limits or ((float(finite.min()), float(finite.max())) if finite.size else (0.1, 1.0))
    return LogNorm(low, high) if scale == "log" else Normalize(low, high)
