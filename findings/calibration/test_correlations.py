"""Known answers of tests over few layers."""

import numpy as np
import pytest
import scipy.stats  # before the clock of an example runs
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lab.statistics import depth
from lab.statistics.correlations import (
    correlation_p_value,
    pearson,
    pearson_by_order,
    spearman,
    spearman_by_order,
    spearman_p_value,
    without_each,
)
from lab.statistics.significance import holm, sign_share, t_test_p_value, wilcoxon_p_value

pytestmark = pytest.mark.calibration

SCIPY = {pearson: scipy.stats.pearsonr, spearman: scipy.stats.spearmanr}
PROFILES = st.lists(st.floats(-5, 5), min_size=5, max_size=20)


def test_holm_is_the_textbook_example():
    """0.01, 0.02, 0.03, 0.04: times 4, 3, 2, 1, never falling."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1, 1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_the_p_value_and_bonferroni(p_values):
    adjusted = holm(p_values)
    assert (adjusted >= np.array(p_values) - 1e-12).all()
    assert (adjusted <= np.minimum(1, np.array(p_values) * len(p_values)) + 1e-12).all()


@given(PROFILES, st.randoms())
def test_rank_correlation_is_spearmans(profile, random):
    other = list(profile)
    random.shuffle(other)
    expected = scipy.stats.spearmanr(profile, other).statistic if len(set(profile)) > 1 else np.nan
    assert spearman_by_order(profile, other) == pytest.approx(expected, nan_ok=True)


@given(hnp.arrays(float, (2, 8), elements=st.integers(-3, 3).map(float)))
def test_labels_and_order_agree_where_the_labels_do(values):
    x, y = (xr.DataArray(row, {"layer": np.arange(8)}) for row in values)
    for by_label, by_order in ((pearson, pearson_by_order), (spearman, spearman_by_order)):
        found = by_label(x, y)
        renamed = y.assign_coords(layer=np.arange(8) + 9)
        np.testing.assert_array_equal([by_order(x, y), by_order(*values), by_order(x, renamed)], found)
        expected = np.nan if min(map(np.ptp, values)) == 0 else SCIPY[by_label](*values).statistic
        assert found == pytest.approx(expected, nan_ok=True)


def test_ranks_are_of_the_same_labels():
    profile = xr.DataArray([1.0, 3.0, 2.0], {"layer": [0, 1, 2]})
    assert spearman(profile, xr.DataArray([10.0, 30.0, 20.0], dims="layer")) == pytest.approx(1)
    with pytest.raises(ValueError, match="layer"):
        spearman(profile, profile.assign_coords(layer=[1, 2, 3]))


@given(hnp.arrays(float, st.integers(4, 9), elements=st.integers(-3, 3).map(float) | st.just(np.nan)))
def test_the_label_of_the_largest_is_that_of_xarray(values):
    profile = xr.DataArray(values, {"layer": np.arange(len(values)) + 2})
    if np.isnan(values).all():
        with pytest.raises(ValueError, match="NaN"):
            depth.label_of_largest(profile)
    else:
        assert depth.label_of_largest(profile) == int(profile.idxmax())


@given(hnp.arrays(float, (2, 7), elements=st.integers(-3, 3).map(float)))
def test_without_each_layer_is_the_correlation_of_the_others(profiles):
    x, y = profiles
    for correlate in (pearson_by_order, spearman_by_order):
        expected = [correlate(np.delete(x, layer), np.delete(y, layer)) for layer in range(7)]
        np.testing.assert_array_equal(without_each(x, y, correlate), expected)


def test_one_outlier_shows_without_each_entry():
    x = np.array([1.0, 2, 3, 4, 5, 6, 7, 100])
    y = np.array([4.0, 1, 6, 2, 7, 3, 5, 100])
    without = without_each(x, y, spearman_by_order)
    assert len(without) == len(x)
    assert int(np.argmin(without)) == 7
    assert without[7] == pytest.approx(spearman_by_order(x[:7], y[:7]))


def test_one_layer_that_carries_a_correlation_is_found():
    x, y = np.random.default_rng(0).standard_normal((2, 30))
    x[4], y[4] = 20, 20
    without = without_each(x, y, pearson_by_order)
    assert pearson_by_order(x, y) > 0.8
    assert np.argmin(without) == 4
    assert abs(without[4]) < 0.4


def test_p_values_are_scipys():
    x, y = np.random.default_rng(1).standard_normal((2, 25))
    assert correlation_p_value(pearson_by_order(x, y), 25) == pytest.approx(scipy.stats.pearsonr(x, y).pvalue)
    assert spearman_p_value(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).pvalue)
    assert spearman_p_value(x, x**3) == 0


def test_fewer_than_three_pairs_say_nothing():
    assert np.isnan(correlation_p_value(1.0, 2))
    assert np.isnan(spearman_p_value([1.0, 2.0], [3.0, 4.0]))
    assert 0 < correlation_p_value(0.99, 3) < 0.1


@given(st.floats(-10, 10), PROFILES)
def test_a_constant_has_no_correlation_whatever_rounding_leaves_of_it(constant, profile):
    for correlate in (pearson_by_order, spearman_by_order):
        assert np.isnan(correlate(np.full(len(profile), constant), profile))


def test_nothing_shared_and_differences_below_the_range_of_floats_have_no_correlation():
    x, y = (xr.DataArray(np.arange(float(n)), {"layer": np.arange(n) + start}) for n, start in ((4, 0), (3, 9)))
    assert np.isnan(pearson_by_order(x, y))
    assert np.isnan(spearman_p_value(x, y))
    assert np.isnan(pearson_by_order([0.0, 1e-200, 0.0], [1.0, 2.0, 3.0]))


def test_p_values_count_the_layers_that_both_profiles_have():
    x, y = (xr.DataArray(values, {"layer": range(25)}) for values in np.random.default_rng(1).standard_normal((2, 25)))
    rest = slice(5, None)
    expected = scipy.stats.spearmanr(x[rest], y[rest]).pvalue
    assert spearman_p_value(x, y[rest]) == spearman_p_value(x[rest], y) == pytest.approx(expected)


def test_p_values_tell_noise_from_signal():
    generator = np.random.default_rng(0)
    noise = generator.normal(size=36)
    assert t_test_p_value(noise) > 0.05 > t_test_p_value(noise + 1)
    assert wilcoxon_p_value(noise) > 0.05 > wilcoxon_p_value(noise + 1)
    assert spearman_p_value(noise, generator.normal(size=36)) > 0.05 > spearman_p_value(noise, noise**3)


def test_sign_share_counts_positive_entries_only():
    assert sign_share([1, -1, 0, 2]) == 0.5
