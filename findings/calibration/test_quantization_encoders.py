"""Known answers of GPTQ through llm-compressor, and of llama.cpp's encoder of k-quants."""

import copy

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from lab.errors import UserError
from lab.quantization import ggml
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
    """Token ids."""
    return torch.randint(VOCABULARY, (texts, tokens), generator=torch.Generator().manual_seed(seed)).tolist()


def inputs_of(decoder, layer, texts):
    """What a layer's linear maps see on texts: path -> [tokens, in]."""
    seen = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, args, path=path: seen.setdefault(path, []).append(args[0].flatten(0, -2))
        )
        for path, linear in matrices(decoder.layers[layer]).items()
    ]
    for text in texts:
        decoder.model(torch.tensor([text]))
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(parts) for path, parts in seen.items()}


# ---- GPTQ


@pytest.fixture(scope="module")
def quantized():
    """A tiny decoder, its GPTQ at 4 bits, and the texts."""
    decoder, texts = wide(), random_texts()
    return decoder, GPTQ(4, GROUP, decoder, texts), texts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_matrix_lies_on_its_levels(architecture):
    """Levels are k s with k from -8 to 7 and s = max |w| / 7.5 of the group; the model stays as it was."""
    decoder = wide(architecture)
    before = copy.deepcopy(decoder.model.state_dict())
    rule = GPTQ(4, GROUP, decoder, random_texts())
    for index, layer in enumerate(decoder.layers):
        for path, linear in matrices(layer).items():
            groups = linear.weight.reshape(-1, GROUP)
            codes = rule(linear.weight, f"{index}.{path}").reshape(-1, GROUP) / (groups.abs().amax(1, True) / 7.5)
            torch.testing.assert_close(codes, codes.round().clamp(-8, 7), rtol=0, atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in decoder.model.state_dict().items())


def test_outputs_change_less_than_by_rounding_although_weights_change_more(quantized):
    """The first layer, which sees what it saw before: errors of outputs on the texts, and of weights."""
    decoder, rule, texts = quantized
    for path, seen in inputs_of(decoder, 0, texts).items():
        weight = decoder.layers[0].get_submodule(path).weight.detach()
        made, rounded = rule(weight, f"0.{path}"), Rounding(4, GROUP, "symmetric_full_range")(weight)
        if path.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):  # those that see unchanged inputs
            assert relative_error(seen @ weight.T, seen @ made.T) < relative_error(seen @ weight.T, seen @ rounded.T)
        assert relative_error(weight, made) > relative_error(weight, rounded)


def test_steps_of_8_bits_are_17_times_finer(quantized):
    """And so are errors: 127.5 levels to the largest weight, not 7.5."""
    decoder, rule, texts = quantized
    weight, place = decoder.layers[2].mlp.up_proj.weight.detach(), "2.mlp.up_proj"
    errors = [relative_error(weight, made(weight, place)) for made in (rule, GPTQ(8, GROUP, decoder, texts))]
    assert errors[0] / errors[1] == pytest.approx(17, rel=0.1)


def test_the_same_again_and_random_numbers_left_alone(quantized):
    decoder, rule, texts = quantized
    state = torch.get_rng_state()
    weight = decoder.layers[3].mlp.down_proj.weight.detach()
    again = GPTQ(4, GROUP, decoder, texts)(weight, "3.mlp.down_proj")
    assert torch.equal(again, rule(weight, "3.mlp.down_proj"))
    assert torch.equal(torch.get_rng_state(), state)


def test_texts_matter(quantized):
    decoder, rule, _ = quantized
    weight = decoder.layers[3].mlp.down_proj.weight.detach()
    other = GPTQ(4, GROUP, decoder, random_texts(seed=1))
    assert not torch.equal(other(weight, "3.mlp.down_proj"), rule(weight, "3.mlp.down_proj"))


def test_a_model_with_its_matrices_is_the_library_s_model(quantized):
    """The loss of the layer program is that of a model whose weights were put in by hand."""
    from lab.corpora.batches import TokenText, token_batches

    decoder, rule, texts = quantized
    batch = token_batches([TokenText(tuple(text), tuple(range(1, len(text)))) for text in texts], 256)[0]
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
