"""Permutation tests against the count of all permutations, and autocorrelations worked out by hand."""

from __future__ import annotations

from itertools import pairwise, permutations

import numpy as np
import pytest

from lab.statistics.category_cosines import largest_gap_p_value
from lab.statistics.contrasts import benjamini_hochberg, sign_flip_p_values
from lab.statistics.depth import zone_shift_p_value
from lab.statistics.mantel import label_contrast_p_value, mantel_p_value
from lab.statistics.permutation import clustering_p_value, hub_p_value, lag_one_autocorrelation, share_reached

pytestmark = pytest.mark.calibration


def within_chance(share):
    """999 random permutations lie so close to the share of all of them, three deviations."""
    return pytest.approx(share, abs=3 * (share * (1 - share) / 999) ** 0.5 + 0.001)


def test_autocorrelations_by_hand():
    # 1..5, centred: products of neighbours 2 + 0 + 0 + 2, squares 4 + 1 + 0 + 1 + 4
    assert lag_one_autocorrelation(np.arange(1.0, 6)) == pytest.approx(0.4)
    # 1, -1, 1, -1: products -3, squares 4
    assert lag_one_autocorrelation(np.array([[1.0, -1, 1, -1], [3, 1, 3, 1]])) == pytest.approx([-0.75, -0.75])


@pytest.mark.parametrize("profile", [[0.0, 1, 2, 3, 5, 8], [5.0, 8, 0, 1, 3, 2], [0.0, 3, 1, 8, 2, 5]])
def test_the_chance_of_a_clustered_profile_is_the_share_of_all_its_orders(profile):
    def products(values):
        centred = np.array(values) - np.mean(values)
        return sum(a * b for a, b in pairwise(centred))

    exact = np.mean([products(order) >= products(profile) - 1e-9 for order in permutations(profile)])
    assert clustering_p_value(np.array(profile)) == within_chance(exact)


def mean_ranks(edges, pairs):
    """Mean rank of each of four nodes' three edges."""
    return [sum(edge for edge, pair in zip(edges, pairs, strict=True) if node in pair) / 3 for node in range(4)]


@pytest.mark.parametrize("strongest", [[0, 1, 2], [1, 3, 5], [2, 3, 4]])
def test_the_chance_of_a_hub_is_the_share_of_all_graphs_with_one_as_strong(strongest):
    """Six edges among four nodes have 720 orders; the diagonal is not read."""
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    ranks = [pair if pair not in strongest else pair + 10 for pair in range(6)]
    strength = np.diag([1e9, -1e9, 1e9, 0.0])
    for pair, rank in zip(pairs, ranks, strict=True):
        strength[pair] = strength[pair[::-1]] = 0.1 * rank**3
    order = sorted(ranks)
    given = max(mean_ranks([order.index(rank) for rank in ranks], pairs))
    null = [max(mean_ranks(edges, pairs)) for edges in permutations(range(6))]
    exact = np.mean(np.array(null) >= given - 1e-9)
    assert hub_p_value(strength) == within_chance(exact)


def test_a_planted_hub_is_found_and_its_chance_is_never_zero():
    noise = np.random.default_rng(0).normal(size=(12, 12))
    strength = noise + noise.T
    assert hub_p_value(strength) > 0.05
    strength[5, :] += 20
    strength[:, 5] += 20
    assert hub_p_value(strength) == 1 / 1000
    assert clustering_p_value(np.arange(30.0)) == 1 / 1000


def symmetric(missing=None):
    """A symmetric matrix [6, 6] of noise, one pair NaN if asked for."""
    half = np.random.default_rng(4).standard_normal((6, 6))
    matrix = half + half.T
    if missing is not None:
        matrix[missing] = matrix[missing[::-1]] = np.nan
    return matrix


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN slice")
def test_what_cannot_be_said_of_the_data_has_no_p_value():
    """NaN counts as reached by no permutation: as if it were the strongest evidence."""
    noise, holed = np.random.default_rng(0).standard_normal(12), symmetric((1, 4))
    labels = np.array([0, 0, 0, 1, 1, 1])
    assert np.isnan(clustering_p_value(np.ones(12)))
    assert np.isnan(clustering_p_value(np.where(np.arange(12) == 3, np.nan, noise)))
    assert np.isnan(zone_shift_p_value(np.where(np.arange(12) == 3, np.nan, noise), 5))
    assert np.isnan(hub_p_value(holed))
    assert np.isnan(mantel_p_value(holed, symmetric()))
    assert np.isnan(mantel_p_value(symmetric(), symmetric(), given=np.ones((6, 6))))
    assert np.isnan(label_contrast_p_value(holed, labels))
    one_each = np.eye(3)
    assert np.isnan(largest_gap_p_value(np.ones((2, 3, 3)), np.ones(3), one_each))


def test_a_missing_test_leaves_the_others_as_they_are():
    differences = np.random.default_rng(1).normal(0.5, 1, (20, 3))
    holed = differences.copy()
    holed[4, 1] = np.nan
    p_values = sign_flip_p_values(holed)
    assert np.isnan(p_values[1])
    np.testing.assert_array_equal(p_values[[0, 2]], sign_flip_p_values(differences)[[0, 2]])
    np.testing.assert_allclose(benjamini_hochberg(np.array([0.02, np.nan, 0.03])), [0.03, np.nan, 0.03])


def test_the_share_reached_counts_the_given_arrangement_and_what_is_equal():
    null = np.array([[1.0, 5.0], [2.0, 6.0], [3.0, 7.0]])
    assert share_reached(np.array([2.0, 8.0]), null, 1e-9) == pytest.approx([0.75, 0.25])
