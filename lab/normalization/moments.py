"""What a norm sees: moments of all elements of a text, as published, and token by token, where no outlier rules.

The first token of a text often carries a massive activation, a few elements 100 to 1000 times the rest. Pooled moments
after the layer where it appears describe that one vector; figures per token leave it out and keep it apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: below this an element counts as near zero, as published
NEAR_ZERO = 1e-3


def pooled(x: Tensor) -> dict[str, float]:
    """Moments over all elements of one text, tokens times channels [T, d].

    Returns:
        `mean`; `std` (ddof 1); `excess_kurtosis` (biased; 0 for a Gaussian, at most N - 5 + 1/(N - 1) for N elements,
        when one is not zero); `skewness` (biased); `near_zero_fraction`; `top_element_power_share`, max x^2 / sum x^2.
    """
    values = x.double().flatten()
    centred = values - values.mean()
    variance = centred.square().mean()
    return {
        "mean": float(values.mean()),
        "std": float((variance * len(values) / (len(values) - 1)).sqrt()),
        "excess_kurtosis": float(centred.pow(4).mean() / variance.square() - 3),
        "skewness": float(centred.pow(3).mean() / variance.pow(1.5)),
        "near_zero_fraction": float((values.abs() < NEAR_ZERO).double().mean()),
        "top_element_power_share": float(values.square().max() / values.square().sum()),
    }


def per_token(x: Tensor) -> dict[str, float]:
    """Medians over the tokens of one text [T, d], the first left out, of figures over channels.

    Returns:
        `token_std` (ddof 0), `token_rms`, `token_excess_kurtosis` (biased); `token_rms_spread`, the 95th over the 5th
        percentile of the root mean square; `first_token_rms`; `mean_to_std`, the mean over tokens of |mu| / sigma.
    """
    wide = x.float()
    rms = wide.square().mean(-1).sqrt()
    later = wide[1:]
    mean = later.mean(-1, keepdim=True)
    variance = (later - mean).square().mean(-1)
    kurtosis = (later - mean).pow(4).mean(-1) / variance.square() - 3
    low, high = torch.quantile(rms[1:], torch.tensor([0.05, 0.95], device=x.device))
    return {
        "token_std": float(variance.sqrt().median()),
        "token_rms": float(rms[1:].median()),
        "token_excess_kurtosis": float(kurtosis.median()),
        "token_rms_spread": float(high / low),
        "first_token_rms": float(rms[0]),
        "mean_to_std": float((mean[:, 0].abs() / variance.sqrt()).mean()),
    }


def token_means(x: Tensor) -> dict[str, float]:
    """Means over all tokens of one text [T, d], first included, as published.

    Returns:
        `token_mean` of mu, `token_abs_mean` of |mu|, `token_std` of the channel standard deviation (ddof 1).
    """
    wide = x.float()
    mean = wide.mean(-1)
    return {
        "token_mean": float(mean.mean()),
        "token_abs_mean": float(mean.abs().mean()),
        "token_std": float(wide.std(-1).mean()),
    }


def layer_norm_change(x: Tensor, gain: Tensor, eps: float) -> float:
    """Median over tokens of one text [T, d], the first left out, of |LN(x) - RMS(x)| / |RMS(x)|, scale included.

    To first order this is |mu| |gain| / |gain * x|, the mean as the scale weighs it: a tiny mean rules the output where
    the gain is large on channels with small x. With a constant gain and means of r times the spread it is
    sqrt(2 - 2 / sqrt(1 + r^2)).
    """
    later = x[1:].float()
    centred = later - later.mean(-1, keepdim=True)
    layer, root = (gain * y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) for y in (centred, later))
    return float(((layer - root).norm(dim=-1) / root.norm(dim=-1)).median())


def head_extremes(x: Tensor, token_axis: int) -> dict[str, float]:
    """Largest |element| of one text's head vectors, and the median root mean square of a head vector.

    Args:
        x: one text's queries or keys, heads and tokens in either order, [..., head width].
        token_axis: axis of the tokens, from the first of which the extreme is taken too and the median is not.
    """
    wide = x.float()
    rms = wide.movedim(token_axis, 0)[1:].square().mean(-1).sqrt()
    return {"abs_max": float(wide.abs().max()), "rms_median": float(rms.median())}


def scale_figures(gain: Tensor) -> dict[str, float]:
    """Figures over the channels of an effective learned scale [d]."""
    wide = gain.double()
    deviation = (wide - 1).abs()
    return {
        "mean": float(wide.mean()),
        "std": float(wide.std(unbiased=False)),
        "min": float(wide.min()),
        "max": float(wide.max()),
        "abs_deviation_from_one": float(deviation.mean()),
        "near_one_fraction": float((deviation < 0.1).double().mean()),
        "within_50pct_fraction": float((deviation < 0.5).double().mean()),
    }
