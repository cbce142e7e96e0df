"""Swap refinement, raced through the executor, against the published loop: the same order, several times as fast."""

import time
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lab.corpora.corpus import load_corpus
from lab.experiments.layers.measuring.layer_shuffle_recovery_runs import one_batch, plain_text
from lab.residual.order_losses import LayerOrderLosses
from lab.statistics.order_search import EPSILON, descend, swapped

pytestmark = pytest.mark.benchmark

STAGES = ((1, 12), (1, 36), (1, 48))
OTHERS = 12  #: of the swaps of pairs that are not neighbours, every so manieth
FASTER = 3.0


def texts_of(subject):
    texts = iter(
        sorted(load_corpus(subject.facts, subject.tokenizer).texts, key=lambda text: -len(text.completion_ids))
    )
    return [[plain_text(next(texts), tokens) for _ in range(count)] for count, tokens in STAGES]


def start_of(n):
    """The true order with three pairs of neighbours exchanged."""
    order = tuple(range(n))
    for place in (n // 5, n // 2, 4 * n // 5):
        order = swapped(place, place + 1)(order)
    return order


def moves_of(n):
    apart = [pair for pair in combinations(range(n), 2) if pair[1] - pair[0] > 1]
    return [swapped(i, j) for i, j in (*pairwise(range(n)), *apart[::OTHERS])]


@torch.inference_mode()
def plain_loss(subject, texts, order):
    """Mean loss with layers permuted in the model itself: a forward pass per text, every token scored."""
    kept = subject.model.model.layers
    subject.model.model.layers = nn.ModuleList([kept[layer] for layer in order])
    try:
        losses = []
        for text in texts:
            ids = torch.tensor([text.ids])
            logits = subject.model(ids, use_cache=False).logits[0]
            losses.append(functional.cross_entropy(logits[:-1].float(), ids[0, 1:], reduction="none"))
        return float(torch.cat(losses).mean())
    finally:
        subject.model.model.layers = kept


def published_descent(subject, texts, order, moves):
    """Each trial is a forward pass over all texts, and is taken as soon as it lowers the loss."""
    best = plain_loss(subject, texts, order)
    for move in moves:
        loss = plain_loss(subject, texts, move(order))
        if loss < best - EPSILON:
            order, best = move(order), loss
    return order


def raced_descent(subject, stages, order, moves):
    losses = LayerOrderLosses(subject.decoder, stages, range(len(order)), z=3)
    return descend(losses, order, moves)[0], losses


def test_raced_swaps_are_several_times_as_fast_as_the_published_loop(benchmark, smollm2):
    """All swaps of neighbours and a twelfth of the others, from an order with three pairs exchanged."""
    n = smollm2.decoder.n_layers
    texts, order, moves = texts_of(smollm2), start_of(n), moves_of(n)
    started = time.perf_counter()
    expected = published_descent(smollm2, [text for stage in texts for text in stage], order, moves)
    plain = time.perf_counter() - started
    stages = [one_batch(stage) for stage in texts]
    found, losses = benchmark.pedantic(raced_descent, (smollm2, stages, order, moves), rounds=2)
    ratio = plain / benchmark.stats.stats.min
    tokens = sum(len(text.ids) for stage in texts for text in stage)
    benchmark.extra_info["times faster than the published loop"] = round(ratio, 2)
    benchmark.extra_info["trials"] = losses.trials
    benchmark.extra_info["layer passes"] = round(losses.layer_tokens / (n * tokens), 2)
    assert found == expected
    assert np.array_equal(found, range(n))
    assert ratio >= FASTER
