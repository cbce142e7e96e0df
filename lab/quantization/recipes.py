"""Mixed-precision recipes: how many bits each layer gets under a budget."""

from __future__ import annotations

import numpy as np

TARGET = 4.0  #: mean bits per weight that the published recipes aim at
SLACK = 0.05  #: and how far off they may end
NARROWEST, WIDEST = 2, 8

Bits = np.ndarray


def published_rule(score: np.ndarray) -> Bits:
    """The source's widths [layer] for a score [layer]: more bits where the score is higher.

    u = (s - min) / (max - min + 1e-8), raw = 2 + 6 u, scaled to a mean of 4, rounded half to even, clipped to 2..8,
    then trimmed (`trimmed`).

    Raises:
        ValueError: a score is NaN or infinite.
    """
    score = np.asarray(score, dtype=float)
    if not np.isfinite(score).all():
        raise ValueError(f"layer {int(np.argmin(np.isfinite(score)))} has no finite score; no width follows from it")
    unit = (score - score.min()) / (score.max() - score.min() + 1e-8)
    raw = NARROWEST + (WIDEST - NARROWEST) * unit
    return trimmed(np.clip(np.round(raw * TARGET * len(raw) / raw.sum()), NARROWEST, WIDEST).astype(int))


def trimmed(bits: Bits) -> Bits:
    """The source's trim: one bit at a time until the mean is within 0.05 of 4.

    Bits are taken from the *first* layer of maximal width, given to the first of minimal width. It knows nothing of
    protection: it took back the 8 bits that one recipe gave to the first and the last layer.
    """
    bits = np.array(bits)
    while abs(bits.mean() - TARGET) > SLACK:
        if bits.mean() > TARGET:
            bits[int(np.argmax(bits))] -= 1
        else:
            bits[int(np.argmin(bits))] += 1
    return bits


def first_last_protected(layers: int) -> Bits:
    """The source's recipe of that name: 8 bits in the first and the last layer, 4 elsewhere, then the trim."""
    return trimmed(ends(layers, first=WIDEST, last=WIDEST))


def ends(layers: int, *, first: int, last: int) -> Bits:
    """4 bits everywhere but in the first and the last layer."""
    bits = np.full(layers, int(TARGET))
    bits[0], bits[-1] = first, last
    return bits


def thirds(score: np.ndarray) -> Bits:
    """5 bits for the third of the layers with the highest scores, 3 for the lowest third, 4 between: mean exactly 4.

    One histogram for all predictors, so that recipes differ in what they know, not in how far they spread.
    """
    layers = len(score)
    order = np.argsort(-np.asarray(score, dtype=float), kind="stable")
    bits = np.full(layers, int(TARGET))
    bits[order[: layers // 3]] += 1
    bits[order[layers - layers // 3 :]] -= 1
    return bits


def permuted_thirds(layers: int, count: int, seed: int = 20260704) -> Bits:
    """The same histogram in random order [permutation, layer]: what a predictor that knows nothing achieves."""
    generator = np.random.default_rng(seed)
    bits: Bits = generator.permuted(np.tile(thirds(np.arange(layers)), (count, 1)), axis=1)
    return bits


def greedy_oracle(losses: np.ndarray, widths: tuple[int, ...], sizes: np.ndarray, target: float = TARGET) -> Bits:
    """Widths [layer] that minimise the sum of single-layer losses under a mean of at most `target` bits per weight.

    Starts from the narrowest width and always buys the step up that saves most loss per bit. Where losses fall
    convexly with the width this is the optimum up to the last step (Everett 1963); losses need not be positive.

    Args:
        losses: rise of the loss with one layer at each width [layer, width], nat/token.
        widths: rising.
        sizes: weights per layer [layer], by which the mean is weighted.
        target: mean bits per weight.
    """
    chosen = np.zeros(len(losses), dtype=int)
    spent, budget = float(sizes.sum() * widths[0]), float(sizes.sum() * target)
    while True:
        best, gain = -1, 0.0
        for layer, at in enumerate(chosen):
            if at + 1 < len(widths):
                cost = sizes[layer] * (widths[at + 1] - widths[at])
                saved = (losses[layer, at] - losses[layer, at + 1]) / cost
                if spent + cost <= budget + 1e-9 and (best < 0 or saved > gain):
                    best, gain = layer, saved
        if best < 0:
            return np.array(widths)[chosen]
        spent += sizes[best] * (widths[chosen[best] + 1] - widths[chosen[best]])
        chosen[best] += 1


def mean_bits(bits: Bits, sizes: np.ndarray) -> float:
    """Mean width per weight [...] of widths [..., part], weighted by the number of weights in each part."""
    return float(np.asarray(bits, dtype=float) @ sizes / np.sum(sizes))
