"""Kernel alignment against the definition of its estimators, worked out index by index."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from lab.statistics.alignment import linear_cka, unbiased_cka

pytestmark = pytest.mark.calibration


def u_statistic(k, m):
    """HSIC as the mean of k_ij (m_ij + m_qr - 2 m_iq) over all ordered quadruples of different rows."""
    quadruples = list(permutations(range(len(k)), 4))
    return sum(k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in quadruples) / len(quadruples)


@pytest.mark.parametrize("rows", [4, 5, 7])
def test_the_unbiased_estimator_is_the_mean_over_quadruples_of_different_rows(rows):
    """Song et al. (2012) derive the closed form from this sum; it holds exactly, for any clouds."""
    generator = np.random.default_rng(rows)
    found = 0
    for _ in range(6):
        x, y = generator.normal(1, 1, (rows, 3)), generator.normal(-1, 2, (rows, 9))
        k, m = x @ x.T, y @ y.T
        own = u_statistic(k, k) * u_statistic(m, m)
        if own > 0:
            found += 1
            assert float(unbiased_cka(x, y)) == pytest.approx(u_statistic(k, m) / np.sqrt(own))
        else:
            assert np.isnan(unbiased_cka(x, y))
    assert found >= 3


def test_the_biased_estimator_is_the_cosine_of_centred_gram_matrices():
    """Three points on a line, worked out by hand: centred, x is (-1, 0, 1) and y is (-1, -1, 2)."""
    x, y = np.array([[0.0], [1.0], [2.0]]), np.array([[1.0], [1.0], [4.0]])
    # <xx', yy'> = (x . y)^2 = 9, |xx'| = x . x = 2, |yy'| = y . y = 6
    assert float(linear_cka(x, y)) == pytest.approx(9 / 12)


def test_a_cloud_without_extent_is_aligned_with_nothing():
    """By the biased estimator as published, which gives 0; the unbiased one does not exist there."""
    point, cloud = np.ones((5, 2)), np.random.default_rng(0).normal(size=(5, 2))
    assert float(linear_cka(point, cloud)) == 0
    assert np.isnan(unbiased_cka(np.zeros((5, 2)), cloud))


def test_the_published_threshold_is_of_the_product_of_norms():
    """Two clouds of 3 points, scaled until the product of their Gram norms is a little over, and under, 1e-10."""
    x = np.array([[-1.0], [0.0], [1.0]])  # the Gram matrix's norm is 2
    for product, aligned in ((1.01e-10, 1), (0.99e-10, 0)):
        scale = (product / 4) ** 0.25  # both clouds: scale^2 * 2 each
        assert float(linear_cka(scale * x, scale * x)) == pytest.approx(aligned)
