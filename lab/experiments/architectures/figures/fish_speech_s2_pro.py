"""Figure of FS Fish Speech S2 Pro: where parameters lie, and how norms and peaks of the weights run over depth."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from lab.experiments.architectures.fish_speech_s2_pro import FishSpeech
from lab.report import drawing
from lab.report.names import upright


def figure(records: Sequence[FishSpeech]) -> Figure:
    """Parameters of either stack by part; the codec's parameters beside its buffers; norm and peakedness over depth."""
    drawn, panels = drawing.mosaic([["stacks", "codec"], ["norm", "peak"]], height=3.2)
    drawing.bars(panels["stacks"], records, "budget", x_label="part of the stacks", label="parameters [10$^6$]")
    panels["stacks"].set_title("The two stacks")
    drawing.bars(
        panels["codec"], records, "codec_budget", x_label="part of the codec's state dict", label="elements [10$^6$]"
    )
    panels["codec"].set_title("The codec")
    for name in ("stacks", "codec"):
        upright(panels[name])
    drawing.depth_profiles(panels["norm"], records, "frobenius", label="Frobenius norm [1]")
    panels["norm"].set_title("Slow AR, mean of five matrices")
    drawing.depth_profiles(panels["peak"], records, "peakedness", label="peakedness [1]")
    panels["peak"].set_title("Slow AR, largest singular value over norm")
    drawing.legend(drawn, records, bands=False)
    return drawn


def describe(records: Sequence[FishSpeech]) -> str:
    """How many parameters the stacks have, and how much of the codec's state dict is none."""
    seen = "; ".join(map(_seen, records))
    return (
        "Parameters of the Slow and the Fast AR by part, parameters and buffers of the codec, and the mean norm and "
        f"peakedness of the Slow AR's matrices over relative depth. {seen}."
    )


def _seen(record: FishSpeech) -> str:
    roles = record.role_parameters
    text = (
        f"{drawing.name_of(record)}: {roles['slow_ar'] / 1e6:,.1f} million parameters work in the Slow AR and "
        f"{roles['fast_ar'] / 1e6:,.1f} million in the Fast AR"
    )
    codec = drawing.value(record, "codec_budget")
    if codec is None:
        return text
    buffers = float(codec[codec.part.str.contains("buffers")].sum())
    return f"{text}, and {buffers:.1f} of the codec's {float(codec.sum()):.1f} million elements are buffers"
