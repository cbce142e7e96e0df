"""Figure of T-11 quantization: damage over depth, by matrix type, by weight error of whole models, and by recipe."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.errors import NotApplicable
from lab.experiments.systems.quantization import Quantization
from lab.report import drawing
from lab.report.style import looks

RISE = "rise of the loss [nat/token]"
#: whole-model methods whose relative weight error is known, and how they are named in the figure
BY_ERROR = ("rtn_2", "rtn_3", "rtn_4", "rtn_6", "minmax_2", "minmax_3", "mse_2", "bitsandbytes_nf4", "gguf_q4_0")
NOISE = ("noise_3", "noise_4")
ERRORS = (0.03, 0.1, 0.3, 1)  #: ticks of the weight error
RECIPES = (
    "t9_spectral",
    "uniform_4bit",
    "qk3_vmul5",
    "first_last_protected",
    "sensitivity_oracle",
    "last_layer_5bit",
    "first_last_8bit",
    "greedy_oracle",
)


def figure(records: Sequence[Quantization]) -> Figure:
    """Single layers at 2 and 3 bits; matrix types at 3 bits; damage against weight error; recipes of 4 bits."""
    layout = [["two", "two"], ["three", "true"], ["types", "methods"], ["recipes", "recipes"]]
    drawn, panels = drawing.mosaic(layout)
    for name, quantity, title in (
        ("two", "two_bit_damage", "One layer at 2 bits, as published (three levels)"),
        ("three", "three_bit_damage", "One layer at 3 bits"),
        ("true", "true_two_bit_damage", "One layer at 2 bits, four levels"),
    ):
        drawing.depth_profiles(panels[name], records, quantity, label=RISE, scale="symlog", linear_below=0.02)
        panels[name].set_title(title)
    drawing.bars(panels["types"], records, "type_damage", x_label="matrix type", label=RISE, names=_types(records))
    drawing.set_scale(panels["types"], "symlog", 0.02)
    panels["types"].set_title("One matrix type at 3 bits")
    _methods(panels["methods"], records)
    drawing.bars(panels["recipes"], records, _recipes, x_label="recipe, by family", label=RISE)
    drawing.set_scale(panels["recipes"], "log")
    panels["recipes"].set_title("Mixed widths, mean of 4 bits")
    drawing.legend(drawn, records)
    return drawn


def describe(records: Sequence[Quantization]) -> str:
    """Which layer and which matrix type are most sensitive, and what whole models lose."""
    seen = "; ".join(map(_seen, records))
    return (
        "Rise of the loss when the weights of one decoder layer are rounded to 2 and 3 bits, over relative depth; when "
        "one matrix type is, in all layers; of whole models against the relative error of their weights; and under "
        f"mixed-precision recipes. {seen}."
    )


def _methods(axes: Axes, records: Sequence[Quantization]) -> None:
    for record, look in zip(records, looks(records), strict=True):
        for names, marker in ((BY_ERROR, "o"), (NOISE, "x")):
            points = [(_weight_error(record, name), record.method_damage(name)) for name in _held(record, names)]
            if points:
                axes.plot(*zip(*points, strict=True), linestyle="", marker=marker, color=look.colour)
    axes.set_xscale("log")
    axes.set_xticks(ERRORS, list(map(str, ERRORS)))
    axes.minorticks_off()
    drawing.set_scale(axes, "symlog", 0.02)
    axes.set(xlabel="relative error of the weights [1]", ylabel=RISE)
    axes.set_title("Whole models; crosses: random noise")


def _held(record: Quantization, names: Sequence[str]) -> list[str]:
    known = record.methods if record.has("method_weight_error") else [n for n in record.methods if n.startswith("rtn_")]
    return [name for name in names if name in known]


def _weight_error(record: Quantization, method: str) -> float:
    """Measured in the middle layer; of published figures, which tell it of round-to-nearest, the mean over layers."""
    if record.has("method_weight_error"):
        return record.weight_error_of(method)
    return float(record.mean_weight_error(int(method.removeprefix("rtn_"))).mean())


def _types(records: Sequence[Quantization]) -> list[str]:
    names = dict.fromkeys(str(name) for record in records for name in record.type_damage["matrix"].values)
    return [name.removesuffix("_proj") for name in names]


def _recipes(record: Quantization) -> xr.DataArray:
    held = [name for name in RECIPES if name in record.recipes]
    return record.recipe_damages.sel(recipe=held)


def _seen(record: Quantization) -> str:
    damage = record.two_bit_damage
    worst, most = record.ranked(damage)[0], str(record.type_damage.idxmax().values)
    said = (
        f"{drawing.name_of(record)}: most at layer {worst} ({float(np.max(damage)):+.2f} nat per token at 2 bits), "
        f"most through {most}; whole model {record.method_damage('rtn_4'):+.2f} at 4 bits, "
        f"{record.method_damage('rtn_3'):+.2f} at 3"
    )
    try:
        return f"{said}, {record.method_damage('bitsandbytes_nf4'):+.2f} with NF4"
    except NotApplicable:
        return said
