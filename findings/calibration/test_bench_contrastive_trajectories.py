"""Speed of reading pairs through the lens, beside the plain way: two products of one vector per pair and layer."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from lab.memory import keep_freed_memory
from lab.residual.pair_lens import PairLens, PairRows
from lab.subjects.anatomy import Decoder
from lab.subjects.tiny import tiny

pytestmark = [pytest.mark.calibration, pytest.mark.benchmark]

#: Width and vocabulary of SmolLM2-135M; the lens costs the same at any weights.
WIDTH, VOCABULARY = 576, 49152
#: families of four words: three pairs, one state before their pivot
FAMILIES = 8
ROUNDS = 3


@pytest.fixture(scope="module")
def decoder():
    keep_freed_memory()
    return Decoder(tiny("llama", vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1))


def test_pairs_are_read_in_half_the_time_of_the_plain_way(decoder, benchmark):
    """A word is read once and not once per pair, in products of many rows."""
    states = torch.randn(5 * FAMILIES, WIDTH, generator=torch.Generator().manual_seed(0))
    anchors = np.repeat(np.arange(FAMILIES) * 5, 3)
    contrasts = anchors + np.tile([1, 2, 3], FAMILIES)
    rows = PairRows(anchors, contrasts, anchors + 4, anchors, contrasts)
    lens = PairLens(decoder)
    plain = []

    def pair_by_pair():
        started = time.perf_counter()
        for a, b, before in zip(rows.a, rows.b, rows.before, strict=True):
            read_plainly(decoder, states, int(a), int(b), int(before))
        plain.append(time.perf_counter() - started)

    # Both ways take turns, so that a busy machine slows both.
    benchmark.pedantic(lambda: lens.read(states, rows), setup=pair_by_pair, rounds=ROUNDS, warmup_rounds=1)
    ratio = min(plain) / benchmark.stats.stats.min
    benchmark.extra_info["times faster than the plain way"] = round(ratio, 2)
    assert ratio >= 2


@torch.no_grad()
def read_plainly(decoder, states, a, b, before):
    """All readings of one pair, each distribution made for this pair alone."""
    log_a, log_b, _ = (torch.log_softmax(decoder.norm_and_head(states[row]).float(), -1) for row in (a, b, before))
    p_a, p_b = log_a.exp(), log_b.exp()
    mean = ((p_a + p_b) / 2).log()
    entropies = [-(p * log_p).sum() for p, log_p in ((p_a, log_a), (p_b, log_b))]
    directions = [(p_b * (log_b - log_a)).sum(), (p_a * (log_a - log_b)).sum()]
    return *directions, (p_a * (log_a - mean)).sum() / 2 + (p_b * (log_b - mean)).sum() / 2, *entropies
