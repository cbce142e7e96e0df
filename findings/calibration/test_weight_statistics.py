"""Statistics of published weights: the Gaussian reference of the effective rank, bands of depth, and planted trends."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from lab import published
from lab.architectures.weight_statistics import WeightStatistics, gaussian_effective_rank
from lab.experiments.architectures.fish_speech_s2_pro import FishSpeech

pytestmark = pytest.mark.calibration


def entropy_effective_rank(matrix: np.ndarray) -> float:
    """The source's definition, with a full SVD."""
    s = np.linalg.svd(matrix, compute_uv=False)
    p = s / s.sum()
    return float(np.exp(-(p * np.log(p + 1e-10)).sum()))


@pytest.mark.parametrize(("shape", "expected"), [((6144, 2560), 0.940), ((2560, 4096), 0.902)])
def test_planted_references(shape, expected):
    """Figures of simulated matrices, to one unit of their last digit: a finite matrix lies a little below the limit."""
    assert gaussian_effective_rank(shape[0] / shape[1]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("shape", [(480, 200), (250, 400), (300, 300)])
def test_the_reference_is_that_of_random_matrices(shape):
    """At a side of 200 one draw lies within 1 %, and either way round is the same."""
    matrix = np.random.default_rng(0).normal(size=shape)
    found = gaussian_effective_rank(shape[0] / shape[1])
    assert entropy_effective_rank(matrix) / min(shape) == pytest.approx(found, rel=0.01)
    assert gaussian_effective_rank(shape[1] / shape[0]) == found


def test_a_very_flat_matrix_has_full_rank():
    """All singular values of a long thin Gaussian matrix are nearly equal."""
    assert gaussian_effective_rank(1e6) == pytest.approx(1, abs=1e-5)


def test_bands_of_depth():
    """Of 36 layers the first 5, the middle 18 and the last 3."""
    profile = xr.DataArray(np.arange(36.0), dims="layer", coords={"layer": range(36)})
    assert WeightStatistics.beginning(profile) == np.mean(range(5))
    assert WeightStatistics.rest(profile) == np.mean(range(5, 36))
    assert WeightStatistics.middle(profile) == np.mean(range(9, 27))
    assert WeightStatistics.end(profile) == np.mean(range(33, 36))
    assert WeightStatistics.trend(profile) == pytest.approx(1)
    assert WeightStatistics.trend(WeightStatistics.within(-profile, 22, 35)) == pytest.approx(-1)


def test_a_wrong_digit_in_the_published_norms_is_seen():
    data = published.dataset("fish_speech_s2_pro")
    assert FishSpeech(data).norm_mismatch < 1e-4
    norms = data.slow_ar_frobenius_norm.copy(deep=True)
    norms[20, 3] *= 1.001
    assert FishSpeech(data.assign(slow_ar_frobenius_norm=norms)).norm_mismatch > 9e-4


def test_one_layer_of_noise_changes_its_peakedness_alone():
    data = published.dataset("fish_speech_s2_pro")
    spikes = data.slow_ar_spectral_norm.copy(deep=True)
    spikes[17] *= 2
    before, after = FishSpeech(data), FishSpeech(data.assign(slow_ar_spectral_norm=spikes))
    assert (after.peakedness / before.peakedness).values == pytest.approx([1] * 17 + [2] + [1] * 18)
    assert int(after.spectral.idxmax("layer")) == 17


def test_a_flat_end_of_one_matrix_is_seen():
    """Planted: without the last three layers' peaks w2 is not peaked at both ends either; w1 is none as published."""
    data = published.dataset("fish_speech_s2_pro")
    peaks = data.slow_ar_spectral_norm.copy(deep=True)
    peaks.loc[{"layer": [33, 34, 35], "matrix": "feed_forward.w2"}] = 1
    before, after = FishSpeech(data), FishSpeech(data.assign(slow_ar_spectral_norm=peaks))
    names = [name for name, both in before.peaked_at_both_ends.items() if both]
    assert names == ["attention.wqkv", "attention.wo", "feed_forward.w2", "feed_forward.w3"]
    assert [name for name, both in after.peaked_at_both_ends.items() if both] == [*names[:2], names[3]]
    assert before.matrix_peakedness.mean("matrix").values == pytest.approx(before.peakedness.values)
