"""Known answers of tests over few layers."""

import numpy as np
import pytest
import scipy.stats  # before the clock of an example runs
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lab.statistics import depth, ranks
from lab.statistics.correlations import (
    holm,
    leave_one_out,
    rank_correlation,
    sign_share,
    spearman_p_value,
    t_test_p_value,
    wilcoxon_p_value,
)

pytestmark = pytest.mark.calibration

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
    assert rank_correlation(profile, other) == pytest.approx(expected, nan_ok=True)


def test_ranks_are_of_the_same_labels():
    profile = xr.DataArray([1.0, 3.0, 2.0], {"layer": [0, 1, 2]})
    assert ranks.spearman(profile, xr.DataArray([10.0, 30.0, 20.0], dims="layer")) == pytest.approx(1)
    with pytest.raises(ValueError, match="layer"):
        ranks.spearman(profile, profile.assign_coords(layer=[1, 2, 3]))


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
    for correlate in (depth.pearson_of, depth.spearman_of):
        expected = [correlate(np.delete(x, layer), np.delete(y, layer)) for layer in range(7)]
        np.testing.assert_array_equal(depth.without_each(x, y, correlate), expected)


def test_one_outlier_shows_in_leave_one_out():
    x = np.array([1.0, 2, 3, 4, 5, 6, 7, 100])
    y = np.array([4.0, 1, 6, 2, 7, 3, 5, 100])
    without = leave_one_out(x, y)
    assert len(without) == len(x)
    assert int(np.argmin(without)) == 7
    assert without[7] == pytest.approx(rank_correlation(x[:7], y[:7]))


def test_p_values_tell_noise_from_signal():
    generator = np.random.default_rng(0)
    noise = generator.normal(size=36)
    assert t_test_p_value(noise) > 0.05 > t_test_p_value(noise + 1)
    assert wilcoxon_p_value(noise) > 0.05 > wilcoxon_p_value(noise + 1)
    assert spearman_p_value(noise, generator.normal(size=36)) > 0.05 > spearman_p_value(noise, noise**3)


def test_sign_share_counts_positive_entries_only():
    assert sign_share([1, -1, 0, 2]) == 0.5
