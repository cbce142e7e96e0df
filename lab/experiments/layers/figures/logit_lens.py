"""Figure of T-1 logit lens: how the prediction of the next token develops over depth."""

from __future__ import annotations

from collections.abc import Sequence

import xarray as xr
from matplotlib.figure import Figure

from lab.experiments.layers.logit_lens import LogitLens
from lab.report import drawing


def figure(records: Sequence[LogitLens]) -> Figure:
    """Accuracy, rank and entropy of the lens at every slot, tokens hurt by each layer, and when tokens settle.

    Measured records are drawn from float32 logits, published figures as they are, from bfloat16 ones.
    """
    drawn, (accuracy, rank, entropy, hurt, settled, classes) = drawing.panels(3, 2)
    drawing.depth_profiles(accuracy, records, "top1", label="top-1 accuracy [share of tokens]")
    accuracy.set_title("The lens predicts the token")
    drawing.depth_profiles(
        rank, records, "median_rank", label="median rank of the token [rank]", scale="symlog", linear_below=1
    )
    rank.set_title("Rank of the token")
    drawing.depth_profiles(entropy, records, "entropy", label="entropy [nat]")
    entropy.set_title("Uncertainty of the lens")
    drawing.depth_profiles(hurt, records, "hurt_fraction", label="tokens hurt [share of tokens]")
    hurt.set_title("Layers that worsen a good rank")
    drawing.depth_profiles(settled, records, _settled_share, label="tokens settled [share]")
    settled.set_title("In the top 10 for good")
    drawing.bars(classes, records, _class_depth, x_label="class of the token", label="depth of settling [layer / L]")
    classes.set_title("Settling by class of token")
    drawing.legend(drawn, records)
    return drawn


def describe(records: Sequence[LogitLens]) -> str:
    """Where each record's top-1 accuracy bends, and what it reaches."""
    seen = "; ".join(_rise(record) for record in records)
    return (
        "Logit lens over relative depth: top-1 accuracy, median rank, entropy, the share of tokens whose rank a layer "
        f"worsens, and when tokens settle. Top-1 accuracy of {seen}."
    )


def _settled_share(record: LogitLens) -> xr.DataArray:
    counts = record.variable("crystallization_histogram")
    share: xr.DataArray = counts.cumsum("slot") / counts.sum()
    return share


def _class_depth(record: LogitLens) -> xr.DataArray:
    depth: xr.DataArray = (record.type_crystallization + 1) / record.n_layers  # slot -1 is the embedding, depth 0
    return depth


def _rise(record: LogitLens) -> str:
    half = record.slot_at(0.5)
    at_half, at_end = (float(record.top1.sel(slot=slot)) for slot in (half, record.last))
    return f"{drawing.name_of(record)}: {at_half:.2f} at half depth, {at_end:.2f} at the end"
