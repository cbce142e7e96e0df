"""How records look in figures: one colour and marker per subject, another line and open markers for published figures.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; marker and line say the same again, so that
no figure depends on colour. Figures are drawn in the colours of print; `themed` lets a page choose others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lab.records import Record
from lab.subjects.catalog import catalog

INK = "#1b1b1b"  #: text, axes
MUTED = "#6b6b6b"  #: tick marks, reference lines, notes
RULE = "#dedede"  #: grid
PAPER = "#ffffff"  #: background, and the inside of open markers
SERIES = ("#0072b2", "#d55e00", "#009e73", "#a6548b", "#8a6d00", "#3a9bd6", "#e69f00", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "///", "\\\\\\", "---", "|||", "xxx", "+++", "//")  #: of lines only: dots make files large
SEQUENTIAL, DIVERGING = "cividis", "RdBu_r"  #: colour maps that stay ordered without colour vision

#: matplotlib's settings for every figure; the salt makes identifiers, and with them the file, repeatable
SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "dl-findings",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "figure.constrained_layout.use": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.6,
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True)
class Look:
    """How one record is drawn.

    Attributes:
        label: what the legend says.
        colour: of line, markers and band; the subject's.
        marker: matplotlib's letter; the subject's.
        hatch: pattern of bars; the subject's.
        published: whether the numbers are published figures: dotted line, open markers.
        again: whether the subject was measured under another condition too, which comes first: dashed line.
    """

    label: str
    colour: str
    marker: str
    hatch: str
    published: bool
    again: bool

    def line(self, **more: Any) -> dict[str, Any]:
        """Arguments of `Axes.plot`."""
        style = (0, (1.2, 1.6)) if self.published else (0, (5, 2)) if self.again else "-"
        return self.points() | {"linestyle": style} | more

    def points(self, **more: Any) -> dict[str, Any]:
        """Arguments of `Axes.plot` without a line."""
        face = PAPER if self.published else self.colour
        marks = {"marker": self.marker, "markerfacecolor": face, "markeredgecolor": self.colour, "linestyle": "none"}
        return {"color": self.colour, "markeredgewidth": 0.9} | marks | more

    def bar(self, **more: Any) -> dict[str, Any]:
        """Arguments of `Axes.bar`."""
        face = PAPER if self.published else self.colour
        edge = self.colour if self.published else INK
        style = "--" if self.published or self.again else "-"
        return {"facecolor": face, "edgecolor": edge, "hatch": self.hatch, "linestyle": style, "linewidth": 0.8} | more


def looks(records: Sequence[Record]) -> list[Look]:
    """The look of each record, the same in every figure: catalogued subjects have places of their own.

    Other subjects follow them in the order of their names. A label names the condition where it takes more than
    the subject to tell two of the records apart.
    """
    strangers = sorted({record.subject for record in records} - catalog().keys())
    place = {name: index for index, name in enumerate([*catalog(), *strangers])}
    plain = [_label(record) for record in records]
    labels = [
        f"{label} ({record.condition})" if plain.count(label) > 1 and record.source != "published" else label
        for label, record in zip(plain, records, strict=True)
    ]
    return [
        _look(place[record.subject], labels[index], record, plain.index(plain[index]) < index)
        for index, record in enumerate(records)
    ]


def _look(place: int, label: str, record: Record, again: bool) -> Look:
    colour, marker, hatch = (choice[place % len(choice)] for choice in (SERIES, MARKERS, HATCHES))
    return Look(label, colour, marker, hatch, record.source == "published", again)


def _label(record: Record) -> str:
    return f"{record.subject}, published" if record.source == "published" else record.subject


def themed(svg: str) -> str:
    """The drawing with its colours as CSS variables (`--figure-ink`, `--figure-series-1`, ...), print's as fallback."""
    names = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"}
    names |= {colour: f"series-{number}" for number, colour in enumerate(SERIES, 1)}
    # Only whole colours inside style attributes: gradients and hatches keep their identifiers.
    pattern = re.compile(rf"(?<=[: ])({'|'.join(names)})\b", re.IGNORECASE)
    return pattern.sub(lambda found: f"var(--figure-{names[found[0].lower()]}, {found[0]})", svg)
