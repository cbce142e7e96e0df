"""Logarithmic axes whose numbers read as numbers: 0.2, 5, 1,000 in place of powers of ten."""

from __future__ import annotations

from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

Scale = Literal["linear", "log", "symlog"]


def set_scale(axes: Axes, scale: Scale, linear_below: float = 0.1) -> None:
    """Set the scale of the y axis, once everything is drawn.

    Args:
        scale: `symlog` is logarithmic, and linear within +-`linear_below` where something lies at or below 0.
    """
    if scale == "linear":
        return
    low, _ = axes.dataLim.intervaly
    if scale == "symlog" and low <= 0:
        axes.set_yscale("symlog", linthresh=linear_below)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(_few_minor_labels(axes))
    axes.yaxis.set_major_formatter(FuncFormatter(plain))
    axes.autoscale_view()


def plain(at: float, _: int | None = None) -> str:
    """A number as an axis prints it."""
    return f"{at:,.10g}".replace("-", "\N{MINUS SIGN}")


def _few_minor_labels(axes: Axes) -> FuncFormatter:
    # A logarithmic axis of less than a decade or two has too few numbers at powers of ten alone.
    def formatted(at: float, position: int | None = None) -> str:
        low, high = axes.get_ylim()
        decades = np.log10(high / low)
        leading = round(at / 10.0 ** np.floor(np.log10(at)))
        wanted = {2, 3, 4, 5, 6, 7, 8} if decades < 0.7 else {2, 5} if decades < 2.2 else set()
        return plain(at) if leading in wanted else ""

    return FuncFormatter(formatted)
