"""Figure of AS ACE-Step 1.5: parameters of every component, how well they were printed, and rates of the streams."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from lab.experiments.architectures.acestep_v15 import AceStep
from lab.report import drawing
from lab.report.names import upright


def figure(records: Sequence[AceStep]) -> Figure:
    """Parameters by component, distance of the printed counts from the exact ones, and frames per second by stream."""
    drawn, panels = drawing.mosaic([["budget", "budget"], ["printed", "rates"]], height=3.8)
    drawing.bars(panels["budget"], records, "budget", x_label="component", label="parameters [10$^6$]")
    panels["budget"].set_title("Parameters by component")
    drawing.set_scale(panels["budget"], "log")
    label = "distance [last digits]"
    drawing.bars(panels["printed"], records, "misprint", x_label="component", label=label)
    panels["printed"].set_title("Printed counts beside the exact ones")
    drawing.reference(panels["printed"], 0.5, "rounding")
    drawing.bars(panels["rates"], records, "rate", x_label="stream", label="frames per second [Hz]")
    panels["rates"].set_title("Rates")
    drawing.set_scale(panels["rates"], "log")
    for name in ("budget", "printed"):
        upright(panels[name])
    drawing.legend(drawn, records, bands=False)
    return drawn


def describe(records: Sequence[AceStep]) -> str:
    """Which component is the largest, which counts were printed wrongly, and what a second is in tokens."""
    seen = "; ".join(map(_seen, records))
    return (
        "Parameters by component of a music system, how far the printed counts are from the exact ones, and rates of "
        f"its streams. {seen}."
    )


def _seen(record: AceStep) -> str:
    budget, misprint = record.budget, record.misprint
    text = f"{drawing.name_of(record)}: the largest of {budget.size} components is the "
    text += f"{_words(budget.idxmax('component').values)} with {float(budget.max()):,.1f} million parameters"
    wrong = [_words(name) for name in misprint.component.values[misprint.values > 0.5]]
    text += f", printed wrongly: {', '.join(wrong) or 'none'}"
    rates = drawing.value(record, "rate")
    if rates is None:
        return text
    return f"{text}, and a second is {float(rates[-1]):g} tokens of {float(rates[0] / rates[-1]):,.0f} samples each"


def _words(name: object) -> str:
    return str(name).replace("_", " ")
