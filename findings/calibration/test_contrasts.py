"""Known answers of the tests between kinds of pairs: planted effects, planted confounds, and the published pairs."""

import numpy as np
import pytest
import xarray as xr

from lab import published
from lab.errors import NotApplicable
from lab.experiments.layers.contrastive_trajectories import ContrastiveTrajectories
from lab.statistics.contrasts import (
    SIGNIFICANT,
    benjamini_hochberg,
    eta_squared,
    group_means,
    grouped_contrast,
    label_contrast,
    paired_contrast,
    sign_flip_p_values,
)

pytestmark = pytest.mark.calibration

LAYERS = 12
PLANTED = (3, 4, 9)


def smooth_noise(draw, rows):
    """Noise of standard deviation 1 that neighbouring layers share, as divergences do."""
    steps = draw.normal(size=(rows, LAYERS))
    noise = np.empty_like(steps)
    noise[:, 0] = steps[:, 0]
    for layer in range(1, LAYERS):
        noise[:, layer] = 0.8 * noise[:, layer - 1] + 0.6 * steps[:, layer]
    return noise


def found(contrast):
    return tuple(np.flatnonzero(contrast.q < SIGNIFICANT).tolist())


def test_a_planted_difference_of_families_is_found_where_it_is():
    """40 families, a difference of 1.5 standard deviations in three layers: these layers, and no others."""
    differences = smooth_noise(np.random.default_rng(0), 40)
    differences[:, PLANTED] += 1.5
    contrast = paired_contrast(differences)
    assert found(contrast) == PLANTED
    assert contrast.found(PLANTED, sign=1)
    assert not contrast.found(PLANTED, sign=-1)
    assert not contrast.found([0, 1], sign=1)


def test_without_effect_families_give_few_false_findings():
    """In 200 repetitions without effect at most 5 % find a layer (plus two standard errors)."""
    draw = np.random.default_rng(1)
    false = [bool(found(paired_contrast(smooth_noise(draw, 20)))) for _ in range(200)]
    assert np.mean(false) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200)


def triples(draw, groups, effect=0.0):
    """Pairs of `groups` groups, half of them triples of three pairs that correlate by 0.8 within their group."""
    sizes = np.where(np.arange(groups) % 2, 3, 1)
    group = np.repeat(np.arange(groups), sizes)
    values = np.sqrt(0.8) * smooth_noise(draw, groups)[group] + np.sqrt(0.2) * smooth_noise(draw, len(group))
    labels = sizes[group] == 1
    values[np.ix_(labels, PLANTED)] += effect
    return values, group, labels


def test_correlated_triples_do_not_inflate_the_test_of_groups():
    """Without effect, triples against single pairs: at most 5 % of 200 repetitions find a layer.

    Tested pair by pair the triples count threefold, and several times as many do.
    """
    draw = np.random.default_rng(2)
    by_group, by_pair = [], []
    for _ in range(200):
        values, group, labels = triples(draw, 24)
        means, first = group_means(values, group)
        by_group.append(bool(found(grouped_contrast(means, labels[first]))))
        by_pair.append(bool(found(grouped_contrast(values, labels))))
    assert np.mean(by_group) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200)
    assert np.mean(by_pair) > 2 * np.mean(by_group)


def test_a_planted_difference_of_groups_is_found_where_it_is():
    """80 groups, a difference of 2 standard deviations in three layers."""
    values, group, labels = triples(np.random.default_rng(3), 80, effect=2.0)
    means, first = group_means(values, group)
    assert found(grouped_contrast(means, labels[first])) == PLANTED


def test_a_confound_is_told_from_an_effect():
    """Completeness lowers late divergence, the kind does nothing, and kinds are as unbalanced as the source's.

    The raw comparison finds the published sign pattern, synonyms above antonyms; within strata of completeness there
    is nothing.
    """
    draw = np.random.default_rng(4)
    antonym = np.arange(120) < 60
    complete = np.where(antonym, draw.random(120) < 0.6, draw.random(120) < 0.1).astype(int)
    values = smooth_noise(draw, 120)
    values[:, LAYERS // 2 :] -= 2.5 * complete[:, None]
    raw = grouped_contrast(values, antonym)
    assert raw.found(range(LAYERS // 2, LAYERS), sign=-1)
    assert not found(grouped_contrast(values, antonym, complete))


def test_contrast_within_strata_is_the_least_squares_coefficient():
    """Of the label, beside one constant per stratum."""
    draw = np.random.default_rng(5)
    labels, strata, values = draw.random(30) < 0.4, draw.integers(0, 3, 30), draw.normal(size=(30, 2))
    design = np.column_stack([labels, *(strata == stratum for stratum in range(3))]).astype(float)
    coefficients = np.linalg.lstsq(design, values, rcond=None)[0]
    assert label_contrast(values, labels, strata) == pytest.approx(coefficients[0])
    plain = values[labels].mean(0) - values[~labels].mean(0)
    assert label_contrast(values, labels) == pytest.approx(plain)


def test_signs_of_few_rows_by_hand():
    """Three equal differences: 2 of 8 sign patterns reach the sum, so p is near a quarter."""
    assert sign_flip_p_values(np.ones((3, 1)))[0] == pytest.approx(0.25, abs=0.02)
    assert sign_flip_p_values(np.zeros((5, 1)))[0] == 1


def test_benjamini_hochberg_by_hand():
    """Four p values, adjusted by n / rank and made monotone."""
    assert benjamini_hochberg(np.array([0.01, 0.04, 0.03, 0.5])) == pytest.approx(
        [0.04, 4 * 0.04 / 3, 4 * 0.04 / 3, 0.5]
    )


def test_eta_squared_by_hand():
    """Classes that explain everything, nothing, and half of the variance."""
    values = np.array([[0.0, 0, 0], [0, 1, 2], [1, 0, 2], [1, 1, 4]])
    assert eta_squared(values, np.array([0, 0, 1, 1])) == pytest.approx([1, 0, 0.5])


# ---- the published pairs


def published_record() -> ContrastiveTrajectories:
    return ContrastiveTrajectories(published.dataset("contrastive_trajectories"))


def test_published_means_are_those_of_the_published_pairs():
    """Means by relationship and by condition follow from the single pairs, to their four digits."""
    record = published_record()
    for prefix in (None, "immediate", "shared"):
        values, kinds, _, _ = record.pairs(prefix=prefix)
        for kind in ("antonym", "synonym"):
            assert values[kinds == kind].mean(0) == pytest.approx(record.curve("kl_divergence", kind, prefix), rel=2e-3)


def test_known_ratios_of_the_published_pairs():
    """Antonym over synonym at layers 0 and 34: 1.188 and 0.736 without a stem, 1.339 and 6.79 if words are whole."""
    record = published_record()
    assert record.ratio("immediate")[[0, 34]] == pytest.approx([1.188, 0.736], abs=5e-4)
    values, kinds, _, _ = record.pairs(complete=True)
    assert ((kinds == "antonym").sum(), (kinds == "synonym").sum()) == (29, 22)
    ratio = values[kinds == "antonym"].mean(0) / values[kinds == "synonym"].mean(0)
    assert ratio[[0, 34]] == pytest.approx([1.339, 6.79], abs=5e-3)
    assert (ratio < 1).nonzero()[0].tolist() == [6]


def test_known_p_values_of_the_published_groups():
    """Group permutation without a stem: .09, .07, .12, .37, .67 at layers 0 to 4; nothing survives correction."""
    contrast = published_record().contrast(prefix="immediate")
    assert contrast.p[:5] == pytest.approx([0.09, 0.07, 0.12, 0.37, 0.67], abs=0.02)
    assert not found(contrast)


def test_a_published_contrast_of_few_groups_is_refused():
    """Nine complete shared antonym groups are too few."""
    with pytest.raises(NotApplicable, match="9 groups in a cell"):
        published_record().contrast(prefix="shared", complete=True)


def test_explained_variance_of_one_planted_factor():
    """A record whose divergence depends on the stem alone: the stem explains all, the relationship nothing."""
    values = np.zeros((12, 3, 2, LAYERS))
    values[:, :, 1] = 1
    attributes = {"subject": "made", "source": "measured"}
    dims = ("family", "contrast", "prefix", "layer")
    record = ContrastiveTrajectories(xr.Dataset({"kl_divergence": (dims, values)}, attrs=attributes))
    assert record.explained("prefix") == pytest.approx(np.ones(LAYERS))
    assert record.explained("relationship") == pytest.approx(np.zeros(LAYERS))
