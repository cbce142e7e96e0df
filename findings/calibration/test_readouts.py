"""The completion loss is the cross-entropy of the model's own logits, summed per prompt."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.corpora.batches import Positions, TokenText, token_batches
from lab.residual.executor import Executor
from lab.residual.programs import identity, skip
from lab.residual.readouts import CompletionLoss, log_softmax_
from lab.subjects.anatomy import Decoder
from lab.subjects.tiny import ARCHITECTURES, LAYERS, VOCABULARY, tiny

pytestmark = pytest.mark.calibration

PROGRAMS = [identity(LAYERS), *(skip(LAYERS, [layer]) for layer in range(LAYERS))]
LENGTHS = (12, 5, 9)


def text(length: int, seed: int) -> TokenText:
    ids = torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return TokenText(tuple(ids), tuple(range(2, length)))


BATCH = token_batches([text(length, seed) for seed, length in enumerate(LENGTHS)], 1000)[0]


@cache
def llama():
    return Decoder(tiny("llama"))


@cache
def reference():
    return Executor(llama()).intact(BATCH)


def sums(decoder=None, programs=PROGRAMS, **settings):
    decoder, settings = decoder or llama(), {"head_dtype": torch.float32} | settings
    return Executor(decoder).run(BATCH, programs, CompletionLoss(decoder, BATCH, **settings))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_is_the_cross_entropy_of_the_models_logits(architecture):
    """Per prompt: the sum over its targets of torch's cross-entropy, padding and prompt tokens left out."""
    decoder = Decoder(tiny(architecture))
    loss = sums(decoder, PROGRAMS[:1])["loss"]
    logits = decoder.model(input_ids=BATCH.ids, use_cache=False).logits
    for row, length in enumerate(BATCH.lengths.tolist()):
        expected = F.cross_entropy(logits[row, 1 : length - 1], BATCH.ids[row, 2:length], reduction="sum")
        assert loss[0, row].item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.shape == (1, len(LENGTHS))
    assert loss.dtype == torch.float64


def test_all_quantities_follow_their_formulas():
    """Every program's sums are the textbook formulas on full distributions, in float64."""
    read = sums(reference=reference(), target_probability=True)
    states = Executor(llama()).run(BATCH, PROGRAMS, lambda states: {"final": states})["final"]
    log_p = llama().norm_and_head(states).double().log_softmax(-1)[:, BATCH.scored.row, BATCH.scored.position]
    log_q = log_p[0]
    target = log_p.gather(-1, BATCH.scored.target.expand(len(PROGRAMS), -1)[..., None])[..., 0]
    expected = {
        "loss": -target,
        "kl": (log_q.exp() * (log_q - log_p)).sum(-1),
        "agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double(),
        "target_probability": target.exp(),
    }
    assert set(read) == set(expected)
    for name, values in expected.items():
        per_prompt = torch.zeros(len(PROGRAMS), len(LENGTHS), dtype=torch.float64)
        per_prompt.index_add_(1, BATCH.scored.row, values)
        torch.testing.assert_close(read[name], per_prompt, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
def test_the_intact_model_is_at_no_distance_from_itself(head_dtype):
    """KL is exactly zero and every top token agrees; for every other program KL is positive."""
    read = sums(reference=reference(), head_dtype=head_dtype)
    assert read["kl"][0].tolist() == [0, 0, 0]
    scored = torch.bincount(BATCH.scored.row).double()
    torch.testing.assert_close(read["agreement"][0], scored, rtol=0, atol=0)
    assert (read["kl"][1:] > 0).all()
    assert (read["agreement"][1:] <= scored).all()


@settings(max_examples=20, deadline=None)
@given(chunk_rows=st.integers(1, 200), programs=st.lists(st.integers(0, LAYERS), min_size=1, max_size=6))
def test_chunks_do_not_matter(chunk_rows, programs):
    """Sums are the same however positions and programs are cut into chunks."""
    chosen = [PROGRAMS[index] for index in programs]
    small = sums(programs=chosen, reference=reference(), chunk_rows=chunk_rows)
    large = sums(programs=chosen, reference=reference(), chunk_rows=10_000)
    for name in ("loss", "kl", "agreement"):
        torch.testing.assert_close(small[name], large[name], rtol=1e-5, atol=1e-5)


def test_other_positions_can_be_scored():
    """The first prompt's second token alone; prompts without scored positions have a sum of zero."""
    one = Positions(torch.tensor([0]), torch.tensor([0]), BATCH.ids[0, 1:2])
    loss = sums(programs=PROGRAMS[:1], positions=one)["loss"][0]
    logits = llama().model(input_ids=BATCH.ids, use_cache=False).logits
    assert loss[0].item() == pytest.approx(F.cross_entropy(logits[0, 0], BATCH.ids[0, 1]).item(), rel=1e-5)
    assert loss[1:].tolist() == [0, 0]


def test_no_positions_at_all_give_zeros():
    """A batch in which nothing is scored is no error: sums over nothing are zero."""
    nothing = Positions(*(torch.zeros(0, dtype=torch.int64) for _ in range(3)))
    read = sums(positions=nothing, reference=reference())
    assert all(values.shape == (len(PROGRAMS), len(LENGTHS)) and not values.any() for values in read.values())


def test_bfloat16_head_rounds_logits_only():
    """A bfloat16 head moves a loss by no more than its rounding of logits, and by something."""
    exact, rounded = sums(head_dtype=torch.float32)["loss"], sums(head_dtype=torch.bfloat16)["loss"]
    largest = float(llama().model(input_ids=BATCH.ids, use_cache=False).logits.abs().max())
    scored = len(BATCH.scored)
    assert 0 < (exact - rounded).abs().max() < scored * largest * 2**-6


def test_a_loss_that_is_not_finite_is_passed_on():
    """NaN in the weights is not smoothed away: the loss of that program is NaN for the caller to report."""
    decoder = Decoder(tiny("llama"))
    decoder.layers[2].mlp.down_proj.weight[0, 0] = math.nan
    loss = sums(decoder)["loss"]
    assert loss[3].isfinite().all(), "without layer 2 the loss is finite"
    assert loss[0].isnan().all()


def test_on_a_cpu_logits_are_normalized_in_their_place():
    """Logits of a large vocabulary are the largest tensor of a sweep; a second one would double its memory."""
    logits = torch.randn(2, 40, 7, generator=torch.Generator().manual_seed(0))
    expected = torch.log_softmax(logits, -1)
    found = log_softmax_(logits)
    assert found.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_with_its_prompt_and_program(value):
    states = torch.stack([reference()] * 2)
    row = int(BATCH.scored.row[0])
    states[1, row] = value
    expected = sums(programs=PROGRAMS[:1])["loss"][0]
    found = CompletionLoss(llama(), BATCH, head_dtype=torch.float32, chunk_rows=5)(states)["loss"]
    others = [index for index in range(len(LENGTHS)) if index != row]
    assert not found[1, row].isfinite()
    torch.testing.assert_close(found[1, others], expected[others])
    torch.testing.assert_close(found[0], expected)


def test_the_matrix_is_cast_once_and_not_copied_in_its_own_dtype():
    """Casting the head to its own dtype shares the model's memory; to another it is done once."""
    decoder = Decoder(tiny("llama"))
    hidden = torch.zeros(1, decoder.width)
    for dtype in (torch.float32, torch.bfloat16):
        decoder.unembedding.logits(hidden, dtype)
    own, _ = decoder.unembedding.cast(torch.float32)
    cast, _ = decoder.unembedding.cast(torch.bfloat16)
    assert own.data_ptr() == decoder.model.lm_head.weight.data_ptr()
    assert cast is decoder.unembedding.cast(torch.bfloat16)[0]
