"""Names along an axis that are too long to stand side by side."""

from __future__ import annotations

from matplotlib.axes import Axes


def upright(axes: Axes) -> None:
    """Write the names below the groups of a bar chart upwards, each on one line."""
    names = [label.get_text().replace("\n", " ") for label in axes.get_xticklabels()]
    axes.set_xticks(axes.get_xticks(), names, rotation=90, fontsize=7)
