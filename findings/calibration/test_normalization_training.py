"""Known answers of T-15's training of norms: what it touches, what it learns, and what counts as recovery."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from findings.calibration.normalization_cases import BUDGET, LENGTHS, record_of
from lab.errors import NotApplicable
from lab.experiments.surgery.measuring import normalization_recovery
from lab.experiments.surgery.measuring.normalization import parts
from lab.experiments.surgery.measuring.normalization_losses import unpadded
from lab.experiments.surgery.normalization import Normalization
from lab.normalization import recovery
from lab.normalization.recovery import completion_loss, train
from lab.normalization.replacements import LayerNorm, RmsNorm
from lab.normalization.settings import Training
from lab.normalization.sites import FINAL, norms_of
from lab.normalization.surgery import Renormed
from lab.records import variable
from lab.residual.sweeps import sample
from lab.subjects.tiny import loaded, random_corpus, tiny

pytestmark = pytest.mark.calibration


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_training_touches_the_norms_only_and_lowers_the_loss(architecture):
    model = tiny(architecture)
    decoder = loaded(model).decoder
    before = copy.deepcopy(model.state_dict())
    norms, texts = norms_of(decoder), sample(random_corpus(LENGTHS), 3, None)
    batches = unpadded(texts.texts)
    losses = {}

    def read(step, trained):
        with torch.no_grad():
            losses[step] = float(np.mean([float(completion_loss(trained, batch)) for batch in batches]))

    swapped = Renormed(decoder, norms, (*norms.block_roles, FINAL), LayerNorm)
    train(swapped, batches, Training(steps=(3, 60), learning_rate=1e-2), read)
    assert list(losses) == [0, 3, 60]
    assert losses[60] < losses[0] - 0.1
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("broken", "passes"), [((), 9), ((0, 3, 6), 9), ((0, 1, 2), 3), ((1, 2, 3), 4), ((0, 1, 3, 4), 9)]
)
def test_texts_that_overflow_are_passed_over(monkeypatch, broken, passes):
    """Once three texts in a row, all there are, have taught nothing, no more of the nine steps are computed.

    `broken` steps have a loss that is not finite. All marks are read all the same.
    """
    decoder = loaded(tiny("llama")).decoder
    batches = unpadded(sample(random_corpus(LENGTHS), 3, None).texts)
    calls, marks = [], {}

    def loss(trained, batch):
        calls.append(batch)
        found = completion_loss(trained, batch)
        return found * math.nan if len(calls) - 1 in broken else found

    monkeypatch.setattr(recovery, "completion_loss", loss)
    norms = norms_of(decoder)
    swapped = Renormed(decoder, norms, (*norms.block_roles, FINAL), LayerNorm)

    def read(step, trained):
        with torch.no_grad():
            marks[step] = float(completion_loss(trained, batches[0]))

    train(swapped, batches, Training(steps=(4, 9), learning_rate=1e-2), read)
    assert len(calls) == passes
    assert list(marks) == [0, 4, 9]
    assert (marks[0] == marks[4]) == (broken == (0, 1, 2))
    assert (marks[4] == marks[9]) == (passes < 9)


def test_norms_are_trained_on_all_texts_that_are_not_scored():
    corpus = random_corpus(LENGTHS)
    texts = parts(corpus, replace(BUDGET, prompts=2, calibration_prompts=1))
    assert len(texts.scored.prompts) == 2
    assert len(texts.calibration.prompts) == 1
    assert set(texts.training.prompts) == {text.id for text in corpus.texts} - set(texts.scored.prompts)
    assert set(texts.calibration.prompts) < set(texts.training.prompts)


@pytest.mark.parametrize("architecture", ["gemma3_text", "granite"])
def test_the_loss_that_is_trained_is_the_loss_that_is_scored(architecture):
    decoder = loaded(tiny(architecture)).decoder
    norms, texts = norms_of(decoder), sample(random_corpus(LENGTHS), 1, None)
    (batch,) = unpadded(texts.texts)
    logits = decoder.model(batch.ids).logits[0, batch.scored.position]
    by_hand = torch.nn.functional.cross_entropy(logits, batch.scored.target)
    intact = Renormed(decoder, norms, (), RmsNorm)
    assert float(completion_loss(intact, batch)) == pytest.approx(float(by_hand), rel=1e-5)


def of_training(losses, steps=(0, 100), texts=None) -> Normalization:
    """A record of what training made of swaps' losses [step] or [step, text]; a uniform guess costs 5 nat."""
    dims = ("recovery_variant", "step", "prompt")[: np.ndim(next(iter(losses.values()))) + 1]
    arrays = {
        "recovery_loss": variable(dims, list(losses.values()), "nat/token", ""),
        "uniform_loss": variable((), 5.0, "nat/token", ""),
    }
    if texts is not None:
        arrays["scored_tokens"] = variable("prompt", texts, "token", "")
    coords = {"recovery_variant": list(losses), "step": list(steps)}
    return Normalization(xr.Dataset(arrays, coords, {"subject": "x", "source": "measured", "condition": "c"}))


def test_recovery_is_what_the_swap_loses_and_gains_beyond_the_control():
    """Losses beyond a uniform guess, here 5 nat, count as that, finite or not, on one side of the training."""
    losses = {
        "rms_norm": [1.0, 0.8],
        "layer_norm": [3.0, 1.8],
        "batch_norm": [4.0, 3.8],
        "mended": [np.nan, 1.0],
        "half_mended": [23.0, 2.8],
        "worse": [4.0, 9.0],
        "less_broken": [23.0, 9.0],
    }
    record = of_training(losses)
    found = {name: record.recovered(name) for name in losses if name != "rms_norm"}
    expected = {"layer_norm": 0.5, "batch_norm": 0, "mended": 1 - 0.2 / 4, "half_mended": 0.5, "worse": 1 - 4.2 / 3}
    expected["less_broken"] = 1 - 4.2 / 4
    assert found == pytest.approx(expected)


def test_recovery_cannot_be_told_of_what_was_not_trained():
    """Neither of a swap that overflows before and after, nor of one whose training diverged, nor of a cheap one."""
    losses = {
        "rms_norm": [1.0, 0.8],
        "layer_norm": [3.0, 1.8],
        "lost": [np.nan, np.nan],
        "overflown": [4.0, np.nan],
        "cheap": [1.019, 0.9],
    }
    record = of_training(losses)
    words = {
        "lost": "x with lost overflows: training had no gradient to go by",
        "overflown": "training overflown of x diverged: after 100 steps its loss is not finite where it was before",
        "cheap": "cheap costs x 0.019 nat: too little to speak of recovering it",
    }
    for name, reason in words.items():
        with pytest.raises(NotApplicable, match=reason):
            record.recovered(name)
    assert record.recovered_of("lost", "layer_norm", "overflown") == pytest.approx({"layer_norm": 0.5})
    with pytest.raises(NotApplicable, match=r"lost overflows.*; training overflown of x diverged"):
        record.recovered_of("lost", "overflown")


def test_recovery_is_read_where_the_control_is_best():
    """Not where a swap is best, nor at the last step; and never before the first."""
    losses = {"rms_norm": [1.0, 0.8, 2.0], "layer_norm": [3.0, 2.8, 2.1]}
    record = of_training(losses, (0, 100, 500))
    assert record.recovery_step == 100
    assert record.recovered("layer_norm") == pytest.approx(0)
    losses["rms_norm"] = [0.5, 2.0, 0.8]
    assert of_training(losses, (0, 100, 500)).recovery_step == 500


def test_training_that_loses_one_text_has_diverged():
    losses = {"rms_norm": np.full((2, 2), 1.0), "layer_norm": np.array([[np.nan, 3.0], [np.nan, np.nan]])}
    with pytest.raises(NotApplicable, match="diverged"):
        of_training(losses, texts=[5, 5]).recovered("layer_norm")
    losses["layer_norm"] = np.array([[np.nan, 3.0], [2.0, 3.0]])
    assert of_training(losses, texts=[5, 5]).recovered("layer_norm") == pytest.approx(1 - 1.5 / 4)


def test_the_control_trains_the_norms_that_swaps_replace(monkeypatch):
    """Query and key norms of Qwen3 are no swap's, so the control leaves them as they are."""
    places = {}

    def note(swapped, batches, training, read):
        places[type(swapped.rule(swapped.norms.final)).__name__] = swapped.roles
        for step in (0, *training.steps):
            read(step, swapped)

    monkeypatch.setattr(normalization_recovery, "train", note)
    record_of(tiny("qwen3"), replace(BUDGET, groups=(8,), sites_separately=False, removals=("identity",)))
    assert len(places) == 4
    assert len(set(places.values())) == 1
    assert "query" not in places["RmsNorm"]
