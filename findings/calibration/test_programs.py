"""Programs of layers, and the sweeps that run them: what makes no sense is refused, and named."""

from __future__ import annotations

import numpy as np
import pytest

from lab.errors import UserError
from lab.residual.programs import Step
from lab.residual.sweeps import _require_finite, token_mean

pytestmark = pytest.mark.calibration


def test_a_variant_stands_for_a_layer():
    assert Step(3, variant="rounded").layer == 3
    with pytest.raises(ValueError, match="'rounded' stands for no layer"):
        Step(None, variant="rounded")


def test_an_empty_step_with_an_edit_is_no_identity():
    assert Step(None).is_identity
    assert not Step(None, edit="push").is_identity
    assert not Step(0).is_identity


def test_means_over_tokens_weigh_prompts_by_their_tokens():
    """One token of 5 and three of 1: 2."""
    assert token_mean(np.array([[5.0, 1.0], [1.0, 1.0]]), np.array([1, 3])).tolist() == [2, 1]


def test_the_first_loss_that_is_not_finite_is_named():
    losses = np.ones((2, 3))
    _require_finite(losses, "swaps", ["a", "b"], ["x", "y", "z"])
    losses[0, 2], losses[1, 1] = np.inf, np.nan
    with pytest.raises(UserError, match="swaps: the loss of a on prompt z is inf"):
        _require_finite(losses, "swaps", ["a", "b"], ["x", "y", "z"])
