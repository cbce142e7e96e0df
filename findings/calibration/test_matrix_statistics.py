"""Known answers of the statistics on symmetric matrices: Mantel tests, contrasts between labels, clusters."""

from itertools import permutations

import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.statistics.clustering import (
    LINKAGES,
    agreement,
    clusters,
    components,
    distance_only,
    in_order_of_appearance,
    runs,
    separation,
)
from lab.statistics.mantel import (
    label_contrast,
    label_contrast_p_value,
    mantel_p_value,
    matrix_correlation,
    upper_triangle,
)

pytestmark = pytest.mark.calibration

ZONES = [0] * 4 + [1] * 9 + [2] * 5


def symmetric(n, seed):
    matrix = np.random.default_rng(seed).normal(size=(n, n))
    return matrix + matrix.T


def planted(labels, noise, seed=0):
    """Distance 1 within a zone, 3 between zones."""
    labels = np.array(labels)
    return 1 + 2 * (labels[:, None] != labels[None, :]) + noise * symmetric(len(labels), seed)


# ---- correlation of matrices


def test_mantel_p_values_are_shares_of_all_relabellings():
    """Of five items (an odd number), all 120 orders can be counted; 999 random ones come within three deviations."""
    x = symmetric(5, 1)
    y = x + 0.8 * symmetric(5, 2)
    given = scipy.stats.spearmanr(upper_triangle(x), upper_triangle(y)).statistic
    orders = [np.array(order) for order in permutations(range(5))]
    null = [scipy.stats.spearmanr(upper_triangle(x[np.ix_(o, o)]), upper_triangle(y)).statistic for o in orders]
    exact = np.mean(np.array(null) >= given - 1e-9)
    assert 0 < exact < 0.5
    assert mantel_p_value(x, y) == pytest.approx(exact, abs=3 * (exact * (1 - exact) / 999) ** 0.5 + 0.001)


@given(st.integers(4, 12), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_correlation_is_spearmans_over_the_pairs(n, seed):
    x, y = symmetric(n, seed), symmetric(n, seed + 100)
    expected = scipy.stats.spearmanr(upper_triangle(x), upper_triangle(y)).statistic
    assert matrix_correlation(x, y) == pytest.approx(expected)


@given(st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_correlation_does_not_depend_on_the_order_of_items(seed):
    x, y = symmetric(9, seed), symmetric(9, seed + 100)
    order = np.random.default_rng(seed).permutation(9)
    shuffled = matrix_correlation(x[np.ix_(order, order)], y[np.ix_(order, order)])
    assert shuffled == pytest.approx(matrix_correlation(x, y))


@given(st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_partial_correlation_is_the_textbook_formula(seed):
    x, y, z = (symmetric(8, seed + offset) for offset in (0, 100, 200))
    xy, xz, yz = matrix_correlation(x, y), matrix_correlation(x, z), matrix_correlation(y, z)
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert matrix_correlation(x, y, given=z) == pytest.approx(expected)


def test_correlation_with_a_constant_is_undefined():
    assert np.isnan(matrix_correlation(np.ones((5, 5)), symmetric(5, 0)))


# ---- Mantel


def test_a_matrix_is_associated_with_itself():
    assert mantel_p_value(symmetric(12, 0), symmetric(12, 0)) == 1 / 1000
    assert mantel_p_value(symmetric(12, 0), -symmetric(12, 0)) > 0.9


def test_p_values_of_unrelated_matrices_are_uniform():
    """Kolmogorov-Smirnov over 200 pairs of matrices that share nothing."""
    p_values = [mantel_p_value(symmetric(10, seed), symmetric(10, seed + 1000)) for seed in range(200)]
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.01


def test_shared_items_do_not_feign_an_association():
    """Matrices that are sums of item effects have dependent pairs: the plain test is far off, Mantel's is not."""
    effects = np.random.default_rng(0).normal(size=(2, 200, 12))
    sums = effects[..., :, None] + effects[..., None, :]
    pairs = [(upper_triangle(x), upper_triangle(y)) for x, y in zip(*sums, strict=True)]
    plain = np.mean([scipy.stats.spearmanr(x, y, alternative="greater").pvalue < 0.05 for x, y in pairs])
    mantel = np.mean([mantel_p_value(x, y) < 0.05 for x, y in zip(*sums, strict=True)])
    assert plain > 0.15
    assert mantel < 0.1


def test_an_association_by_distance_vanishes_given_distance():
    far = separation(20).astype(float)
    x, y = far + 2 * symmetric(20, 1), far + 2 * symmetric(20, 2)
    assert mantel_p_value(x, y) < 0.01
    assert mantel_p_value(x, y, given=far) > 0.05
    assert abs(matrix_correlation(x, y, given=far)) < 0.3 * matrix_correlation(x, y)


# ---- labels


def test_contrast_is_the_difference_of_means():
    labels = np.array([0, 0, 1, 1])
    matrix = np.where(labels[:, None] == labels[None, :], 1.0, 4.0)
    assert label_contrast(matrix, labels) == 3


def test_planted_labels_are_found_and_shuffled_ones_are_not():
    labels = np.arange(18) % 3
    matrix = planted(labels, noise=0.5)
    assert label_contrast_p_value(matrix, labels) < 0.01
    assert label_contrast_p_value(-matrix, labels) > 0.99
    p_values = [label_contrast_p_value(symmetric(12, seed), np.arange(12) % 3) for seed in range(200)]
    assert np.mean(np.array(p_values) < 0.05) < 0.1


# ---- clusters


@pytest.mark.parametrize("linkage", LINKAGES)
def test_planted_zones_are_recovered(linkage):
    assert clusters(planted(ZONES, noise=0.1), 3, linkage) == ZONES


@pytest.mark.parametrize("linkage", LINKAGES)
@given(seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_clusters_do_not_depend_on_the_order_of_items(linkage, seed):
    matrix = planted(ZONES, noise=0.3, seed=seed)
    matrix += max(0, -matrix.min())  # negative distances would count as 0, and ties go by the order
    order = np.random.default_rng(seed).permutation(len(ZONES))
    shuffled = clusters(matrix[np.ix_(order, order)], 4, linkage)
    assert agreement(shuffled, np.array(clusters(matrix, 4, linkage))[order]) == 1


@pytest.mark.parametrize("linkage", ["ward", "complete"])
@given(growth=st.floats(0.3, 2))
@settings(max_examples=15, deadline=None)
def test_mere_distance_gives_contiguous_clusters(linkage, growth):
    labels = clusters(separation(24) ** growth, 3, linkage)
    assert len(runs(labels)) == len(set(labels))


def test_negative_distances_count_as_zero():
    matrix = planted(ZONES, noise=0.1)
    assert clusters(np.where(matrix < 2, -1.0, matrix), 3) == ZONES


def test_distance_only_keeps_the_mean_of_every_diagonal():
    matrix = symmetric(7, 0)
    null = distance_only(matrix)
    assert np.array_equal(null, null.T)
    for k in range(7):
        assert np.allclose(np.diagonal(null, k), np.diagonal(matrix, k).mean())
    assert np.allclose(distance_only(null), null)


def test_agreement_is_1_for_equal_divisions_and_0_by_chance():
    assert agreement([0, 0, 1, 1, 2], [2, 2, 0, 0, 1]) == 1
    generator = np.random.default_rng(0)
    by_chance = [agreement(generator.permutation(ZONES), ZONES) for _ in range(300)]
    assert abs(np.mean(by_chance)) < 0.03


def test_components_are_those_of_the_graph():
    linked = np.zeros((6, 6), dtype=bool)
    for i, j in ((0, 3), (3, 5), (1, 2)):
        linked[i, j] = linked[j, i] = True
    assert components(linked) == [{0, 3, 5}, {1, 2}, {4}]


def test_runs_and_order_of_appearance():
    assert in_order_of_appearance([7, 7, 2, 7, 5]) == [0, 0, 1, 0, 2]
    assert runs([0, 0, 1, 0, 2]) == [range(2), range(2, 3), range(3, 4), range(4, 5)]


def test_runs_of_single_members():
    assert runs([0, 1, 1, 2]) == [range(1), range(1, 3), range(3, 4)]
    assert runs([0]) == [range(1)]
