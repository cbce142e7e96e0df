"""SVG as matplotlib writes it, made small and fit to stand in a page beside other drawings."""

from __future__ import annotations

import re
from collections import Counter

#: how often a style must occur before it becomes a class
SHARED = 4


def tidy(text: str, prefix: str) -> str:
    """The `<svg>` element of a file, without comments, metadata and global styles; identifiers short, styles shared.

    Args:
        text: the whole file.
        prefix: of all identifiers and classes, which are those of the page once the element stands in one.
    """
    element = text[text.index("<svg") :].rstrip()
    element = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|(?<=>)\s+(?=<)", "", element, flags=re.DOTALL)
    # `*{...}` would style the whole page; the drawing's elements inherit the same from its root.
    everywhere = 'stroke-linejoin="round" stroke-linecap="butt"'
    element = re.sub(r"<defs><style[^>]*>\*\{[^}]*\}</style></defs>", "", element, count=1)
    element = element.replace("<svg ", f"<svg {everywhere} ", 1)
    # Hatches are coloured by attributes; as styles they can follow a page's colours like all else.
    element = re.sub(r'(<rect[^>]*) fill="(#\w{6})"', r'\1 style="fill: \2"', element)
    element = _short_identifiers(element, prefix)
    element = re.sub(r' (d|x|y|transform)="([^"]*)"', lambda found: f' {found[1]}="{_rounded(found[2])}"', element)
    return _classes(element, prefix)


def _short_identifiers(element: str, prefix: str) -> str:
    """Numbered identifiers for what something refers to; the others are left out, for equal images share one."""
    used = dict.fromkeys(re.findall(r'(?:href="|url\()#([^")]+)', element))
    short = {name: f"{prefix}-{number}" for number, name in enumerate(used)}
    kept = re.sub(r' id="([^"]*)"', lambda found: f' id="{short[found[1]]}"' if found[1] in short else "", element)
    return re.sub(r'(href="|url\()#([^")]+)', lambda found: f"{found[1]}#{short[found[2]]}", kept)


def _classes(element: str, prefix: str) -> str:
    """Styles that many elements share as classes: a marker is drawn once per layer and record."""
    counts = Counter(re.findall(r' style="([^"]*)"', element))
    names = {style: f"{prefix}-s{index}" for index, style in enumerate(counts) if counts[style] >= SHARED}
    rules = "".join(f".{name}{{{style}}}" for style, name in names.items())
    element = re.sub(
        r' style="([^"]*)"', lambda found: f' class="{names[found[1]]}"' if found[1] in names else found[0], element
    )
    return re.sub(r"<svg[^>]*>", lambda tag: f"{tag[0]}<style>{rules}</style>", element, count=1)


def _rounded(numbers: str) -> str:
    short = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), numbers)
    return " ".join(short.split())
