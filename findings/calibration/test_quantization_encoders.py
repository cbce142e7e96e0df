"""Known answers of GPTQ, whose columns neural-compressor rounds, and of llama.cpp's encoder of k-quants."""

import copy
import logging

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from lab.corpora.batches import TokenText, token_batches
from lab.errors import UserError
from lab.quantization import ggml, gptq
from lab.quantization.ggml import FALLBACKS, KQuant, encode, stored_bits
from lab.quantization.gptq import GPTQ
from lab.quantization.layers import Workshop, matrices
from lab.quantization.rounding import Rounding, relative_error
from lab.residual.executor import Executor
from lab.residual.readouts import CompletionLoss
from lab.subjects.anatomy import Decoder
from lab.subjects.tiny import VOCABULARY, tiny

pytestmark = pytest.mark.calibration

GROUP = 32
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3_text")


def wide(architecture="llama"):
    """A tiny decoder whose rows hold whole groups of 32 weights."""
    heads = {"head_dim": 16} if architecture in ("qwen3", "gemma3_text") else {}
    return Decoder(tiny(architecture, hidden_size=64, intermediate_size=128, **heads))


def random_texts(seed=0, texts=8, tokens=20):
    """Texts of different lengths, so that batches hold padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [tokens - text % 3 for text in range(texts)]
    rows = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [TokenText(tuple(row), tuple(range(1, len(row)))) for row in rows]


def inputs_of(model, texts):
    """What the linear maps of a model see on texts, one text at a time: name -> [tokens, in]."""
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0][0]))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([text.ids]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def textbook(weight, inputs, bits, group):
    """GPTQ as the paper has it, in float64, one column after the other: no blocks, no Cholesky factor.

    Column j is rounded; columns k > j move by -(error) H^-1[j, k] / H^-1[j, j], and j leaves the inverse.
    """
    inputs = inputs.double()
    hessian = 2 * inputs.T @ inputs
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse, moved, out = torch.linalg.inv(hessian), weight.double().clone(), torch.empty_like(weight.double())
    for column in range(weight.shape[1]):
        if column % group == 0:
            step = moved[:, column : column + group].abs().amax(1) * 2 / (2**bits - 1)
        out[:, column] = (moved[:, column] / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
        error = (moved[:, column] - out[:, column]) / inverse[column, column]
        moved -= torch.outer(error, inverse[column])
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return out


# ---- GPTQ


@pytest.fixture(scope="module")
def quantized():
    """A tiny decoder, its GPTQ at 4 bits, and the texts."""
    decoder, texts = wide(), random_texts()
    return decoder, GPTQ(4, GROUP, decoder, texts), texts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_the_textbook_s(architecture):
    """Every matrix of two layers, given what the layers before it make of the texts when they are quantized."""
    decoder, texts = wide(architecture), random_texts()
    before = copy.deepcopy(decoder.model.state_dict())
    rule = GPTQ(4, GROUP, decoder, texts)
    names = {id(module): name for name, module in decoder.model.named_modules()}
    other = copy.deepcopy(decoder.model)
    for index, layer in enumerate(decoder.layers[:2]):
        seen = inputs_of(other, texts)
        for path, linear in matrices(layer).items():
            name = names[id(linear)]
            expected = textbook(linear.weight.detach(), seen[name], 4, GROUP)
            found = rule(linear.weight, f"{index}.{path}")
            # a weight half-way between two levels may be rounded to either, and the rest of its row follows it
            assert (found - expected).abs().gt(1e-4).float().mean() < 0.03
            other.get_submodule(name).weight.data = found
    assert all(torch.equal(value, before[name]) for name, value in decoder.model.state_dict().items())


def test_matrices_are_rounded_together_if_they_see_the_same_in_every_batch():
    first, second, third = torch.randn(3, 5, 8).unbind()
    seen = {"q": [first, second], "k": [first, second], "o": [first, third], "v": [first.clone(), second.clone()]}
    assert gptq._alike(seen) == [["q", "k", "v"], ["o"]]


def test_groups_have_16_levels(quantized):
    """Levels are whole multiples of a step, from -8 to 7 of them."""
    decoder, rule, _ = quantized
    for index, layer in enumerate(decoder.layers):
        for path, linear in matrices(layer).items():
            groups = rule(linear.weight, f"{index}.{path}").reshape(-1, GROUP)
            assert max(len(group.unique()) for group in groups) <= 16
            for group in groups[:: len(groups) // 4]:
                levels = group.unique()
                codes = levels / levels.diff().min()
                torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-2)
                assert codes.min() > -8.01
                assert codes.max() < 7.01


def test_outputs_change_less_than_by_rounding_although_weights_change_more(quantized):
    """In the first layer, which sees what it saw before."""
    decoder, rule, texts = quantized
    inputs = inputs_of(decoder.model, texts)
    for path, linear in matrices(decoder.layers[0]).items():
        weight = linear.weight.detach()
        seen = inputs[next(name for name in inputs if name.endswith(f"layers.0.{path}"))]
        made, rounded = rule(weight, f"0.{path}"), Rounding(4, GROUP)(weight)
        assert relative_error(seen @ weight.T, seen @ made.T) < relative_error(seen @ weight.T, seen @ rounded.T)
        assert relative_error(weight, made) > relative_error(weight, rounded)


def test_steps_of_8_bits_are_17_times_finer(quantized):
    """And so are errors: 127.5 levels to the largest weight, not 7.5."""
    decoder, rule, texts = quantized
    weight, place = decoder.layers[2].mlp.up_proj.weight.detach(), "2.mlp.up_proj"
    errors = [relative_error(weight, made(weight, place)) for made in (rule, GPTQ(8, GROUP, decoder, texts))]
    assert errors[0] / errors[1] == pytest.approx(17, rel=0.1)


def test_the_same_again_in_bfloat16_and_random_numbers_left_alone():
    decoder = Decoder(wide().model.bfloat16())
    weight, state = decoder.layers[1].mlp.down_proj.weight.detach(), torch.get_rng_state()
    found = [GPTQ(4, GROUP, decoder, random_texts())(weight, "1.mlp.down_proj") for _ in range(2)]
    assert torch.equal(*found)
    assert found[0].dtype == torch.bfloat16
    assert torch.equal(torch.get_rng_state(), state)


def test_texts_matter(quantized):
    decoder, rule, _ = quantized
    weight = decoder.layers[3].mlp.down_proj.weight.detach()
    other = GPTQ(4, GROUP, decoder, random_texts(seed=1))
    assert not torch.equal(other(weight, "3.mlp.down_proj"), rule(weight, "3.mlp.down_proj"))


def test_nothing_is_logged_and_logging_left_as_it_was(quantized, caplog, capfd):
    decoder, _, texts = quantized
    with caplog.at_level("INFO"):
        before = logging.root.manager.disable
        GPTQ(8, GROUP, decoder, texts)(decoder.layers[0].mlp.up_proj.weight, "0.mlp.up_proj")
        assert logging.root.manager.disable == before
    assert (caplog.text, *capfd.readouterr()) == ("", "", "")


def test_a_layer_program_is_a_model_with_its_matrices(quantized):
    """The loss of the layer program is that of a model whose weights were put in by hand."""
    decoder, rule, texts = quantized
    batch = token_batches([text for text in texts if len(text.ids) == 20], 256)[0]
    workshop = Workshop(decoder)
    executor = Executor(decoder)
    executor.variants = workshop.variants
    program = workshop.program([workshop.all(rule)] * decoder.n_layers)
    loss = executor.run(batch, [program], CompletionLoss(decoder, batch, head_dtype=torch.float32))["loss"].sum()
    other = copy.deepcopy(decoder.model)
    for index, layer in enumerate(Decoder(other).layers):
        for path, linear in matrices(layer).items():
            linear.weight.data = rule(linear.weight, f"{index}.{path}")
    logits = other(batch.ids).logits[:, :-1].float()
    theirs = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), batch.ids[:, 1:].reshape(-1))
    assert float(loss) / len(batch.scored) == pytest.approx(float(theirs), abs=1e-4)


# ---- k-quants

K_QUANTS = [("Q4_K", 4.5, 0.0713), ("Q5_K", 5.5, 0.0361), ("Q6_K", 6.5625, 0.0177)]


@pytest.fixture(scope="module")
def gaussian():
    return torch.randn((64, 1024), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"])
def test_llama_cpp_and_the_gguf_package_encode_alike(gaussian, kind):
    """Where both have an encoder, they agree in every bit."""
    found = GGMLQuantizationType[kind]
    assert np.array_equal(encode(gaussian.numpy(), found), quantize(gaussian.numpy(), found))


@pytest.mark.parametrize(("kind", "bits", "error"), K_QUANTS)
def test_error_on_gaussian_weights(gaussian, kind, bits, error):
    """As measured with 0.9 million weights; about half for every further bit, as rate-distortion theory has it."""
    assert relative_error(gaussian, KQuant(kind)(gaussian)) == pytest.approx(error, rel=0.02)
    assert KQuant(kind).stored_bits(1024) == bits


def test_k_quants_beat_the_older_format_of_equal_size(gaussian):
    assert stored_bits("Q4_0") == stored_bits("Q4_K") == 4.5
    older = dequantize(encode(gaussian.numpy(), GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0)
    error = relative_error(gaussian, torch.from_numpy(older))
    assert relative_error(gaussian, KQuant("Q4_K")(gaussian)) < 0.9 * error


@pytest.mark.parametrize("kind", sorted(FALLBACKS))
def test_rows_that_do_not_fit_fall_back(gaussian, kind):
    """As llama.cpp does; Q4_K becomes Q5_0 with 5.5 bits."""
    narrow = gaussian[:, :576].contiguous()
    other = GGMLQuantizationType[FALLBACKS[kind]]
    assert KQuant(kind).format_of(576) == FALLBACKS[kind]
    assert KQuant(kind).stored_bits(576) == stored_bits(FALLBACKS[kind])
    expected = dequantize(quantize(narrow.numpy(), other), other)
    assert torch.equal(KQuant(kind)(narrow), torch.from_numpy(expected))


def test_threads_do_not_matter(gaussian, monkeypatch):
    parts = []
    for threads in (1, 3, 200):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        parts.append(KQuant("Q4_K")(gaussian))
    assert torch.equal(parts[0], parts[1])
    assert torch.equal(parts[0], parts[2])


def test_dtype_and_zeros_are_kept(gaussian):
    assert KQuant("Q4_K")(gaussian.bfloat16()).dtype == torch.bfloat16
    assert not KQuant("Q4_K")(torch.zeros((2, 256))).any()


def test_rows_of_no_whole_block_are_refused(gaussian):
    with pytest.raises(UserError, match="rows of 100 weights are no whole number of Q5_0's blocks of 32 weights"):
        KQuant("Q4_K")(gaussian[:, :100].contiguous())


def test_a_missing_encoder_is_one_line(monkeypatch):
    ggml._encoder.cache_clear()
    monkeypatch.setattr(ggml, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="no encoder of k-quants: install llama"):
        ggml._encoder()
    ggml._encoder.cache_clear()
