"""Contrasts of shares of right answers: known p-values, coverage, power, and what nothing gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lab.statistics.proportions import (
    best_case_p_value,
    bootstrap_interval,
    difference_half_width,
    fisher_p_value,
    mcnemar_p_value,
    mean_interval,
    paired_p_value,
    wilson_interval,
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
    assert bootstrap_interval(values - values, resamples=50) == (0, 0)


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_is_a_coin_toss(first, second):
    tosses = np.arange(first + second + 1)
    chances = stats.binom.pmf(tosses, first + second, 0.5)
    extreme = np.abs(tosses - (first + second) / 2) >= abs(first - second) / 2
    assert mcnemar_p_value(first, second) == pytest.approx(min(1, chances[extreme].sum()))


@given(st.integers(1, 300), st.data())
def test_an_interval_contains_its_share(problems, data):
    right = data.draw(st.integers(0, problems))
    low, high = wilson_interval(right, problems)
    assert 0 <= low <= right / problems <= high <= 1
    assert (low, high) == pytest.approx(tuple(stats.binomtest(right, problems).proportion_ci(method="wilson")))


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


def test_the_bootstrap_covers_a_mean():
    generator = np.random.default_rng(1)
    covered = []
    for _ in range(200):
        low, high = bootstrap_interval(generator.normal(0.3, 1, 100), resamples=500)
        covered.append(low <= 0.3 <= high)
    assert 0.89 <= np.mean(covered) <= 0.99


def test_three_runs_have_students_interval():
    values = [0.1, 0.2, 0.4]
    expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert mean_interval(values) == pytest.approx(expected)
    assert np.isnan(mean_interval([0.1])).all()


@settings(max_examples=20)
@given(st.floats(0.1, 0.9), st.integers(10, 1000))
def test_half_widths_shrink_with_the_root_of_the_problems(share, problems):
    one, four = (difference_half_width(share, share, count) for count in (problems, 4 * problems))
    assert one == pytest.approx(2 * four)
