"""Searches for the order of layers, raced through the executor, beside the published pipeline on the same text.

The published pipeline reads the whole text with the whole model for every order that it tries: passes of swaps of
neighbours, then swaps of other pairs, here of those up to three places apart. All begin with the order that the
source's fingerprints gave. Work is told in forward passes of the model over the whole text; what reads a part of the
text, or runs a part of the layers, counts as that part.
"""

import time
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from lab import published
from lab.corpora.corpus import load_corpus
from lab.experiments.layers.layer_shuffle_recovery import QUICK
from lab.experiments.layers.measuring.layer_shuffle_recovery_runs import one_batch, plain_text
from lab.residual.order_losses import LayerOrderLosses
from lab.residual.plain import layers_exchanged, token_losses
from lab.statistics import order_search
from lab.statistics.orders import kendall_tau

pytestmark = pytest.mark.benchmark(group="order of SmolLM2's layers by the loss of 50 tokens")

SEARCHES = {
    "swaps": lambda losses, start: order_search.bubble(losses, start, sweeps=1, reach=REACH),
    "insertions": lambda losses, start: order_search.reinsertion(losses, start, passes=1, reach=REACH),
    "blocks": lambda losses, start: order_search.block_descent(losses, start, largest_block=2),
}
REACH = 3
#: How much less work and CPU time each takes at least. Measured on two AVX2 cores beside other work: 2.9, 2.6 and 1.6
#: times less work, 4.2, 3.9 and 3.1 times less time, to a tau of 0.986, 0.995 and 0.986 (published 0.986).
LESS_WORK, FASTER = 2.0, 2.0
TOO_MUCH_WORK = pytest.mark.xfail(reason="blocks take 1.6 times less work, not 2", strict=True)


@dataclass(frozen=True)
class Found:
    """What a search found, the forward passes that it took, and the CPU seconds, which other processes leave alone."""

    order: tuple[int, ...]
    forwards: float
    seconds: float

    @property
    def tau(self) -> float:
        return float(kendall_tau(np.array(self.order)))


def stages_of(subject):
    """The longest texts, cut as the quick budget cuts them, one list per stage."""
    corpus = load_corpus(subject.facts, subject.tokenizer)
    texts = iter(sorted(corpus.texts, key=lambda text: -len(text.completion_ids)))
    return [[plain_text(next(texts), tokens) for _ in range(count)] for count, tokens in QUICK.stages]


def start_of(n):
    """The order that the source's fingerprints gave of 28 layers, and further layers in their place."""
    told = published.dataset("layer_shuffle_recovery")["recovered_order"].sel({"method": "activation_flow"})
    return (*told.values.tolist(), *range(len(told), n))


class PublishedPipeline:
    """Passes of swaps of neighbours, at most five, then one sweep of others; each trial is a forward pass."""

    def __init__(self, subject):
        self.subject = subject
        self.texts = [text for stage in stages_of(subject) for text in stage]
        self.order = start_of(subject.decoder.n_layers)
        self.forwards = 0
        self.lowest = self.loss(self.order)

    def loss(self, order):
        self.forwards += 1
        with layers_exchanged(self.subject.model, order):
            return float(torch.cat([token_losses(self.subject.model, text) for text in self.texts]).mean())

    def sweep(self, pairs):
        before = self.order
        for pair in pairs:
            trial = order_search.swapped(*pair)(self.order)
            loss = self.loss(trial)
            if loss < self.lowest - order_search.EPSILON:
                self.order, self.lowest = trial, loss
        return self.order != before

    def run(self):
        started, places = time.process_time(), range(len(self.order))
        for _ in range(5):
            if not self.sweep(pairwise(places)):
                break
        self.sweep((i, j) for i, j in combinations(places, 2) if 1 < j - i <= REACH)
        return Found(self.order, self.forwards, time.process_time() - started)


@pytest.fixture(scope="module")
def pipeline(smollm2):
    return PublishedPipeline(smollm2).run()


def raced(subject, search):
    """What one of our searches finds, by the same loss."""
    stages, n = [one_batch(stage) for stage in stages_of(subject)], subject.decoder.n_layers
    losses, started = LayerOrderLosses(subject.decoder, stages, range(n), z=QUICK.z), time.process_time()
    order = search(losses, start_of(n))
    seconds = time.process_time() - started
    layers = sum(weight.numel() for layer in subject.decoder.layers for weight in layer.parameters())
    head = subject.facts.width * subject.facts.vocabulary
    scored, tokens = (
        sum(count(stage) for stage in stages) for count in (lambda s: len(s.scored), lambda s: s.ids.numel())
    )
    work = losses.layer_tokens / n * layers + losses.head_tokens * head
    return Found(order, work / (tokens * layers + scored * head), seconds)


@pytest.mark.parametrize("name", ["swaps", "insertions", pytest.param("blocks", marks=TOO_MUCH_WORK)])
def test_searches_take_less_work_than_the_published_pipeline(benchmark, smollm2, pipeline, name):
    """To the same accuracy: no less of the order is recovered than by a forward pass for every trial."""
    found = benchmark.pedantic(raced, (smollm2, SEARCHES[name]), rounds=1)
    benchmark.extra_info |= {
        "tau": round(found.tau, 3),
        "CPU seconds": round(found.seconds, 1),
        "forward passes": round(found.forwards, 1),
        "tau, published": round(pipeline.tau, 3),
        "forward passes, published": pipeline.forwards,
        "CPU seconds, published": round(pipeline.seconds, 1),
        "times less work": round(pipeline.forwards / found.forwards, 1),
        "times less CPU time": round(pipeline.seconds / found.seconds, 1),
    }
    assert found.tau >= pipeline.tau
    assert pipeline.seconds >= FASTER * found.seconds
    assert pipeline.forwards >= LESS_WORK * found.forwards
