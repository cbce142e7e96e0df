"""What norms are given and return in the intact model, text by text, and their learned scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from lab.corpora.batches import TokenBatch, token_batches
from lab.experiments.surgery.normalization import Budget
from lab.normalization import moments
from lab.normalization.replacements import Identity
from lab.normalization.sites import HEADS, Norm, Norms
from lab.normalization.surgery import tapped, walk
from lab.records import variable
from lab.residual.sweeps import Sample
from lab.store import Arrays, Sweep
from lab.subjects.anatomy import Decoder

Variables = dict[str, xr.Variable]
#: of query and key norms: their output in the intact model, what passes where all of them are gone, their input
CONDITIONS = ("with_qk_norm", "without_qk_norm", "raw_intact")

POOLED = {
    "mean": "mean",
    "std": "standard deviation",
    "excess_kurtosis": "excess kurtosis (0 for a Gaussian)",
    "skewness": "skewness",
    "near_zero_fraction": "share below 0.001 in size",
}
PER_TOKEN = {
    "norm_input_token_std": "median channel standard deviation of a token, first left out",
    "norm_input_token_rms": "median root mean square of a token, first left out",
    "norm_input_token_excess_kurtosis": "median excess kurtosis of a token's channels, first left out",
    "norm_input_token_rms_spread": "95th over 5th percentile of tokens' root mean squares, first left out",
    "norm_output_token_std": "median channel standard deviation of a token at the output, first left out",
    "first_token_rms": "root mean square of the first token",
    "mean_to_std": "mean over tokens of |channel mean| / channel standard deviation, first left out",
    "top_element_power_share": "share of the text's power in its largest element",
    "layer_norm_output_change": "median of |LN(x) - RMS(x)| / |RMS(x)|, first token left out",
}
STREAM = {
    "layer_output_std": "standard deviation of all elements of a text after the layer",
    "layer_output_token_rms": "median root mean square of a token after the layer, first left out",
    "layer_output_first_token_rms": "root mean square of the first token after the layer",
    "token_mean": "mean over tokens of the channel mean at the pre-attention norm",
    "token_abs_mean": "mean over tokens of the |channel mean| at the pre-attention norm",
    "token_std": "mean over tokens of the channel standard deviation (ddof 1) at the pre-attention norm",
}
SCALES = {
    "mean": "mean over channels of the effective learned scale",
    "std": "standard deviation over channels of the learned scale",
    "min": "least learned scale",
    "max": "greatest learned scale",
    "abs_deviation_from_one": "mean over channels of |scale - 1|",
    "near_one_fraction": "share of channels with |scale - 1| < 0.1",
}


def measured(decoder: Decoder, norms: Norms, sample: Sample, sweep: Sweep, budget: Budget) -> Variables:
    """Statistics at every norm [site, layer, prompt], of the stream [layer, prompt], and of the learned scales."""
    arrays = sweep.shard("activations", lambda: _observed(decoder, norms, sample, sweep, budget))
    found: Variables = {}
    for name, values in arrays.items():
        unit, dims, described = "1", _dims(name), _described(name)
        found[name] = variable(dims, values, unit, described, weights="text_weight")
    return found | _scales(norms)


def _dims(name: str) -> tuple[str, ...]:
    if name.startswith(HEADS):
        return ("condition", "layer", "prompt")
    if name == "final_layer_norm_output_change":
        return ("prompt",)
    return ("layer", "prompt") if name in STREAM else ("site", "layer", "prompt")


def _described(name: str) -> str:
    known = PER_TOKEN | STREAM
    if name in known:
        return known[name]
    if name.startswith(HEADS):
        what = "largest |element| of a text" if "abs_max" in name else "median root mean square of a head vector"
        return f"{what} among the {'queries' if name.startswith('query') else 'keys'}, before the rotary embedding"
    if name == "final_layer_norm_output_change":
        return "the same change of output at the final norm"
    place, _, figure = name.removeprefix("norm_").partition("_")
    return f"{POOLED[figure]} of all elements of a text at the norm's {place}"


def _observed(decoder: Decoder, norms: Norms, sample: Sample, sweep: Sweep, budget: Budget) -> Arrays:
    texts = len(sample.texts)
    log = _Log(norms, texts)
    batches = token_batches(sample.texts, budget.batch_tokens)
    for number, batch in enumerate(batches):
        batch = batch.to(decoder.device)
        _watch(decoder, norms, batch, log)
        if norms.head_roles:
            _watch_without_head_norms(decoder, norms, batch, log)
        sweep.progress(number + 1, len(batches), "batches of activations")
    return log.arrays


class _Log:
    """Collects figures of texts into arrays; a figure that was never noted has no array."""

    def __init__(self, norms: Norms, texts: int):
        self.norms, self.texts = norms, texts
        self.sites = list(norms.block_roles)
        self.arrays: Arrays = {}

    def note(self, name: str, place: tuple[int, ...], value: float) -> None:
        """Keep a figure: `place` is (site, layer, text), (condition, layer, text), (layer, text) or (text,)."""
        if name not in self.arrays:
            leading = len(CONDITIONS) if name.startswith(HEADS) else len(self.sites)
            shape = (leading, len(self.norms.layers), self.texts)[-len(place) :]
            self.arrays[name] = np.full(shape, np.nan)
        self.arrays[name][place] = value

    def note_all(self, figures: Mapping[str, float], place: tuple[int, ...]) -> None:
        """Keep several figures of one place."""
        for name, value in figures.items():
            self.note(name, place, value)


def _rows(x: Tensor, batch: TokenBatch, token_axis: int) -> list[Tensor]:
    """Each text's part of x without padding; the axis of texts is gone."""
    lengths = batch.lengths.tolist()
    return [row.narrow(token_axis - 1, 0, length) for row, length in zip(x, lengths, strict=True)]


@torch.no_grad()
def _watch(decoder: Decoder, norms: Norms, batch: TokenBatch, log: _Log) -> None:
    def layer_of(index: int) -> nn.Module:
        return tapped(decoder, norms, index, partial(_norm, log, norms, batch, index))

    state = torch.empty(0)
    for index, state in walk(decoder, batch, layer_of):
        for text, row in zip(batch.texts, _rows(state, batch, 1), strict=True):
            token = moments.per_token(row)
            figures = {
                "layer_output_std": moments.pooled(row)["std"],
                "layer_output_token_rms": token["token_rms"],
                "layer_output_first_token_rms": token["first_token_rms"],
            }
            log.note_all(figures, (index, text))
    for text, row in zip(batch.texts, _rows(state, batch, 1), strict=True):
        change = moments.layer_norm_change(row, norms.final.gain, norms.final.eps)
        log.note("final_layer_norm_output_change", (text,), change)


def _norm(log: _Log, norms: Norms, batch: TokenBatch, index: int, role: str, given: Tensor, returned: Tensor) -> None:
    """Note what one norm was given and returned."""
    norm = norms.layers[index][role]
    rows = zip(batch.texts, *(_rows(x, batch, norm.token_axis) for x in (given, returned)), strict=True)
    for text, before, after in rows:
        if role in HEADS:
            _note_heads(log, role, "raw_intact", index, text, before, norm)
            _note_heads(log, role, "with_qk_norm", index, text, after, norm)
            continue
        log.note_all(_block_figures(before, after, norm), (log.sites.index(role), index, text))
        if role == "pre_attention":
            log.note_all(moments.token_means(before), (index, text))


def _block_figures(before: Tensor, after: Tensor, norm: Norm) -> dict[str, float]:
    """Figures of one text at a norm of the block."""
    given, returned = moments.pooled(before), moments.pooled(after)
    token = moments.per_token(before)
    return {
        **{f"norm_input_{name}": given[name] for name in POOLED},
        **{f"norm_output_{name}": returned[name] for name in POOLED},
        **{f"norm_input_{name}": token[name] for name in token if name.startswith("token_")},
        "norm_output_token_std": moments.per_token(after)["token_std"],
        "first_token_rms": token["first_token_rms"],
        "mean_to_std": token["mean_to_std"],
        "top_element_power_share": given["top_element_power_share"],
        "layer_norm_output_change": moments.layer_norm_change(before, norm.gain, norm.eps),
    }


@torch.no_grad()
def _watch_without_head_norms(decoder: Decoder, norms: Norms, batch: TokenBatch, log: _Log) -> None:
    """The same of query and key in the model without any such norm, as published: its stream is another one."""

    def heads_only(norm: Norm) -> nn.Module:
        return Identity(norm) if norm.role in HEADS else decoder.layers[norm.layer].get_submodule(norm.path)

    def sink_of(index: int) -> Callable[[str, Tensor, Tensor], None]:
        def sink(role: str, given: Tensor, _: Tensor) -> None:
            if role in HEADS:
                norm = norms.layers[index][role]
                for text, row in zip(batch.texts, _rows(given, batch, norm.token_axis), strict=True):
                    _note_heads(log, role, "without_qk_norm", index, text, row, norm)

        return sink

    for _ in walk(decoder, batch, lambda index: tapped(decoder, norms, index, sink_of(index), heads_only)):
        pass


def _note_heads(log: _Log, role: str, condition: str, index: int, text: int, row: Tensor, norm: Norm) -> None:
    figures = moments.head_extremes(row, norm.token_axis - 1)
    place = (CONDITIONS.index(condition), index, text)
    log.note(f"{role}_abs_max_sample_mean", place, figures["abs_max"])
    log.note(f"{role}_rms_median", place, figures["rms_median"])


def _scales(norms: Norms) -> Variables:
    roles = norms.block_roles
    figures = [[moments.scale_figures(layer[role].gain) for layer in norms.layers] for role in roles]
    found = {
        f"scale_{name}": variable(("site", "layer"), [[at[name] for at in row] for row in figures], "1", described)
        for name, described in SCALES.items()
    }
    together = [moments.scale_figures(torch.cat([layer[role].gain for layer in norms.layers])) for role in roles]
    for name, figure, described in (
        ("scale_global_mean", "mean", "mean over layers and channels of the learned scale"),
        ("scale_global_std", "std", "standard deviation over layers and channels of the learned scale"),
        ("scale_within_10pct_fraction", "near_one_fraction", "share of all channels with |scale - 1| < 0.1"),
        ("scale_within_50pct_fraction", "within_50pct_fraction", "share of all channels with |scale - 1| < 0.5"),
    ):
        found[name] = variable("site", [at[figure] for at in together], "1", described)
    final = moments.scale_figures(norms.final.gain)
    found["final_scale_mean"] = variable((), final["mean"], "1", "mean learned scale of the final norm")
    found["final_scale_std"] = variable((), final["std"], "1", "standard deviation of the final norm's scale")
    return found
