"""Figures as files and as SVG elements: the same figure gives the same bytes."""

from __future__ import annotations

import io
import re
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from lab import files
from lab.errors import UserError
from lab.report.style import SETTINGS
from lab.report.svg import tidy

FORMATS = ("svg", "png", "pdf")


def svg(figure: Figure, *, title: str, description: str, prefix: str = "figure") -> str:
    """The figure as an SVG element with title and description for those who do not see it.

    The same figure gives the same text, byte for byte: no date, salted identifiers, coordinates of a hundredth point.

    Args:
        prefix: of all identifiers, so that several drawings can stand in one page.
    """
    text = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context(SETTINGS):  # type: ignore[arg-type]
        FigureCanvasSVG(figure).print_svg(text, metadata=nothing)  # type: ignore[no-untyped-call]
    element = tidy(text.getvalue(), prefix)
    named = f'role="img" aria-labelledby="{prefix}-title {prefix}-description"'
    said = f'<title id="{prefix}-title">{escape(title)}</title>'
    said += f'<desc id="{prefix}-description">{escape(description)}</desc>'
    return re.sub(r"<svg([^>]*)>", lambda tag: f"<svg{tag[1]} {named}>{said}", element, count=1) + "\n"


def svg_file(figure: Figure, *, title: str, description: str) -> str:
    """The figure as the text of an SVG file."""
    return f'<?xml version="1.0" encoding="utf-8"?>\n{svg(figure, title=title, description=description)}'


def save(figure: Figure, path: Path, *, title: str, description: str) -> None:
    """Write the figure, whole or not at all, in the format that the file's ending names: svg, png or pdf.

    Raises:
        UserError: another ending, or the file cannot be written.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise UserError(f"cannot draw to {path}: its ending must be one of {', '.join(f'.{name}' for name in FORMATS)}")
    if kind == "svg":
        files.write_text(path, svg_file(figure, title=title, description=description))
        return
    with files.atomic_path(path) as part, matplotlib.rc_context(SETTINGS):  # type: ignore[arg-type]
        if kind == "png":
            figure.set_dpi(160)
            facts = {"Title": title, "Description": description}
            FigureCanvasAgg(figure).print_png(str(part), metadata=facts)  # type: ignore[no-untyped-call]
        else:
            about = {"Title": title, "Subject": description, "CreationDate": None}
            from matplotlib.backends.backend_pdf import FigureCanvasPdf  # imports fontTools: half a second

            FigureCanvasPdf(figure).print_pdf(str(part), metadata=about)  # type: ignore[no-untyped-call]
