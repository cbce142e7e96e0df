"""Are points of one category more alike than points of two? Cosines within and between categories of prompts.

All from the sums of cosines over pairs of prompts, G_rs = <S_r, S_s> with S_r the sum of the unit states of prompt r.
Tokens of one text resemble each other whatever the category, so pairs within a prompt can be left out; and
categories are labels of prompts, so the null shuffles labels over prompts, not over tokens.
"""

from __future__ import annotations

import numpy as np

from lab.statistics.permutation import share_reached

PERMUTATIONS = 999
SEED = 20260704


def memberships(categories: np.ndarray) -> np.ndarray:
    """Membership of each prompt in each category [C, R], 0 or 1, in the order of first members."""
    names = np.array(list(dict.fromkeys(categories.tolist())))
    member: np.ndarray = (categories == names[:, None]).astype(float)
    return member


def within_and_between(
    sums: np.ndarray, tokens: np.ndarray, member: np.ndarray, draws: np.ndarray, *, other_prompts: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Mean cosine within categories and between them [...], each an unweighted mean over categories or pairs of them.

    Args:
        sums: sums of cosines over the pairs of tokens of two prompts [..., R, R].
        tokens: tokens per prompt [R].
        member: membership [C, R].
        draws: how often each prompt is drawn [R].
        other_prompts: leave out pairs of tokens of one prompt, and not only a token with itself.

    Returns:
        NaN where a category lacks pairs, unless others have them; NaN between if there is one category only.
    """
    weighted = member * draws
    total = weighted @ sums @ weighted.T
    count = np.outer(weighted @ tokens, weighted @ tokens)
    if other_prompts:
        own = np.diagonal(sums, axis1=-2, axis2=-1) @ (weighted**2).T
        own_count = weighted**2 @ tokens**2
    else:
        own = own_count = weighted**2 @ tokens
    inside = np.diagonal(total, axis1=-2, axis2=-1) - own
    inside_count = np.diagonal(count) - own_count
    first, second = np.triu_indices(len(member), k=1)
    within = _mean_ratio(inside, np.broadcast_to(inside_count, inside.shape))
    pairs = total[..., first, second]
    return within, _mean_ratio(pairs, np.broadcast_to(count[first, second], pairs.shape))


def centroid_cosine(products: np.ndarray, member: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Mean cosine between the mean states of two categories, over all pairs of categories [...].

    Args:
        products: inner products of the prompts' summed states [..., R, R].
        member: membership [C, R].
        draws: how often each prompt is drawn [R].
    """
    weighted = member * draws
    gram = weighted @ products @ weighted.T
    norm = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = gram / (norm[..., :, None] * norm[..., None, :])
    first, second = np.triu_indices(len(member), k=1)
    pairs = cosines[..., first, second]
    there = np.isfinite(pairs)  # a category of which no prompt was drawn has no mean
    return _mean_ratio(np.where(there, pairs, 0), there)


def largest_gap_p_value(sums: np.ndarray, tokens: np.ndarray, member: np.ndarray) -> float:
    """Chance that shuffled labels give as large a gap, within minus between, at the best of all sites (one-sided).

    Pairs within a prompt are left out. The maximum over sites is compared with the maximum over sites, so no
    correction for their number is needed. NaN with fewer than two categories, or where none has two prompts.

    Args:
        sums: sums of cosines [site, R, R].
        tokens: tokens per prompt [R].
        member: membership [C, R].
    """
    if len(member) < 2:
        return float("nan")
    generator = np.random.default_rng(SEED)
    once = np.ones(member.shape[1])

    def largest(labels: np.ndarray) -> float:
        within, between = within_and_between(sums, tokens, labels, once, other_prompts=True)
        return float(np.nanmax(within - between))

    given = largest(member)
    null = [largest(generator.permutation(member, axis=1)) for _ in range(PERMUTATIONS)]
    return float(share_reached(given, np.array(null), 1e-12))


def _mean_ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean over the last axis of sums / counts [..., n] -> [...], where there is anything to count; else NaN."""
    there = counts > 0
    ratios = np.divide(sums, counts, out=np.zeros(sums.shape), where=there)
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = ratios.sum(-1) / there.sum(-1)
    return mean
