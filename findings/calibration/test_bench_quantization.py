"""A sensitivity sweep through the executor beside the plain loop: same model, same texts, same losses.

The plain loop is the source's: round a layer's weights in place, run the whole model text by text, restore them. And
the throughput of the rounding rules and libraries on one matrix.
"""

import numpy as np
import pytest
import torch

from lab.corpora.corpus import load_corpus
from lab.experiments.systems.measuring.quantization_workbench import samples
from lab.experiments.systems.quantization import EXPERIMENT
from lab.quantization.layers import Workshop, matrices
from lab.quantization.libraries import GGUF, NormalFloat4, TorchAO
from lab.quantization.rounding import Rounding
from lab.residual.executor import Executor
from lab.residual.plain import plain_losses
from lab.residual.programs import identity
from lab.residual.sweeps import ProgramLosses, Sample, token_mean
from lab.store import Sweep

BUDGET = EXPERIMENT.budgets["quick"]
TEXTS = 4
RULE = Rounding(2, 64)

sweep_benchmark = pytest.mark.benchmark(group="every layer of SmolLM2 at 2 bits, 4 texts")
rounding_benchmark = pytest.mark.benchmark(group="one matrix of 1536 x 576, quantized and dequantized")


@pytest.fixture(scope="module")
def texts(smollm2):
    chosen = samples(load_corpus(smollm2.facts, smollm2.tokenizer), smollm2, BUDGET).layers
    return Sample(chosen.prompts[:TEXTS], chosen.texts[:TEXTS], chosen.user_targets[:TEXTS])


@torch.inference_mode()
def plain_loop(subject, texts):
    """Losses [program, text]: intact, then with each layer rounded."""
    found = [plain_losses(subject.model, texts.texts)]
    for layer in subject.decoder.layers:
        kept = {path: linear.weight.clone() for path, linear in matrices(layer).items()}
        try:
            for linear in matrices(layer).values():
                linear.weight.copy_(RULE(linear.weight))
            found.append(plain_losses(subject.model, texts.texts))
        finally:
            for path, linear in matrices(layer).items():
                linear.weight.copy_(kept[path])
    return np.array(found)


def executor_sweep(subject, texts):
    """The same losses [program, text] through the executor."""
    shop, n = Workshop(subject.decoder), subject.decoder.n_layers
    plan = shop.all(RULE)
    programs = {"intact": identity(n)} | {f"layer {layer}": shop.one_layer(layer, plan) for layer in range(n)}
    executor = Executor(subject.decoder, variants=shop.variants)
    return ProgramLosses(executor, Sweep(), BUDGET.batch_tokens, "bfloat16")("layers", texts, programs)["loss"]


@sweep_benchmark
@pytest.mark.parametrize("way", [plain_loop, executor_sweep])
def test_sensitivity_sweep(benchmark, smollm2, texts, losses, way):
    found = benchmark.pedantic(way, (smollm2, texts), rounds=1, warmup_rounds=0)
    losses[way] = token_mean(found, texts.scored_tokens)
    if len(losses) == 2:
        # bfloat16 states in batches of another shape
        np.testing.assert_allclose(losses[executor_sweep], losses[plain_loop], atol=0.03)


@rounding_benchmark
@pytest.mark.parametrize(
    "rule",
    [Rounding(3, 64), Rounding(2, 64, "mse_optimal"), NormalFloat4(), TorchAO(8), TorchAO(4, 64), GGUF("Q4_1")],
    ids=lambda rule: rule.name,
)
def test_quantizing_a_matrix(benchmark, rule):
    weight = torch.randn((1536, 576), generator=torch.Generator().manual_seed(0)).bfloat16()
    rounded = benchmark.pedantic(rule, (weight,), rounds=5, warmup_rounds=1)
    assert rounded.shape == weight.shape
    assert not torch.equal(rounded, weight)
