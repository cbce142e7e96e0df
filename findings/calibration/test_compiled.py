"""Compiled layers compute what the layers compute, see hooks, and give way where they cannot be compiled.

`eager` traces and guards as `inductor` does, and runs the graph's operations one by one: no compiler is needed.
On a CUDA device the benchmark of a 4B shape holds the compiled sweep against the plain loop.
"""

from __future__ import annotations

import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from lab.corpora.batches import TokenText, token_batches
from lab.residual import compiled
from lab.residual.compiled import Compiled, layer_compiler
from lab.residual.executor import Executor
from lab.residual.programs import identity, skip, swap
from lab.residual.readouts import CompletionLoss
from lab.subjects.anatomy import Decoder
from lab.subjects.tiny import LAYERS, tiny

pytestmark = [pytest.mark.calibration, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

PROGRAMS = [identity(LAYERS), skip(LAYERS, [1]), swap(LAYERS, 0, LAYERS - 1)]


@pytest.fixture(scope="module", params=["qwen3", "gemma3_text"])
def decoder(request):
    return Decoder(tiny(request.param))


@pytest.fixture(scope="module")
def batches():
    """Texts of several lengths in batches of several shapes: compiled for all of them."""
    generator = np.random.default_rng(0)
    texts = [TokenText(tuple(generator.integers(1, 90, n).tolist()), (n - 1,)) for n in (5, 6, 9, 11, 12)]
    return token_batches(texts, 24)


@pytest.fixture(autouse=True)
def _anew():
    torch._dynamo.reset()


def refusing() -> nn.Module:
    """A layer that refuses its input, in code that is not traced."""

    class Refusing(nn.Module):
        @torch.compiler.disable  # imports TorchDynamo, so not at collection
        def forward(self, state):
            raise RuntimeError("a state of three")

    return Refusing()


def finals(executor, batch):
    return executor.run(batch, PROGRAMS, lambda states: {"final": states})["final"]


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_layers_are_the_layers(decoder, batches):
    torch._dynamo.utils.counters.clear()
    compiling, plain = Executor(decoder, compiler="eager"), Executor(decoder)
    for batch in batches:
        torch.testing.assert_close(finals(compiling, batch), finals(plain, batch), rtol=1e-3, atol=1e-3)
    kinds = len(set(getattr(decoder.config, "layer_types", None) or ["full_attention"]))
    assert 0 < graphs() <= 3 * kinds, "layers of one kind share their code, whatever the number and length of texts"
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiled_layers_are_made_once(decoder):
    """They are the decoder's: another one has its own, and they end with it."""
    first, second = (Executor(decoder, compiler="eager")._layers for _ in range(2))
    assert all(one is other for one, other in zip(first, second, strict=True))
    assert Executor(decoder)._layers is decoder.layers
    other = Decoder(tiny("llama"))
    kept = weakref.ref(Executor(other, compiler="eager")._layers[2])
    assert kept() is not first[2]
    replaced = other.layers[2] = nn.Identity()
    assert Executor(other, compiler="eager")._layers[2].function is replaced
    del other, replaced
    gc.collect()
    assert kept() is None


def test_the_loss_is_compiled_once(decoder, batches):
    one, other = (CompletionLoss(decoder, batch, compiler="eager")._compiled for batch in batches[:2])
    assert one is other


def test_hooks_that_come_later_are_called(batches):
    decoder, seen = Decoder(tiny("llama")), []
    executor = Executor(decoder, compiler="eager")
    before = finals(executor, batches[0])
    handle = decoder.layers[1].mlp.register_forward_hook(lambda *about: seen.append(about))
    during = finals(executor, batches[0])
    handle.remove()
    assert len(seen) == 2, "two of the three programs run layer 1, in one call or in two"
    torch.testing.assert_close(during, before, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_compiled_runs_as_it_is(batches):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    decoder = Decoder(tiny("llama"))
    with pytest.warns(RuntimeWarning, match="torch.compile fails here .no compiler here.; going on without it"):
        found = finals(Executor(decoder, compiler=broken), batches[0])
    assert torch.equal(found, finals(Executor(decoder), batches[0]))


def test_the_compiler_is_tried_again_by_who_asks_next():
    def broken(graph, inputs):
        raise RuntimeError("no compiler")

    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="no compiler"):
            assert compiled.compiled_function(torch.sin, broken)(torch.zeros(1)) == 0
        assert compiled._FUNCTIONS[torch.sin, broken].has_failed
    assert not compiled.compiled_function(torch.sin, broken).has_failed


def test_layers_that_were_replaced_are_let_go():
    decoder = Decoder(tiny("llama"))
    gone = weakref.ref(decoder.layers[2])
    compiled.compiled_layers(decoder, decoder.layers, "eager")
    decoder.layers[2] = decoder._list[2] = torch.nn.Identity()
    assert len(compiled.compiled_layers(decoder, decoder.layers, "eager")) == len(decoder.layers)
    decoder._stand_ins.clear()
    gc.collect()
    assert gone() is None


def test_an_error_of_the_layer_itself_is_not_taken_for_the_compilers():
    layer = Compiled(refusing(), "eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="a state of three"):
            layer(torch.ones(1, 3))


@pytest.mark.parametrize(
    ("device", "parameters", "wanted", "expected"),
    [
        ("cuda", 4_000_000, True, "inductor"),
        ("cuda", 3_999_999, True, None),
        ("cuda", 4_000_000, False, None),
        ("cpu", 4_000_000, True, None),
    ],
)
def test_large_layers_on_a_cuda_device_are_compiled(monkeypatch, device, parameters, wanted, expected):
    monkeypatch.setattr(compiled, "LEAST_PARAMETERS", 4_000_000)
    layer = nn.Linear(parameters, 1, bias=False, device="meta")
    assert layer_compiler([layer], torch.device(device), wanted) == expected


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_loss_is_the_loss(decoder, batches, head_dtype):
    """Gemma's logits are capped here, after the product."""
    states = torch.randn(3, *batches[0].ids.shape, decoder.width, generator=torch.Generator().manual_seed(0))
    one, other = (
        CompletionLoss(decoder, batches[0], head_dtype=head_dtype, compiler=compiler)(states)["loss"]
        for compiler in ("eager", None)
    )
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
