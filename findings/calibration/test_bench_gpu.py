"""The sweeps on a CUDA device: a randomly initialised Qwen3-4B shape, beside the plain loop, on the same texts.

50 texts of 6,419 tokens, of which 4,144 are scored, as many as the original model's completions have. The layers
of a knockout sweep cost 2 x 0.1 G x 6,419 x (36 + 630) operations, the head 2 x 0.39 G x 4,144 x 37: on an H100
(about 0.8 PFLOP/s in bfloat16 without sparsity) the arithmetic alone takes 1.23 s.

Measured on an H100 (PyTorch 2.11): the knockout sweep 1.896, 1.906 and 1.908 s, after 21 s for the first, which
compiles; the plain loop 51 s. In a profile the device was busy for 1.889 s, so no idle time is left to win: in batches
of 384 and 448 tokens, which are padded less, the sweep took 1.91 and 1.90 s, of 640 1.94, and without looking a batch
ahead 1.96. All swaps took 23.8 s, the plain loop 475 s. On another H100, which took 55 s for the plain loop of
knockouts, their sweep took 1.933, 1.933 and 1.938 s, all swaps 24.0 s. So the goal of 1.9 s is at the edge of what a
card does, and the slower one misses it.

In bfloat16 the executor and the plain loop round differently, as compiled layers and stacked texts do. So both are
compared with float32. Of single texts the executor's losses were off by 0.0034 nat (knockouts) and 0.0037 (swaps; roots
of the mean square), by 0.017 and 0.020 at most, the plain loop's by 0.0040 and 0.0042, by 0.032 and 0.023 at most; of
means over all tokens, the largest of 7 and 8, by 0.0008 and 0.0014, the plain loop's by 0.0005 and 0.0017. These means
may differ by 0.001 between the two, and do by 0.0011 to 0.0013: the benchmark fails on that limit. It is less than what
bfloat16 does to either, and is kept until somebody finds a better one than what was measured.

The plain loop takes a layer out and runs each text alone; only every sixth layer is taken out here and its time
scaled up, since the whole loop takes a minute.
"""

import copy
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lab.corpora.batches import TokenText
from lab.experiments.layers.layer_knockout import EXPERIMENT as KNOCKOUT
from lab.experiments.layers.layer_swap_cost import EXPERIMENT as SWAP
from lab.experiments.layers.layer_swap_cost import all_pairs
from lab.residual.compiled_losses import compiled_losses
from lab.residual.plain import layers_exchanged, plain_losses
from lab.residual.programs import identity, order, skip, swap
from lab.residual.sweeps import Sample
from lab.store import Sweep
from lab.subjects.anatomy import Decoder
from lab.subjects.catalog import facts
from lab.subjects.tiny import tiny

TOKENS, SCORED, PROMPTS, SWAP_PROMPTS = 6419, 4144, 50, 28
STRIDE = 6
KNOCKOUT_SECONDS, SWAP_SECONDS = 1.9, 40.0
#: nat/token
MEANS_DIFFER = 1e-3
#: The executor's distance to float32 in multiples of the plain loop's. Over hundreds of texts and programs the two ways
#: round alike; what is largest varies more.
MORE_ROUNDING = {
    "single texts, root of the mean square": 1.25,
    "single texts, largest": 2.0,
    "means of programs, largest": 2.0,
}


def shaped(name: str) -> torch.nn.Module:
    """A model of a catalogued subject's shape with random weights, small enough for logits to stay moderate."""
    subject = facts(name)
    config = AutoConfig.for_model(
        subject.architecture,
        hidden_size=subject.width,
        num_hidden_layers=subject.layers,
        num_attention_heads=subject.heads,
        num_key_value_heads=subject.kv_heads,
        head_dim=subject.head_dim,
        intermediate_size=subject.mlp_width,
        vocab_size=subject.vocabulary,
        tie_word_embeddings=subject.tied,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def random_texts(count: int, tokens: int, scored: int, vocabulary: int) -> Sample:
    """Texts of random tokens whose completions' lengths fall geometrically, as those of real prompts do."""
    generator = np.random.default_rng(0)
    weights = np.geomspace(1, 30, count)
    lengths = np.maximum(1, np.floor(scored * weights / weights.sum())).astype(int)
    lengths[-1] += scored - lengths.sum()
    prompts = np.full(count, (tokens - scored) // count)
    prompts[0] += tokens - scored - prompts.sum()
    texts = []
    for prompt, completion in zip(prompts, lengths, strict=True):
        ids = generator.integers(1, vocabulary, prompt + completion)
        texts.append(TokenText(tuple(ids.tolist()), tuple(range(prompt, prompt + completion))))
    return Sample(tuple(f"p{index}" for index in range(count)), tuple(texts), ((),) * count)


def knockouts(n: int, layers: range) -> dict[str, tuple]:
    return {"intact": identity(n)} | {f"without layer {layer}": skip(n, [layer]) for layer in layers}


def executor_losses(decoder, texts, programs, budget, head_dtype="bfloat16"):
    """Losses [program, prompt] through the executor as the experiment sets it up, nat/token."""
    losses = compiled_losses(decoder, replace(budget, head_dtype=head_dtype), Sweep())
    return losses("sweep", texts, programs)["loss"]


def plain_loop(decoder, texts, programs):
    """The same losses, one text and one program at a time through the whole model."""
    found = []
    for program in programs.values():
        with layers_exchanged(decoder.model, [step.layer for step in program if step.layer is not None]):
            found.append(plain_losses(decoder.model, texts.texts))
    return np.array(found)


def timed(function, *arguments):
    """Result and seconds, the device's queue emptied before and after."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = function(*arguments)
    torch.cuda.synchronize()
    return result, time.perf_counter() - started


@pytest.fixture(scope="module")
def qwen3_4b():
    return Decoder(shaped("qwen3-4b-instruct-2507"))


@pytest.fixture(scope="module")
def in_float32(qwen3_4b):
    """The same weights in float32: what both ways of running bfloat16 layers are rounded from."""
    return Decoder(copy.deepcopy(qwen3_4b.model).float())


def require_agreement(benchmark, texts, found, plain, exact):
    """Losses [program, prompt] of the executor lie as near to those in float32 as the plain loop's do, and to these."""
    weights = texts.scored_tokens / texts.scored_tokens.sum()
    ours, theirs = found - exact, plain - exact
    rounding = {
        name: {
            "single texts, root of the mean square": float(np.sqrt(((error**2) @ weights).mean())),
            "single texts, largest": float(np.abs(error).max()),
            "means of programs, largest": float(np.abs(error @ weights).max()),
        }
        for name, error in (("the executor", ours), ("the plain loop", theirs), ("between the two", found - plain))
    }
    benchmark.extra_info["loss against float32, nat/token"] = rounding
    executor, loop = rounding["the executor"], rounding["the plain loop"]
    assert max(executor.values()) > 0, "nothing in bfloat16 is exact"
    for name, limit in MORE_ROUNDING.items():
        assert executor[name] <= limit * loop[name], name
    assert rounding["between the two"]["means of programs, largest"] <= MEANS_DIFFER


def test_the_sweeps_agree_with_the_plain_loop_on_any_device():
    """The rehearsal of this benchmark: a tiny Qwen3 in float32, losses within 1e-3 nat for skips and swaps."""
    decoder = Decoder(tiny("qwen3"))
    texts, n = random_texts(6, 90, 60, decoder.vocabulary), decoder.n_layers
    assert sum(len(text.ids) for text in texts.texts) == 90
    assert texts.scored_tokens.sum() == 60
    programs = knockouts(n, range(n)) | {str(pair): swap(n, *pair) for pair in all_pairs(n)}
    budget = replace(SWAP.budgets["full"], batch_tokens=64)
    found = executor_losses(decoder, texts, programs, budget, "float32")
    assert np.abs(found - plain_loop(decoder, texts, programs)).max() <= 1e-3
    assert len({round(float(loss), 6) for loss in found[:, 0]}) == len(programs), "every program must differ"


@pytest.mark.gpu
@pytest.mark.benchmark(group="sweeps of a Qwen3-4B shape")
def test_knockout_sweep_of_a_4b_shape(benchmark, qwen3_4b, in_float32):
    n, budget = qwen3_4b.n_layers, KNOCKOUT.budgets["full"]
    texts = random_texts(PROMPTS, TOKENS, SCORED, qwen3_4b.vocabulary)
    some, every = knockouts(n, range(0, n, STRIDE)), knockouts(n, range(n))
    plain_loop(qwen3_4b, texts, {"intact": identity(n)})  # kernels are chosen on first use
    expected, seconds = timed(plain_loop, qwen3_4b, texts, some)
    _, first = timed(executor_losses, qwen3_4b, texts, every, budget)
    found = benchmark.pedantic(
        executor_losses, (qwen3_4b, texts, every, budget), rounds=3
    )  # returns numbers on the CPU, so the device is done
    benchmark.extra_info["seconds of the first sweep, which compiles"] = round(first, 1)
    benchmark.extra_info["seconds of the plain loop"] = round(seconds * len(every) / len(some), 1)
    chosen = found[[list(every).index(name) for name in some]]
    assert benchmark.stats.stats.min <= KNOCKOUT_SECONDS
    require_agreement(benchmark, texts, chosen, expected, plain_loop(in_float32, texts, some))


@pytest.mark.gpu
@pytest.mark.benchmark(group="sweeps of a Qwen3-4B shape")
def test_swap_matrix_of_a_4b_shape(benchmark, qwen3_4b, in_float32):
    n, budget = qwen3_4b.n_layers, SWAP.budgets["full"]
    share = SWAP_PROMPTS / PROMPTS
    texts = random_texts(SWAP_PROMPTS, round(TOKENS * share), round(SCORED * share), qwen3_4b.vocabulary)
    programs = {"intact": order(range(n))} | {str(pair): swap(n, *pair) for pair in all_pairs(n)}
    found = benchmark.pedantic(executor_losses, (qwen3_4b, texts, programs, budget), rounds=1)
    some = dict(list(programs.items())[::90])
    expected, seconds = timed(plain_loop, qwen3_4b, texts, some)
    benchmark.extra_info["seconds of the plain loop"] = round(seconds * len(programs) / len(some), 1)
    assert benchmark.stats.stats.min <= SWAP_SECONDS
    require_agreement(benchmark, texts, found[::90], expected, plain_loop(in_float32, texts, some))
