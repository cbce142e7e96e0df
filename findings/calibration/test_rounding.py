"""Rounding schemes on five weights, worked out by hand."""

from __future__ import annotations

import pytest
import torch

from lab.quantization.rounding import SCHEMES, distinct_values

pytestmark = pytest.mark.calibration

WEIGHTS = [-4.0, -2.1, 0.2, 1.9, 4.0]
#: at two bits, from the levels: -4, 0, 4 (and -8, which nothing reaches); -4, -2, 0, 2; and -4, -4/3, 4/3, 4
TWO_BITS = {
    "symmetric_amax": [-4, -4, 0, 0, 4],
    "symmetric_full_range": [-4, -2, 0, 2, 2],
    "asymmetric_minmax": [-4, -4 / 3, 4 / 3, 4 / 3, 4],
}


@pytest.mark.parametrize("scheme", TWO_BITS)
def test_two_bits_have_four_levels(scheme):
    rounded = SCHEMES[scheme](torch.tensor([WEIGHTS, WEIGHTS]), 2)
    for row in rounded.tolist():
        assert row == pytest.approx(TWO_BITS[scheme])


@pytest.mark.parametrize("scheme", TWO_BITS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_fine_ramp_takes_every_level(scheme, bits):
    """2^b levels, but for the published rule, which leaves its lowest one unused."""
    ramp = torch.linspace(-1, 1, 5001)[None]
    levels = SCHEMES[scheme](ramp, bits).unique()
    assert len(levels) == 2**bits - (scheme == "symmetric_amax")
    assert levels.diff().std() == pytest.approx(0, abs=1e-6)


def test_the_fitted_step_of_two_levels_is_their_mean_size():
    """Weights of either sign about 1 and about 3, at two bits: levels of half steps, -3, -1, 1, 3, are the best."""
    weights = torch.tensor([[-3.1, -2.9, -1.1, -0.9, 0.9, 1.1, 2.9, 3.1]])
    rounded = SCHEMES["mse_optimal"](weights, 2)
    assert rounded[0].tolist() == pytest.approx([-3, -3, -1, -1, 1, 1, 3, 3], abs=0.01)


def test_distinct_values_are_counted_block_by_block():
    """Two and one in the first row's blocks of four, three and two in the second's; a rest of a block is left out."""
    weight = torch.tensor([[2.0, 1, 2, 1, 7, 7, 7, 7, 9], [0, 5, 0, 6, 1, 1, 1, 2, 9]])
    assert distinct_values(weight, block=4) == (2 + 1 + 3 + 2) / 4
