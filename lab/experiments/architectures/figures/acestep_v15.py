"""Figure of AS ACE-Step 1.5: parameters of every component, and the lengths of a song in every stream."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from lab.experiments.architectures.acestep_v15 import AceStep
from lab.report import drawing


def figure(records: Sequence[AceStep]) -> Figure:
    """Parameters by component on a logarithmic axis, and frames per second in every stream."""
    drawn, panels = drawing.mosaic([["budget", "budget"], ["printed", "rates"]])
    drawing.bars(panels["budget"], records, "budget", x_label="component", label="parameters [10$^6$]")
    panels["budget"].set_title("Parameters by component")
    drawing.set_scale(panels["budget"], "log")
    drawing.bars(panels["printed"], records, "misprint", x_label="component", label="printed / exact [1]")
    panels["printed"].set_title("Printed beside exact counts")
    panels["printed"].set_ylim(0.85, 1.05)
    drawing.bars(panels["rates"], records, "rate", x_label="stream", label="frames per second [Hz]")
    panels["rates"].set_title("Rates")
    drawing.set_scale(panels["rates"], "log")
    drawing.legend(drawn, records, bands=False)
    return drawn


def describe(records: Sequence[AceStep]) -> str:
    """Which component is the largest, and what one second is in tokens."""
    seen = "; ".join(map(_seen, records))
    return (
        f"Parameters by component of a music system, printed counts over exact ones, and rates of its streams. {seen}."
    )


def _seen(record: AceStep) -> str:
    budget = record.budget
    largest = str(budget.idxmax("component").values)
    text = f"{drawing.name_of(record)}: the largest of {budget.size} components is {largest.replace('_', ' ')}"
    text += f" with {float(budget.max()):,.1f} million parameters"
    rates = drawing.value(record, "rate")
    return (
        text
        if rates is None
        else f"{text}, and a second is {float(rates[-1]):g} tokens of {float(rates[0]):,.0f} samples"
    )
