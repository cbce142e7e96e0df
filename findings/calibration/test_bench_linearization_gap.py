"""Jacobian-vector products of a decoder layer: all directions and texts at once beside one vector at a time.

The plain way is what one would write first: for each text and each direction a forward-mode derivative of the layer.
It computes the layer itself anew for every direction, and multiplies a few dozen tokens at a time.
"""

import copy
import time

import numpy as np
import pytest
import torch
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from lab.corpora.batches import token_batches
from lab.corpora.corpus import load_corpus
from lab.residual.executor import Executor
from lab.residual.replay import LayerReplay
from lab.residual.sweeps import sample
from lab.subjects.calls import hidden_of

pytestmark = pytest.mark.benchmark

LAYER, PROMPTS, TOKENS, DIRECTIONS = 10, 7, 20, 16  # texts as in the quick budget, directions as published
FASTER = 3.0


@pytest.fixture(scope="module")
def point(smollm2):
    """The layer's input on a batch of texts, its call arguments, directions at every real token, and the lengths."""
    texts = sample(load_corpus(smollm2.facts, smollm2.tokenizer), PROMPTS, TOKENS).texts
    (batch,) = token_batches(texts, 2048)
    states = dict(Executor(smollm2.decoder).trace(batch))[LAYER].float()
    directions = torch.randn(DIRECTIONS, *states.shape, generator=torch.Generator().manual_seed(1))
    real = torch.arange(states.shape[1]) < batch.lengths[:, None]
    return batch, states, directions * real[..., None]


def one_vector_at_a_time(smollm2, point):
    """J v [k, B, T, d], text by text and direction by direction."""
    batch, states, directions = point
    layer = copy.deepcopy(smollm2.decoder.layers[LAYER]).float()
    found = torch.zeros_like(directions)
    for row, length in enumerate(batch.lengths.tolist()):
        captured = smollm2.decoder.capture(batch.ids[row : row + 1, :length])
        args, kwargs = wide(captured.call(LAYER, 1))

        def update(hidden, args=args, kwargs=kwargs):
            return hidden_of(layer(hidden, *args, **kwargs)) - hidden

        here = states[row : row + 1, :length]
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            for number, direction in enumerate(directions):
                found[number, row, :length] = jvp(update, (here,), (direction[row : row + 1, :length],))[1][0]
    return found


def wide(call):
    """Call arguments with the rotary tables in float32."""
    args, kwargs = call
    tables = tuple(table.float() for table in kwargs["position_embeddings"])
    return args, kwargs | {"position_embeddings": tables}


def batched(smollm2, point):
    """The same through the replayed layer."""
    batch, states, directions = point
    replay = LayerReplay(smollm2.decoder.layers[LAYER], LAYER, smollm2.decoder.capture(batch.ids))
    return replay.jvp(states, directions).update


def test_batched_products_are_three_times_as_fast(benchmark, smollm2, point):
    """The whole way there counts on either side: copying the layer, capturing its call, and all products."""
    plain = []
    for _ in range(2):
        start = time.perf_counter()
        expected = one_vector_at_a_time(smollm2, point)
        plain.append(time.perf_counter() - start)
    found = benchmark.pedantic(batched, (smollm2, point), rounds=3)
    ratio = min(plain) / benchmark.stats.stats.min
    benchmark.extra_info["times faster than one vector at a time"] = round(ratio, 2)
    real = torch.arange(found.shape[2]) < point[0].lengths[:, None]
    error = (found - expected)[:, real].norm(dim=-1) / expected[:, real].norm(dim=-1)
    assert float(error.max()) <= 1e-3
    assert np.isfinite(float(error.max()))
    assert ratio >= FASTER
