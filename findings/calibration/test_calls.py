"""Captured arguments of layers: what differs between rows is tiled, what is alike is kept once."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from lab.subjects.calls import Captured, PerRow, may_depend_on_row, row_independent

pytestmark = pytest.mark.calibration


class Pair(NamedTuple):
    """As positions come: cosines and sines."""

    cos: torch.Tensor
    sin: torch.Tensor


def rows(count):
    """A mask that differs between rows, positions that do not, a tensor without rows, and plain values."""
    mask = torch.arange(count * 4.0).reshape(count, 1, 2, 2)
    later = torch.arange(2 * count * 3.0).reshape(2, count, 3)  # rows along the second axis
    cos = torch.ones(count, 2, 5)
    return (mask, None), {"positions": Pair(cos, 2 * cos), "window": [4, later], "scale": torch.ones(7), "causal": True}


def single():
    """The first row alone."""
    (mask, nothing), keywords = rows(3)
    window = [4, keywords["window"][1][:, :1]]
    positions = Pair(*(part[:1] for part in keywords["positions"]))
    return (mask[:1], nothing), keywords | {"positions": positions, "window": window}


def test_what_is_alike_in_all_rows_is_kept_once():
    args, keywords = row_independent(rows(3), single())
    assert (args[0].axis, args[1]) == (0, None)
    assert isinstance(keywords["positions"], Pair)
    assert keywords["positions"].sin.shape == (1, 2, 5)
    assert keywords["window"][0] == 4
    assert isinstance(keywords["window"][1], PerRow)
    assert keywords["window"][1].axis == 1
    assert keywords["scale"].shape == (7,)
    assert keywords["causal"] is True


def test_copies_of_a_batch_follow_each_other():
    """Two copies of three rows: rows 0, 1, 2, 0, 1, 2 along whichever axis the rows have."""
    captured = Captured(torch.zeros(3, 2, 8), (row_independent(rows(3), single()),))
    mask, later = rows(3)[0][0], rows(3)[1]["window"][1]
    args, keywords = captured.call(0, 2)
    assert torch.equal(args[0], torch.cat([mask, mask]))
    assert torch.equal(keywords["window"][1], torch.cat([later, later], dim=1))
    assert keywords["positions"].cos.shape == (1, 2, 5)
    ((args, _),) = captured.calls
    assert torch.equal(args[0], mask)


@pytest.mark.parametrize(
    ("shape", "count", "expected"),
    [((1, 7, 10), 3, False), ((1, 3), 3, True), ((12, 7), 3, True), ((3, 1, 7, 7), 3, True), ((3, 7), 1, False)],
)
def test_an_axis_of_rows_or_of_several_per_row_is_suspected(shape, count, expected):
    """Wherever the tensor lies in the arguments."""
    leaf = torch.zeros(shape)
    calls = [((leaf,), {}), ((None,), {"positions": Pair(leaf, leaf)}), ((), {"nested": [4, {"deep": leaf}]})]
    assert [may_depend_on_row([((), {"causal": True}), call], count) for call in calls] == [expected] * 3


def test_calls_of_different_form_are_not_joined():
    (mask, nothing), keywords = single()
    with pytest.raises(ValueError, match="zip"):
        row_independent(rows(3), ((mask, nothing, nothing), keywords))
