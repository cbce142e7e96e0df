"""Figure of T-17 contrastive trajectories: likeness and divergence at the pivot over depth, by relationship."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import xarray as xr
from matplotlib.figure import Figure

from lab.corpora.contrastive_groups import RELATIONSHIPS
from lab.experiments.layers.contrastive_trajectories import ContrastiveTrajectories
from lab.report import drawing


def figure(records: Sequence[ContrastiveTrajectories]) -> Figure:
    """Cosine and KL of every relationship, and antonyms over synonyms without and with a stem, over depth."""
    rows = [("cosine", RELATIONSHIPS[:2]), ("kl", RELATIONSHIPS[:2]), ("kl", RELATIONSHIPS[2:])]
    layout = [[f"{quantity} {kind}" for kind in kinds] for quantity, kinds in rows]
    drawn, panels = drawing.mosaic([*layout, ["immediate", "shared"]])
    for kind in RELATIONSHIPS[:2]:
        axes = panels[f"cosine {kind}"]
        drawing.depth_profiles(axes, records, "cosine_profile", at={"relationship": kind}, label="cosine [1]")
        axes.set_title(f"Likeness at the pivot: {_plural(kind)}")
        axes.set_ylim(top=1)
    for kind in RELATIONSHIPS:
        axes = panels[f"kl {kind}"]
        at = {"relationship": kind}
        label = "KL [nat]"
        # a first layer read with a tied head reaches a hundred nat, the middle of the depth lies below one
        drawing.depth_profiles(axes, records, "divergence_profile", at=at, label=label, scale="symlog", linear_below=1)
        axes.set_title(f"Divergence at the pivot: {_plural(kind)}")
    for prefix, title in (("immediate", "answer at once"), ("shared", "behind a stem")):
        axes = panels[prefix]
        drawing.depth_profiles(axes, records, partial(_ratio, prefix=prefix), label="KL ratio [1]", scale="log")
        drawing.reference(axes, 1, "no difference")
        axes.set_title(f"Antonyms over synonyms, {title}")
    drawing.legend(drawn, records)
    return drawn


def describe(records: Sequence[ContrastiveTrajectories]) -> str:
    """Where the likeness peaks, and how antonyms compare with synonyms early and late."""
    seen = "; ".join(map(_seen, records))
    return (
        "Residual streams of two answers to one prompt at the first token that differs, over relative depth: cosine of "
        "antonyms and of synonyms, KL divergence of their next-token distributions for four kinds of pairs, and the "
        f"ratio of antonyms to synonyms without and with a shared stem. {seen}."
    )


def _plural(kind: str) -> str:
    return {"antonym": "antonyms", "synonym": "synonyms", "style": "two registers", "unrelated": "unrelated"}[kind]


def _ratio(record: ContrastiveTrajectories, prefix: str) -> xr.DataArray:
    return xr.DataArray(record.ratio(prefix), {"layer": record.data["layer"].values}, ("layer",))


def _seen(record: ContrastiveTrajectories) -> str:
    peak = float(record.cosine_profile.sel(relationship="antonym").max())
    early, late = (record.ratio()[layers].mean() for layers in (record.layers(0, 0.14), record.layers(2 / 3)))
    return (
        f"{drawing.name_of(record)}: antonyms are most alike at a cosine of {peak:.2f}, and diverge {early:.2f} times "
        f"as much as synonyms in the first seventh of the depth, {late:.2f} times in the last third"
    )
