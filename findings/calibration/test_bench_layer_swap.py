"""The swap sweep through the executor against the plain loop: the same losses, at least twice as fast."""

import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lab.corpora.corpus import load_corpus
from lab.experiments.layers.layer_swap_cost import all_pairs, spread
from lab.residual.executor import Executor
from lab.residual.programs import swap
from lab.residual.sweeps import ProgramLosses, sample
from lab.store import Sweep
from lab.subjects.loading import load

pytestmark = pytest.mark.benchmark

PROMPTS, TOKENS, EXCHANGED = 3, 16, 6
BATCH_TOKENS = 256
FASTER = 2.0


@pytest.fixture(scope="module")
def subject(smollm2):
    """In float32: bfloat16 kernels round differently for batches of another shape, which hides an error of 1e-3."""
    return load(smollm2.facts, "float32")


@pytest.fixture(scope="module")
def texts(subject):
    return sample(load_corpus(subject.facts, subject.tokenizer), PROMPTS, TOKENS)


def exchanged_layers(subject):
    """A subset of the matrix with its mix of near and far, early and late: all pairs of layers spread evenly."""
    n = subject.decoder.n_layers
    spread_layers = spread(n, EXCHANGED)
    return [[step.layer for step in swap(n, spread_layers[i], spread_layers[j])] for i, j in all_pairs(EXCHANGED)]


@torch.inference_mode()
def plain_loop(subject, texts):
    """Losses [swap, prompt]: layers exchanged in the model itself, one text at a time, logits of every position."""
    kept = subject.model.model.layers
    losses = []
    try:
        for layers in exchanged_layers(subject):
            subject.model.model.layers = nn.ModuleList([kept[layer] for layer in layers])
            losses.append([plain_loss(subject.model, text) for text in texts.texts])
    finally:
        subject.model.model.layers = kept
    return np.array(losses)


def plain_loss(model, text):
    ids, targets = torch.tensor([text.ids]), torch.tensor(text.targets)
    logits = model(ids, use_cache=False).logits[0]
    return float(functional.cross_entropy(logits[targets - 1].float(), ids[0, targets]))


def executor_sweep(subject, texts):
    """The same losses [swap, prompt] through the executor."""
    n = subject.decoder.n_layers
    layers = spread(n, EXCHANGED)
    programs = {f"{i} and {j}": swap(n, layers[i], layers[j]) for i, j in all_pairs(EXCHANGED)}
    losses = ProgramLosses(Executor(subject.decoder), Sweep(), BATCH_TOKENS, "float32")
    return losses("swaps", texts, programs)["loss"]


def seconds(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def test_swap_sweep_is_twice_as_fast_as_the_plain_loop(benchmark, subject, texts):
    """Rounds alternate, so that other work on the machine slows both; the fastest of each is compared."""
    plain = []

    def plain_round():
        elapsed, losses = seconds(plain_loop, subject, texts)
        plain.append(elapsed)
        expected[:] = [losses]

    expected = []
    found = benchmark.pedantic(executor_sweep, (subject, texts), setup=plain_round, rounds=2, warmup_rounds=1)
    assert np.abs(found - expected[0]).max() <= 1e-3
    ratio = min(plain) / benchmark.stats.stats.min
    benchmark.extra_info["times faster than the plain loop"] = round(ratio, 2)
    assert ratio >= FASTER
