"""Figure of T-2 activation patching: which positions and which layers carry the answer."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from lab.experiments.layers.activation_patching import ActivationPatching
from lab.report import drawing

POSITIONS = {"span": "At the words that differ", "between": "Between them and the end", "last": "At the last position"}


def figure(records: Sequence[ActivationPatching]) -> Figure:
    """Recovery with the clean residual stream restored at each position, and with single clean or corrupted updates."""
    layout = [["span", "span", "between", "between", "last", "last"], ["update"] * 3 + ["damage"] * 3]
    drawn, panels = drawing.mosaic(layout)
    for position, title in POSITIONS.items():
        axes = panels[position]
        drawing.depth_profiles(axes, records, "residual_recovery", at={"position": position}, label="recovery [share]")
        axes.set(title=title, ylim=(-0.15, 1.15), xlabel="relative depth [layer / L]")
    drawing.depth_profiles(panels["update"], records, "update_recovery", label="recovery [share]")
    panels["update"].set_title("One clean update in the corrupted run")
    drawing.depth_profiles(panels["damage"], records, "update_damage", label="preference lost [share]")
    panels["damage"].set_title("One corrupted update in the clean run")
    drawing.legend(drawn, records)
    return drawn


def describe(records: Sequence[ActivationPatching]) -> str:
    """Which layer's update recovers most, and where the last position takes over."""
    seen = "; ".join(_bottleneck(record) for record in records)
    return (
        "Share of the preference for the right answer that comes back when clean activations replace corrupted ones, "
        f"over relative depth: the residual stream at three positions, and single updates. {seen}."
    )


def _bottleneck(record: ActivationPatching) -> str:
    layer = record.causal_bottleneck_layer
    share = float(record.update_recovery.sel(layer=layer))
    handover = record.handover_depth
    last = f"the last position first holds more at depth {handover:.2f}" if handover == handover else "it never does"
    return f"{drawing.name_of(record)}: layer {layer} alone recovers {share:.2f}; {last}"
