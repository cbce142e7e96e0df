"""Contrasts of shares of right answers: known p-values, power, and what nothing gives."""

import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.statistics.proportions import (
    best_case_p_value,
    difference_half_width,
    fisher_p_value,
    mcnemar_p_value,
    paired_p_value,
)

pytestmark = pytest.mark.calibration


def test_published_p_values():
    """Those of the source's counts, of 200 problems each."""
    assert fisher_p_value(186, 179, 200) == pytest.approx(0.29, abs=0.005)
    assert fisher_p_value(110, 158, 200) == pytest.approx(5e-7, rel=0.1)
    assert best_case_p_value(186, 179) == pytest.approx(2 * 0.5**7)
    assert best_case_p_value(161, 156) == pytest.approx(2 * 0.5**5)


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_what_is_identical_differs_by_nothing(right):
    values = np.array(right, dtype=float)
    assert paired_p_value(values, values) == 1


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_is_a_coin_toss(first, second):
    tosses = np.arange(first + second + 1)
    chances = scipy.stats.binom.pmf(tosses, first + second, 0.5)
    extreme = np.abs(tosses - (first + second) / 2) >= abs(first - second) / 2
    assert mcnemar_p_value(first, second) == pytest.approx(min(1, chances[extreme].sum()))


def draws(gain, problems, count, seed=0):
    """Right answers of two models whose second solves more by `gain`, on problems of different difficulty."""
    generator = np.random.default_rng(seed)
    difficulty = generator.uniform(0.4, 0.9 - gain, (count, problems))
    luck = generator.uniform(size=(2, count, problems))
    return luck[0] < difficulty, luck[1] < difficulty + gain


def test_ten_points_are_found_among_a_thousand_problems():
    before, after = draws(0.10, 1000, 200)
    found = [paired_p_value(a, b) < 0.05 for a, b in zip(after, before, strict=True)]
    assert np.mean(found) >= 0.95


def test_nothing_is_found_where_nothing_is():
    before, after = draws(0.0, 200, 400)
    found = [paired_p_value(a, b) < 0.05 for a, b in zip(after, before, strict=True)]
    assert np.mean(found) <= 0.06


def test_half_widths_of_known_shares():
    """Two even shares of 100 problems: 1.96 standard errors of 0.0707; shares of 0.1 and 0.8: by Wald's formula."""
    assert difference_half_width(0.5, 0.5, 100) == pytest.approx(1.96 * 0.0707107, rel=1e-4)
    assert difference_half_width(0.1, 0.8, 100) == pytest.approx(1.96 * 0.05, rel=1e-4)
    assert difference_half_width(1.0, 0.0, 7) == 0


def test_the_best_case_has_no_direction():
    assert best_case_p_value(179, 186) == best_case_p_value(186, 179)


@settings(max_examples=20)
@given(st.floats(0.1, 0.9), st.integers(10, 1000))
def test_half_widths_shrink_with_the_root_of_the_problems(share, problems):
    one, four = (difference_half_width(share, share, count) for count in (problems, 4 * problems))
    assert one == pytest.approx(2 * four)
