"""What a run of `mutating.py` prints and writes."""

from __future__ import annotations

import functools
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

SURVIVORS = Path(__file__).with_name("survivors.toml")


def line_of(module: str, outcomes: list[dict[str, Any]]) -> str:
    """A module's row."""
    listed = accepted_survivors()
    kinds = Counter(kind_of(each, listed) for each in outcomes)
    columns = (f"{kinds[kind]:>5}" for kind in ("killed", "equivalent", "accepted", "new"))
    return f"{module:<44} {len(outcomes):>4} {' '.join(columns)}"


def kind_of(entry: dict[str, Any], listed: dict[str, dict[str, str]]) -> str:
    """`killed`, `equivalent`, `accepted`, or `new`: a survivor that is not listed."""
    return "killed" if entry["outcome"] != "survived" else listed.get(entry["mutant"], {}).get("kind", "new")


@functools.cache
def accepted_survivors() -> dict[str, dict[str, str]]:
    return {each["mutant"]: each for each in tomllib.loads(SURVIVORS.read_text()).get("survivor", [])}


def result_of(outcomes: list[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """What the run found as JSON, and the lines that tell it."""
    listed = accepted_survivors()
    kinds = Counter(kind_of(each, listed) for each in outcomes)
    counted = len(outcomes) - kinds["equivalent"]
    power = kinds["killed"] / counted if counted else 1.0
    ways = Counter(each["outcome"] for each in outcomes)
    lines = [
        f"survivor, not listed: {each['mutant']} (line {each['line']}; {each['tests'] or 'no'} tests run it)"
        for each in outcomes
        if kind_of(each, listed) == "new"
    ]
    lines += [
        f"listed, but killed by {each['by']}: {each['mutant']}"
        for each in outcomes
        if each["mutant"] in listed and each["outcome"] != "survived"
    ]
    lines.append(
        f"{len(outcomes)} mutants; {kinds['killed']} killed ({ways['hung']} hung, {ways['died']} died), "
        f"{kinds['equivalent']} equivalent, {kinds['accepted']} accepted, {kinds['new']} new survivors: "
        f"{power:.1%} of {counted} killed"
    )
    content = {"mutants": len(outcomes), "power": power, "kinds": dict(kinds), "outcomes": outcomes}
    return content, lines
