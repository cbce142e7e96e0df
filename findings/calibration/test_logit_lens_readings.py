"""Known answers of the lens' readings, of given logits: ranks, entropies, divergences, ties and rounding."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from findings.calibration.lens_cases import logits_of
from lab.residual.lens import Lens
from lab.subjects.anatomy import Decoder
from lab.subjects.tiny import tiny

pytestmark = pytest.mark.calibration


class Given:
    """A decoder without weights, whose states are the logits."""

    final_norm = nn.Identity()
    device = torch.device("cpu")

    def __init__(self, vocabulary):
        self.unembedding = SimpleNamespace(
            vocabulary=vocabulary,
            cast=lambda dtype: (torch.eye(vocabulary, dtype=dtype), None),
            shape_logits_=lambda z: z,
        )


def read(logits, targets):
    """Readings of logits [S, n, V]."""
    logits = torch.as_tensor(logits, dtype=torch.float32)
    return Lens(Given(logits.shape[-1])).read(logits, torch.as_tensor(targets))


seeds = st.integers(0, 2**31)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_ranks_of_all_entries_are_a_permutation(seed):
    z = logits_of(seed, (1, 1, 23)).expand(1, 23, 23)
    readings = read(z, torch.arange(23))
    assert sorted(readings.mid_rank[0].tolist()) == list(range(23))
    assert readings.mid_rank[0, z[0, 0].argmax()] == 0


@given(seeds, st.floats(-5, 5), st.floats(0.25, 4))
@settings(max_examples=20, deadline=None)
def test_shift_and_positive_scale_keep_ranks_and_shift_keeps_entropy(seed, shift, scale):
    z = logits_of(seed).double().mul(8).round().div(8).float()  # coarse, so that a shift creates no ties
    targets = torch.tensor([0, 5, 22, 7])
    plain, shifted, scaled = read(z, targets), read(z + shift, targets), read(z * scale, targets)
    assert torch.equal(plain.mid_rank, shifted.mid_rank)
    assert torch.equal(plain.mid_rank, scaled.mid_rank)
    assert torch.allclose(plain.entropy, shifted.entropy, atol=1e-4)


@given(seeds, st.floats(0, 200))
@settings(max_examples=20, deadline=None)
def test_entropy_and_divergences_lie_in_their_ranges(seed, scale):
    readings = read(logits_of(seed, scale=scale), [0, 5, 22, 7])
    assert readings.entropy.min() >= -1e-6
    assert readings.entropy.max() <= math.log(23) + 1e-5
    assert readings.kl.min() >= 0
    assert readings.step_kl[1:].min() >= 0
    assert readings.kl[-1].max() <= 1e-5


def test_constant_logits_are_a_uniform_distribution():
    readings = read(torch.full((2, 1, 23), 7.0), [4])
    assert readings.entropy.numpy() == pytest.approx(math.log(23))
    assert readings.target_log_probability.numpy() == pytest.approx(-math.log(23))
    assert readings.mid_rank.tolist() == [[11.0], [11.0]]  # the middle of 0..22


@given(seeds, st.integers(0, 6))
@settings(max_examples=20, deadline=None)
def test_planted_ties_lie_between_the_optimistic_and_the_pessimistic_rank(seed, ties):
    z = torch.randint(-3, 3, (1, 1, 23), generator=torch.Generator().manual_seed(seed)).float()
    z[0, 0, 0] = 10.5
    z[0, 0, 1 : 1 + ties] = 10.5
    z[0, 0, 20:] = 11
    readings = read(z, [0])
    optimistic, pessimistic = readings.greater, readings.greater + readings.ties
    assert readings.ties.item() == ties
    assert (optimistic.item(), readings.mid_rank.item(), pessimistic.item()) == (3, 3 + ties / 2, 3 + ties)


def test_readings_equal_the_textbook_formulas():
    z, targets = logits_of(1, (4, 9, 23)), torch.arange(9)
    readings = read(z, targets)
    log_p = z.double().log_softmax(-1)
    p = log_p.exp()
    expected = {
        "greater": (z > z[:, range(9), targets][..., None]).sum(-1),
        "target_log_probability": log_p[:, range(9), targets],
        "entropy": -(p * log_p).sum(-1),
        "top_probability": p.amax(-1),
        "kl": (p[-1] * (log_p[-1] - log_p)).sum(-1),
        "step_kl": torch.cat([torch.full((1, 9), torch.nan), (p[1:] * (log_p[1:] - log_p[:-1])).sum(-1)]),
    }
    for name, values in expected.items():
        torch.testing.assert_close(
            getattr(readings, name).double(), values.double(), atol=1e-5, rtol=1e-5, equal_nan=True
        )


def test_a_sure_distribution_has_a_small_entropy_not_a_rounding_error():
    z = torch.zeros(1, 1, 5)
    z[..., 2] = 90
    z[..., 3] = 90 - 14
    p = math.exp(-14)
    assert read(z, [2]).entropy.item() == pytest.approx(p * (1 + 14), rel=1e-3)


def test_the_published_eps_inside_the_logarithm_hardly_matters():
    p = logits_of(3, (4, 9, 5000), scale=6).double().softmax(-1)
    assert ((p * (p + 1e-10).log()).sum(-1) - (p * p.log()).sum(-1)).abs().max() <= 5000 * 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_and_blocks_do_not_matter(dtype):
    decoder = Decoder(tiny("llama"))
    states, targets = logits_of(2, (3, 11, 32)), torch.arange(11)
    whole, parts = Lens(decoder, dtype), Lens(decoder, dtype)
    parts.chunk_rows, parts.block_rows = 4, 3
    for name, values in vars(whole.read(states, targets)).items():
        torch.testing.assert_close(
            vars(parts.read(states, targets))[name], values, atol=1e-5, rtol=1e-5, equal_nan=True
        )


def test_bfloat16_logits_tie_where_float32_logits_do_not():
    decoder = Decoder(tiny("llama"))
    states, targets = logits_of(2, (3, 40, 32)), torch.arange(40)
    coarse, fine = Lens(decoder, torch.bfloat16).read(states, targets), Lens(decoder).read(states, targets)
    assert coarse.ties.sum() > 0
    assert fine.ties.sum() == 0
    # Rounding is monotone, so strictly greater logits can only be lost to ties, up to bfloat16 noise of the product.
    assert (coarse.greater + coarse.ties / 2 - fine.mid_rank).abs().max() <= 4
