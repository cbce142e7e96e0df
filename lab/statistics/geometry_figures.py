"""Figures of residual-stream geometry from what a measurement keeps per prompt, for any draw of the prompts.

What is kept is additive over prompts (sums over tokens, inner products of scatter matrices), so that a bootstrap
resample needs its draw counts only. Exact for means, spreads, participation ratios and cosines, given the centre of the
whole sample. Eigenvalues of a resample are taken along the principal directions of the whole sample, which is
their first-order perturbation; what depends on a direction that was projected out keeps the direction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import xarray as xr

from lab.statistics.category_cosines import centroid_cosine, memberships, within_and_between
from lab.statistics.point_clouds import EIGENVALUE_FLOOR, pair_mean, participation_ratio, rounding, spectral_flatness

WEIGHTINGS = ("raw", "without_top1", "without_top2", "unit", "trimmed")
CENTRINGS = ("raw", "centered")
#: numbers of leading directions whose share of the variance is reported
SHARES = (1, 5, 10, 50, 100)
SINGULAR_VALUES = 20
#: added to norms in denominators, as the source does
GUARD = 1e-10


class Kept:
    """A measured record as plain arrays, shared by all draws of its prompts.

    Args:
        data: as `lab.experiments.layers.residual_geometry.measure` returns it; prompts are the last axis.
    """

    def __init__(self, data: xr.Dataset):
        names = (*data.data_vars, *data.coords)
        self.arrays: dict[str, np.ndarray] = {str(name): data[name].values for name in names}
        self.tokens = self.arrays["scored_tokens"].astype(float)
        self.member = memberships(self.arrays["category"])
        sites, layers = self.arrays["site"], self.arrays["layer"]
        ranks = np.arange(1, len(self.arrays["direction_scatter"][0]) + 1)
        self.labels = {"site": sites, "layer": layers, "layer_other": layers, "rank": ranks, "gap": self.arrays["gap"]}


@dataclass(frozen=True)
class Draw:
    """How often each prompt of a measured record is drawn [R]; ones for the sample itself."""

    kept: Kept
    draws: np.ndarray
    _found: dict[str, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, name: str) -> np.ndarray:
        """A recorded variable as a plain array."""
        return self.kept.arrays[name]

    def figure(self, name: str) -> np.ndarray:
        """A figure, computed once."""
        if name not in self._found:
            with np.errstate(divide="ignore", invalid="ignore"):
                self._found[name] = FIGURES[name].compute(self)
        return self._found[name]

    def labelled(self, name: str) -> xr.DataArray:
        """A figure with its labels, unit and description."""
        made, values = FIGURES[name], self.figure(name)
        coords = {dim: self.kept.labels[dim][:size] for dim, size in zip(made.dims, values.shape, strict=True)}
        return xr.DataArray(values, coords, made.dims, attrs={"unit": made.unit, "description": made.description})

    def mean(self, name: str) -> np.ndarray:
        """Mean over all tokens drawn [...] of a mean per prompt [..., R]."""
        weights = self.draws * self.kept.tokens
        mean: np.ndarray = self[name] @ weights / weights.sum()
        return mean

    def category_cosines(self, centring: str, *, other_prompts: bool) -> tuple[np.ndarray, np.ndarray]:
        """Mean cosine within and between categories [site]; see `within_and_between`."""
        sums = self["cosine_sum"][:, CENTRINGS.index(centring)]
        return within_and_between(sums, self.kept.tokens, self.kept.member, self.draws, other_prompts=other_prompts)


def _root(values: np.ndarray) -> np.ndarray:
    """Square root; a variance of zero may come out as a rounding below it."""
    root: np.ndarray = np.sqrt(np.maximum(values, 0))
    return root


def _mean(name: str, draw: Draw) -> np.ndarray:
    return draw.mean(name)


def _std(name: str, draw: Draw) -> np.ndarray:
    """Population standard deviation from the means of values and squares."""
    return _root(draw.mean(f"{name}_square") - draw.mean(name) ** 2)


def _norm_min(draw: Draw) -> np.ndarray:
    least: np.ndarray = draw["norm_min"][:, draw.draws > 0].min(-1)
    return least


def _norm_max(draw: Draw) -> np.ndarray:
    largest: np.ndarray = draw["norm_max"][:, draw.draws > 0].max(-1)
    return largest


def _participation_ratio(weighting: str, draw: Draw) -> np.ndarray:
    index = WEIGHTINGS.index(weighting)
    trace = draw["scatter"][:, index] @ draw.draws
    return participation_ratio(trace, draw.draws @ draw["scatter_product"][:, index] @ draw.draws)


def _scatters(draw: Draw) -> np.ndarray:
    """Scatter along the principal directions, falling [site, K]."""
    rising: np.ndarray = np.sort(draw["direction_scatter"] @ draw.draws, axis=-1)
    return rising[:, ::-1]


def _variance_top(count: int, draw: Draw) -> np.ndarray:
    share: np.ndarray = draw.figure("direction_scatters")[:, :count].sum(-1) / (draw["scatter"][:, 0] @ draw.draws)
    return share


def _singular_values(draw: Draw) -> np.ndarray:
    return _root(draw.figure("direction_scatters")[:, :SINGULAR_VALUES])


def _spectrum(draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues of the covariance [site, d] and what they may be by rounding alone [site, 1]."""
    tokens = draw.draws @ draw.kept.tokens
    spectrum = draw.figure("direction_scatters") / (tokens - 1)
    return spectrum, rounding(spectrum, int(max(tokens, spectrum.shape[1])))


def _flatness(draw: Draw) -> np.ndarray:
    spectrum, noise = _spectrum(draw)
    return spectral_flatness(spectrum, np.maximum(noise, EIGENVALUE_FLOOR))


def _rank(draw: Draw) -> np.ndarray:
    spectrum, noise = _spectrum(draw)
    rank: np.ndarray = (spectrum > noise).sum(-1)
    return rank


def _flatness_leading(draw: Draw) -> np.ndarray:
    rank = int(draw["flatness_rank"])
    return spectral_flatness(draw.figure("direction_scatters")[:, :rank], floor=0)


def _single_token(draw: Draw) -> np.ndarray:
    ratio: np.ndarray = draw.figure("direction_scatters")[:, 0] / draw.figure("norm_max") ** 2
    return ratio


def _cosine(kind: str, centring: str, draw: Draw) -> np.ndarray:
    return pair_mean(draw[kind][:, CENTRINGS.index(centring)], draw.kept.tokens, draw.draws)


def _cosine_std(centring: str, draw: Draw) -> np.ndarray:
    mean = draw.figure(f"cosine_{centring}_mean")
    return _root(_cosine("cosine_square_sum", centring, draw) - mean**2)


def _directional_dimension(draw: Draw) -> np.ndarray:
    dimension: np.ndarray = 1 / _cosine("cosine_square_sum", "centered", draw)
    return dimension


def _within(other_prompts: bool, draw: Draw) -> np.ndarray:
    return draw.category_cosines("raw", other_prompts=other_prompts)[0]


def _between(draw: Draw) -> np.ndarray:
    return draw.category_cosines("raw", other_prompts=False)[1]


def _separation(draw: Draw) -> np.ndarray:
    within, between = draw.figure("intra_category_cosine"), draw.figure("inter_category_cosine")
    separation: np.ndarray = (within - between) / (np.abs(between) + GUARD)
    return separation


def _gap(centring: str, draw: Draw) -> np.ndarray:
    within, between = draw.category_cosines(centring, other_prompts=True)
    gap: np.ndarray = within - between
    return gap


def _centroids(draw: Draw) -> np.ndarray:
    return centroid_cosine(draw["state_product"], draw.kept.member, draw.draws)


def _update_correlation(draw: Draw) -> np.ndarray:
    """Cosines of the layers' updates averaged over all tokens drawn [L, L]; 0 for a layer without update."""
    updates = np.einsum("r,lrd->ld", draw.draws * draw.kept.tokens, draw["update_mean"])
    norm = np.linalg.norm(updates, axis=1, keepdims=True)
    directions = np.divide(updates, norm, out=np.zeros_like(updates), where=norm > 0)
    cosines: np.ndarray = directions @ directions.T
    return cosines


@dataclass(frozen=True)
class Figure:
    """One figure: its dimensions, unit, one-line description, and how it follows from a draw."""

    dims: tuple[str, ...]
    unit: str
    description: str
    compute: Callable[[Draw], np.ndarray]


def _token_figures(dims: str, names: dict[str, tuple[str, str, str]], spread: tuple[str, ...]) -> dict[str, Figure]:
    found = {name: Figure((dims,), unit, says, partial(_mean, own)) for name, (own, unit, says) in names.items()}
    for name in spread:
        own, unit, _ = names[name]
        of = name.removesuffix("_mean").removesuffix("_signed")
        says = f"population standard deviation of {name} over tokens"
        found[f"{of}_std"] = Figure((dims,), unit, says, partial(_std, own))
    return found


_SITE_MEANS = {
    "norm_mean": ("norm", "norm", "mean norm of the state"),
    "cosine_to_embedding": ("cosine_to_embedding", "cosine", "mean cosine of the state with the token's embedding"),
    "cosine_to_final": ("cosine_to_final", "cosine", "mean cosine of the state with the token's final state"),
    "final_projection_signed": (
        "final_projection_signed",
        "norm",
        "mean component of the contribution (embedding or update) along the final state; sums to its mean norm",
    ),
    "final_norm_fraction": ("final_norm_fraction", "fraction", "mean of that component over the final norm; sums to 1"),
}
_LAYER_MEANS = {
    "update_norm_mean": ("update_norm", "norm", "mean norm of the layer's update"),
    "cosine_input_output": ("cosine_input_output", "cosine", "mean cosine between the layer's input and output"),
    "update_ratio": ("update_ratio", "ratio", "mean norm of the update over the norm of the layer's output"),
    "update_alignment": ("update_alignment", "cosine", "mean cosine of the update with the layer's input"),
    "update_cosine_to_final": ("update_cosine_to_final", "cosine", "mean cosine of the update with the final state"),
    "update_projection_fraction": ("update_projection_fraction", "fraction", "mean size of that cosine"),
}


def _site(unit: str, says: str, compute: Callable[[Draw], np.ndarray], *more: str) -> Figure:
    return Figure(("site", *more), unit, says, compute)


_CLOUD = {
    "participation_ratio": "of the centred states",
    "participation_ratio_without_top1": "after the leading principal direction was projected out",
    "participation_ratio_without_top2": "after the two leading principal directions were projected out",
    "participation_ratio_unit": "of the states scaled to norm 1, then centred",
    "participation_ratio_trimmed": "without the outlier tokens",
}
#: figure -> how it is made
FIGURES: dict[str, Figure] = {
    **_token_figures("site", _SITE_MEANS, ("norm_mean", "final_projection_signed")),
    **_token_figures(
        "layer", _LAYER_MEANS, ("update_norm_mean", "cosine_input_output", "update_ratio", "update_alignment")
    ),
    "drift_cosine": Figure(
        ("gap", "layer"),
        "cosine",
        "mean cosine of the states after layers a gap apart",
        partial(_mean, "drift_cosine"),
    ),
    "norm_min": _site("norm", "smallest norm of a state", _norm_min),
    "norm_max": _site("norm", "largest norm of a state", _norm_max),
    "outlier_tokens": _site(
        "token",
        "tokens of a norm above the outlier factor times the median",
        lambda draw: draw["outlier_tokens"] @ draw.draws,
    ),
    **{
        name: _site("dimensions", f"participation ratio {says}", partial(_participation_ratio, weighting))
        for weighting, (name, says) in zip(WEIGHTINGS, _CLOUD.items(), strict=True)
    },
    "direction_scatters": _site("norm^2", "squared singular values of the centred states", _scatters, "rank"),
    "singular_values": _site("norm", "largest singular values of the centred states", _singular_values, "rank"),
    **{
        f"variance_top{count}": _site(
            "fraction", f"share of the variance in the {count} leading directions", partial(_variance_top, count)
        )
        for count in SHARES
    },
    "spectral_flatness": _site(
        "fraction", "geometric over arithmetic mean of all eigenvalues above 1e-15 and rounding", _flatness
    ),
    "num_nonzero_singular_values": _site("count", "singular values of the centred states above rounding", _rank),
    "spectral_flatness_leading": _site(
        "fraction",
        "geometric over arithmetic mean of the leading eigenvalues",
        _flatness_leading,
    ),
    "top1_as_single_token": _site(
        "ratio",
        "squared leading singular value over squared largest norm; about 1 if one token makes it",
        _single_token,
    ),
    **{
        f"cosine_{centring}_mean": _site(
            "cosine", f"mean cosine of two tokens, {centring} states", partial(_cosine, "cosine_sum", centring)
        )
        for centring in CENTRINGS
    },
    **{
        f"cosine_{centring}_std": _site(
            "cosine", f"standard deviation over pairs of tokens, {centring} states", partial(_cosine_std, centring)
        )
        for centring in CENTRINGS
    },
    "directional_dimension": _site(
        "dimensions", "1 / mean squared cosine of two centred states: dimension without norms", _directional_dimension
    ),
    "intra_category_cosine": _site("cosine", "mean cosine of two tokens of one category", partial(_within, False)),
    "intra_category_cosine_other_prompts": _site(
        "cosine", "mean cosine of two tokens of one category and different prompts", partial(_within, True)
    ),
    "inter_category_cosine": _site("cosine", "mean cosine of two tokens of different categories", _between),
    "category_separation": _site("ratio", "(intra - inter) / |inter|, as published", _separation),
    "category_gap": _site("cosine", "intra - inter, different prompts only", partial(_gap, "raw")),
    "category_gap_centered": _site("cosine", "the same of centred states", partial(_gap, "centered")),
    "centroid_cosine_mean": _site("cosine", "mean cosine between the mean states of two categories", _centroids),
    "update_correlation": Figure(
        ("layer", "layer_other"), "cosine", "cosine between token-averaged updates of two layers", _update_correlation
    ),
}
