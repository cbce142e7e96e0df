"""Paths of ranks over depth: crystallization, first and lasting lead, hurt."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lab.statistics.rank_paths import below_from, first_below, hurt

pytestmark = pytest.mark.calibration

paths = arrays.arrays(
    np.float64,
    st.tuples(st.integers(2, 9), st.integers(1, 6)),
    elements=st.sampled_from([0, 0.5, 1, 5, 9, 10, 99, 100, 1e4]),
)


def column(*ranks):
    return np.array(ranks, dtype=float)[:, None]


def test_a_path_by_hand():
    path = column(0, 500, 8, 12, 3, 0, 2, 0)  # slots -1 to 6
    assert below_from(path) == 3
    assert first_below(path) == -1
    assert below_from(path, limit=1) == 6
    harmed, eligible = hurt(path)
    assert harmed[:, 0].tolist() == [True, False, True, False, False, True, False]
    assert eligible[:, 0].tolist() == [True, False, True, True, True, True, True]


def test_a_token_that_is_never_settled_has_no_slot():
    assert np.isnan(below_from(column(0, 3, 10)))
    assert np.isnan(first_below(column(5, 1, 3)))
    assert below_from(column(9, 9, 9)) == -1


@given(paths)
def test_order_of_the_events(ranks):
    shortlisted, first, stable = below_from(ranks), first_below(ranks), below_from(ranks, limit=1)
    led = ~np.isnan(stable)
    assert (shortlisted[led] <= stable[led]).all()
    assert (first[led] <= stable[led]).all()


@given(paths)
def test_below_from_is_the_last_violation_plus_one(ranks):
    found = below_from(ranks)
    for token, slot in enumerate(found):
        violations = np.flatnonzero(ranks[:, token] >= 10)
        if len(violations) and violations[-1] == len(ranks) - 1:
            assert np.isnan(slot)
        else:
            assert slot == (violations[-1] + 1 if len(violations) else 0) - 1


@given(paths)
def test_every_token_crystallizes_once_or_never(ranks):
    found = below_from(ranks)
    slots = np.arange(len(ranks)) - 1
    assert (found == slots[:, None]).sum() + np.isnan(found).sum() == ranks.shape[1]


@given(paths)
def test_hurt_tokens_were_eligible_and_got_worse(ranks):
    harmed, eligible = hurt(ranks)
    assert (eligible | ~harmed).all()
    assert (ranks[:-1][harmed] < 100).all()
    assert (ranks[1:][harmed] > ranks[:-1][harmed]).all()


@given(paths)
def test_falling_ranks_hurt_nobody(ranks):
    assert not hurt(-np.sort(-ranks, axis=0))[0].any()
