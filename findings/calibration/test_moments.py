"""Moments of normed states on texts of a few tokens, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lab.normalization.moments import head_extremes, layer_norm_change, scale_figures, token_means

pytestmark = pytest.mark.calibration


def test_means_over_all_tokens():
    """Channel means 2, -1 and 0; standard deviations, ddof 1, of (1, 3), (-2, 0) and (-3, 3)."""
    found = token_means(torch.tensor([[1.0, 3], [-2, 0], [-3, 3]]))
    assert found["token_mean"] == pytest.approx(1 / 3)
    assert found["token_abs_mean"] == pytest.approx(1)
    assert found["token_std"] == pytest.approx((2 * math.sqrt(2) + math.sqrt(18)) / 3)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0, 3.0])
def test_what_centring_changes_is_as_the_formula_says(ratio):
    """Means of `ratio` times the spread under a constant gain; the first token, which is enormous, is left out."""
    later = torch.tensor([[1.0, -1, 1, -1], [2, 2, -2, -2], [-3, 3, 3, -3]])
    later = later + ratio * later.abs()[:, :1]
    x = torch.cat([torch.full((1, 4), 1e4), later])
    expected = math.sqrt(2 - 2 / math.sqrt(1 + ratio**2))
    assert layer_norm_change(x, torch.full((4,), 1.7), 0.0) == pytest.approx(expected, abs=1e-4)


def test_the_change_is_the_median_tokens():
    """Means of 3, 1 and 0 times the spread, after a first token that does not count."""
    signs = torch.tensor([1.0, -1, 1, -1])
    x = torch.stack([1e4 + 0 * signs, 3 + signs, 1 + signs, signs])
    assert layer_norm_change(x, torch.ones(4), 0.0) == pytest.approx(math.sqrt(2 - 2 / math.sqrt(2)), abs=1e-4)


def test_extremes_of_heads_and_their_usual_size():
    """Two heads of two tokens after a first one that holds the extreme; roots of mean squares 1, 5, 3 and 4."""
    x = torch.tensor([[[-90.0, 0], [1, -1], [1, 7]], [[0, 0], [3, 3], [4, -4]]])  # [head, token, width]
    for states, axis in ((x, 1), (x.transpose(0, 1), 0)):
        found = head_extremes(states, axis)
        assert found["abs_max"] == 90
        assert found["rms_median"] == 3  # of an even number, torch takes the lower


def test_scales_near_one():
    found = scale_figures(torch.tensor([1.0, 1.05, 1.02, 0.6, -1.0]))
    assert found["mean"] == pytest.approx(2.67 / 5)
    assert (found["min"], found["max"]) == pytest.approx((-1, 1.05))
    assert found["abs_deviation_from_one"] == pytest.approx((0 + 0.05 + 0.02 + 0.4 + 2) / 5)
    assert (found["near_one_fraction"], found["within_50pct_fraction"]) == (0.6, 0.8)
    variance = (1 + 1.05**2 + 1.02**2 + 0.36 + 1) / 5 - (2.67 / 5) ** 2
    assert found["std"] == pytest.approx(math.sqrt(variance))
