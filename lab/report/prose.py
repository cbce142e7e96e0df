"""Words and numbers as pages print them; everything that is not ours is escaped."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from markupsafe import Markup, escape

from lab.report.folds import Range

MINUS = "\N{MINUS SIGN}"
SHOWN = 8  #: elements of a list, places of a claim


def paragraphs(text: str) -> Markup:
    """A docstring as HTML: paragraphs, indented blocks as they are, lists, and `code` between backticks."""
    blocks = re.split(r"\n\s*\n", inspect.cleandoc(text)) if text.strip() else []
    return Markup("\n").join(_block(block) for block in blocks)


def number(value: float, digits: int = 4) -> str:
    """A number at so many significant digits, with a true minus sign."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no number")
    if isinstance(value, int):
        return f"{value:,}".replace("-", MINUS)
    if not math.isfinite(value):
        return str(value).replace("-", MINUS)
    text = f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.{digits}g}"
    return text.replace("-", MINUS)


def measured(value: Any) -> str:
    """What a claim compared: a number, a range of numbers, text, or a list."""
    if value is None:
        return ""
    if isinstance(value, Range):
        low, high = number(value.low), number(value.high)
        return low if low == high else f"{low} to {high}"
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, (int, float)):
        return number(value)
    if isinstance(value, Iterable):
        elements = [measured(element) for element in value]
        more = f", … {len(elements) - SHOWN} more" if len(elements) > SHOWN else ""
        return f"[{', '.join(elements[:SHOWN])}{more}]"
    return str(value)


def threshold(text: str | None) -> str:
    """What a claim needed, in the signs of print: `>= 2.4` as ≥ 2.4."""
    signs = {">=": "≥", "<=": "≤", "==": "=", "!=": "≠", " -": f" {MINUS}"}
    for plain, sign in signs.items():
        text = (text or "").replace(plain, sign)
    return text or ""


def support(share: float) -> str:
    """A share at two digits, rounded down: what is below 0.95 must not read 0.95."""
    return f"{math.floor(share * 100 + 1e-9) / 100:.2f}"


def listed(items: Iterable[str], most: int = SHOWN) -> str:
    """Names in a row, the first few of many."""
    names = list(items)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def css_string(text: str) -> Markup:
    """A text as a string of CSS, for a style element."""
    safe = re.sub(r"[^\w .,+-]", lambda odd: f"\\{ord(odd[0]):x} ", text)
    return Markup(f'"{safe}"')  # nothing is left in it that could end the string or the element


def _block(block: str) -> Markup:
    lines = block.splitlines()
    if all(line.startswith("    ") for line in lines):
        return Markup("<pre>{}</pre>").format(inspect.cleandoc(block))
    if lines[0].startswith(("- ", "* ")):
        items = [_inline(item[2:]) for item in re.split(r"\n(?=[-*] )", block)]
        return Markup("<ul>{}</ul>").format(Markup("").join(Markup("<li>{}</li>").format(item) for item in items))
    return Markup("<p>{}</p>").format(_inline(block))


def _inline(text: str) -> Markup:
    parts = re.split(r"`([^`]+)`", " ".join(text.split()))
    return _alternating(parts, "code", _stressed)


def _stressed(text: str) -> Markup:
    return _alternating(re.split(r"(?<![\w*])\*([^\s*](?:[^*]*[^\s*])?)\*(?![\w*])", text), "em", escape)


def _alternating(parts: list[str], tag: str, other: Callable[[str], Markup]) -> Markup:
    """Every second part inside the tag, as `re.split` with one group gives them."""
    inside = Markup(f"<{tag}>{{}}</{tag}>")
    return Markup("").join(inside.format(part) if odd % 2 else other(part) for odd, part in enumerate(parts))
