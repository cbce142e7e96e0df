"""How long norms take as kernels, and the sweep over single layers' norms beside the plain loop.

Kernels are those of T-15.27 to 29: the published shapes on a CUDA device, small ones on a CPU. The plain loop is the
source's: put other norms into a layer, run the whole model text by text, put the layer's own back.
"""

import numpy as np
import pytest
import torch

from lab.corpora.corpus import load_corpus
from lab.experiments.surgery.measuring.normalization import parts
from lab.experiments.surgery.normalization import EXPERIMENT
from lab.normalization import latency
from lab.normalization.replacements import Identity
from lab.normalization.settings import NORM_TYPES, Bench
from lab.normalization.sites import norms_of
from lab.normalization.surgery import Renormed
from lab.residual.executor import Executor
from lab.residual.plain import plain_losses
from lab.residual.sweeps import ProgramLosses, Sample, token_mean
from lab.store import Sweep

BUDGET = EXPERIMENT.budgets["quick"]
TEXTS, STRIDE = 4, 6
CPU_WIDTH, CPU_LENGTH = 576, 128
GPU_WIDTH, GPU_LENGTH = 2560, 8192
#: a compiler for CPU kernels is not everywhere
ON_CPU = [name for name in NORM_TYPES if name != "rms_norm_compiled"]

sweep_benchmark = pytest.mark.benchmark(group="every sixth layer of SmolLM2 without norms, 4 texts")
cpu_benchmark = pytest.mark.benchmark(group="norms forward and backward, CPU, float32, 4 x 128 tokens of width 576")
gpu_benchmark = pytest.mark.benchmark(group="norms forward and backward, CUDA, bfloat16, 4 x 8192 tokens of width 2560")


def both_ways(call, x):
    x.grad = None
    call(x).sum().backward()
    if x.device.type == "cuda":
        torch.cuda.synchronize()


def setting(norm_type, width, length, device, dtype):
    module = latency.module(norm_type, width)
    return module.to(device, dtype), latency.inputs(norm_type, width, length, torch.device(device), dtype)


@pytest.fixture(scope="module")
def least():
    """Least time of each norm that has run [s]: what else runs can only add to it."""
    return {}


def compare_with_identity(least, norm_type, benchmark):
    """Doing nothing must take least: else what is timed is something else."""
    least[norm_type] = benchmark.stats.stats.min
    if len(least) > 1 and "identity" in least:
        assert least["identity"] == min(least.values())


@cpu_benchmark
@pytest.mark.parametrize("norm_type", ON_CPU)
def test_norm_on_a_cpu(benchmark, least, norm_type):
    call, x = setting(norm_type, CPU_WIDTH, CPU_LENGTH, "cpu", torch.float32)
    benchmark.pedantic(both_ways, (call, x), rounds=50, warmup_rounds=10)
    compare_with_identity(least, norm_type, benchmark)


@pytest.mark.gpu
@gpu_benchmark
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_norm_on_a_gpu(benchmark, least, norm_type):
    module, x = setting(norm_type, GPU_WIDTH, GPU_LENGTH, "cuda", torch.bfloat16)
    call = torch.compile(module) if norm_type == "rms_norm_compiled" else module
    benchmark.pedantic(both_ways, (call, x), rounds=50, warmup_rounds=30)
    compare_with_identity(least, norm_type, benchmark)


@pytest.mark.gpu
@gpu_benchmark
def test_published_ratios_on_a_gpu(benchmark):
    """T-15.27b and 28b at one shape: on 32,768 tokens compiled RMSNorm beats LayerNorm and eager RMSNorm."""
    names = ("rms_norm_compiled", "layer_norm", "rms_norm_eager")

    def times():
        device = torch.device("cuda")
        return [
            sum(latency.measured(name, GPU_WIDTH, GPU_LENGTH, device, torch.bfloat16, Bench(calls=20)))
            for name in names
        ]

    found = benchmark.pedantic(times, rounds=1, warmup_rounds=0)
    benchmark.extra_info["milliseconds"] = {name: round(ms, 3) for name, ms in zip(names, found, strict=True)}
    assert found[1] >= 1.3 * found[0]
    assert found[2] >= 1.5 * found[0]


# ---- the sweep


@pytest.fixture(scope="module")
def texts(smollm2):
    chosen = parts(load_corpus(smollm2.facts, smollm2.tokenizer), BUDGET).scored
    return Sample(chosen.prompts[:TEXTS], chosen.texts[:TEXTS], chosen.user_targets[:TEXTS])


@torch.inference_mode()
def plain_loop(subject, texts):
    """Losses [layer, text], every sixth layer without its norms."""
    norms, found = norms_of(subject.decoder), []
    for index in range(0, subject.decoder.n_layers, STRIDE):
        layer = subject.decoder.layers[index]
        kept = {norm.path: layer.get_submodule(norm.path) for norm in norms.layers[index].values()}
        try:
            for norm in norms.layers[index].values():
                setattr(layer, norm.path, Identity(norm))
            found.append(plain_losses(subject.model, texts.texts))
        finally:
            for path, module in kept.items():
                setattr(layer, path, module)
    return np.array(found)


def executor_sweep(subject, texts):
    """The same losses [layer, text] through the executor."""
    norms = norms_of(subject.decoder)
    changed = Renormed(subject.decoder, norms, norms.pre_roles, Identity)
    made = {index: changed.program("identity", [index]) for index in range(0, subject.decoder.n_layers, STRIDE)}
    variants = {name: variant for own, _ in made.values() for name, variant in own.items()}
    programs = {f"layer {index}": program for index, (_, program) in made.items()}
    executor = Executor(subject.decoder, variants=variants)
    return ProgramLosses(executor, Sweep(), BUDGET.batch_tokens, "bfloat16")("norms", texts, programs)["loss"]


@sweep_benchmark
@pytest.mark.parametrize("way", [plain_loop, executor_sweep])
def test_sweep_over_norms(benchmark, smollm2, texts, losses, way):
    found = benchmark.pedantic(way, (smollm2, texts), rounds=1, warmup_rounds=0)
    losses[way] = token_mean(found, texts.scored_tokens)
    if len(losses) == 2:
        # Broken layers grow bfloat16 roundings: a hundredth of losses of 5 to 50 nat.
        np.testing.assert_allclose(losses[executor_sweep], losses[plain_loop], rtol=0.02)
