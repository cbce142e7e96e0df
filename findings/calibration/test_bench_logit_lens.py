"""Speed of the logit lens against its arithmetic floor: the product of all states with the vocabulary matrix."""

from __future__ import annotations

import time

import pytest
import torch

from lab.memory import keep_freed_memory
from lab.residual.lens import Lens
from lab.subjects.anatomy import Decoder
from lab.subjects.tiny import tiny

pytestmark = [pytest.mark.calibration, pytest.mark.benchmark]

#: Width and vocabulary of SmolLM2-135M; the lens costs the same at any weights.
WIDTH, VOCABULARY, SLOTS = 576, 49152, 6
POSITIONS = 256
ROUNDS = 5


@pytest.fixture(scope="module")
def decoder():
    keep_freed_memory()
    model = tiny("llama", vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, tie_word_embeddings=True)
    return Decoder(model.bfloat16())


def test_all_depths_cost_at_most_1_6_times_their_projections(decoder, benchmark):
    """Both settings together, norm, ranks, probabilities, entropy and divergences add less than 60 %."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(SLOTS, POSITIONS, WIDTH, generator=generator).bfloat16()
    targets = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)
    lenses = [Lens(decoder, torch.float32), Lens(decoder, torch.bfloat16, divergences=False)]
    floors = []

    def floor():
        floors.append(sum(seconds_of_projections(decoder, states, lens) for lens in lenses))

    def read():
        for lens in lenses:
            lens.read(states, targets)

    # Floor and lens take turns, so that a busy machine slows both.
    benchmark.pedantic(read, setup=floor, rounds=ROUNDS, warmup_rounds=1)
    ratio = benchmark.stats.stats.min / min(floors)
    benchmark.extra_info["times the floor"] = round(ratio, 2)
    assert ratio <= 1.6


def seconds_of_projections(decoder, states, lens):
    """Time of the bare products, in chunks of the lens's own size and with reused memory."""
    weight, _ = decoder.unembedding.cast(lens.head.dtype)
    hidden = states.flatten(0, 1).to(lens.head.dtype)
    product = torch.empty(lens.chunk_rows, VOCABULARY, dtype=lens.head.dtype)
    started = time.perf_counter()
    for chunk in hidden.split(lens.chunk_rows):
        torch.mm(chunk, weight.t(), out=product[: len(chunk)])
    return time.perf_counter() - started
