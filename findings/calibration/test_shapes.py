"""Closed forms of blocks against the modules that maintained libraries build, without memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import AutoConfig, AutoModelForCausalLM

from lab import published
from lab.architectures import fish_codec, fish_speech, shapes
from lab.architectures.shapes import Shapes, Widths
from lab.experiments.architectures.fish_speech_s2_pro import FishSpeech

pytestmark = pytest.mark.calibration

few = settings(max_examples=12, deadline=None)
small = st.integers(1, 6)


def named(module: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}


@st.composite
def widths(draw: st.DrawFn) -> Widths:
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 4))
    # Llama's configuration insists on a width that heads divide, whatever their own width is.
    return Widths(4 * heads * draw(small), 24 * draw(small), heads, kv_heads, 8 * draw(small))


def decoder(kind: str, own: Widths, layers: int, vocabulary: int, *, tied: bool) -> Shapes:
    config = AutoConfig.for_model(
        kind,
        hidden_size=own.width,
        intermediate_size=own.mlp_width,
        num_attention_heads=own.heads,
        num_key_value_heads=own.kv_heads,
        head_dim=own.head_dim,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        return named(AutoModelForCausalLM.from_config(config))


#: model type -> whether it normalizes queries and keys
DECODERS = {"qwen3": True, "llama": False}


# ---- decoders


@pytest.mark.parametrize(("kind", "qk_norm"), DECODERS.items())
@few
@given(own=widths(), layers=small, vocabulary=st.integers(2, 200), tied=st.booleans())
def test_a_decoder_owns_the_tensors_of_the_module(kind, qk_norm, own, layers, vocabulary, tied):
    """Name by name and shape by shape, whatever the sizes: a wrong bias, norm or head count cannot pass."""
    found = decoder(kind, own, layers, vocabulary, tied=tied)
    assert shapes.decoder(own, layers, vocabulary, qk_norm=qk_norm, head=not tied) == found


@given(own=widths(), layers=small, vocabulary=st.integers(2, 200), tied=st.booleans())
@few
def test_one_layer_and_one_entry_more(own, layers, vocabulary, tied):
    def count(layers: int, vocabulary: int) -> int:
        return shapes.parameters(shapes.decoder(own, layers, vocabulary, qk_norm=True, head=not tied))

    one = shapes.parameters(shapes.layer(own, qk_norm=True))
    assert one == own.attention_parameters + own.mlp_parameters + 2 * own.width + 2 * own.head_dim
    assert count(layers + 1, vocabulary) - count(layers, vocabulary) == one
    assert count(layers, vocabulary + 1) - count(layers, vocabulary) == own.width * (1 if tied else 2)


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"stand in two tables: norm\.weight"):
        shapes.joined(shapes.under("norm", shapes.rms_norm(4)), shapes.under("norm", shapes.rms_norm(4)))


# ---- single modules


@given(inputs=small, outputs=small, kernel=small, bias=st.booleans())
@few
def test_convolutions(inputs, outputs, kernel, bias):
    plain = nn.Conv1d(inputs, outputs, kernel, bias=bias)
    turned = nn.ConvTranspose1d(inputs, outputs, kernel, bias=bias)
    assert shapes.convolution(inputs, outputs, kernel, bias=bias) == named(plain)
    assert shapes.transposed_convolution(inputs, outputs, kernel, bias=bias) == named(turned)
    assert shapes.convolution(inputs, inputs, kernel, groups=inputs) == named(
        nn.Conv1d(inputs, inputs, kernel, groups=inputs)
    )
    for table, module in ((shapes.convolution, plain), (shapes.transposed_convolution, turned)):
        normed = shapes.weight_normed(table(inputs, outputs, kernel, bias=bias))
        assert sorted(normed.values()) == sorted(named(weight_norm(module)).values())


@pytest.mark.parametrize("bias", [True, False])
def test_dense_layers_and_norms(bias):
    assert shapes.linear(3, 5, bias=bias) == named(nn.Linear(3, 5, bias=bias))
    assert shapes.layer_norm(3) == named(nn.LayerNorm(3))
    assert shapes.rms_norm(3) == named(nn.RMSNorm(3))
    assert shapes.embedding(7, 3) == named(nn.Embedding(7, 3))


@given(length=st.integers(20, 60), kernel=small, stride=small, padding=st.integers(0, 3))
@few
def test_lengths(length, kernel, stride, padding):
    x = torch.zeros(1, 1, length)
    padding = min(padding, (kernel - 1) // 2)
    plain = nn.Conv1d(1, 1, kernel, stride, padding)(x)
    turned = nn.ConvTranspose1d(1, 1, kernel, stride, padding)(x)
    assert shapes.convolved_length(length, kernel, stride, padding) == plain.shape[-1]
    assert shapes.transposed_length(length, kernel, stride, padding) == turned.shape[-1]


@given(length=st.integers(1, 30), window=st.integers(0, 40))
@few
def test_band(length, window):
    places = torch.arange(length)
    mask = (places[:, None] - places[None]).abs() <= window
    assert shapes.band(length, window) == mask.sum(1).tolist()
    assert (shapes.band(length, window) == [length] * length) == (window >= length - 1)


# ---- the two stacks of the speech model


@st.composite
def dual(draw: st.DrawFn) -> dict[str, object]:
    """A configuration of both stacks, equal in width."""
    own = draw(widths())
    common = {
        "dim": own.width,
        "intermediate_size": own.mlp_width,
        "n_head": own.heads,
        "n_local_heads": own.kv_heads,
        "head_dim": own.head_dim,
        "attention_qkv_bias": False,
        "attention_o_bias": False,
    }
    slow = common | {"n_layer": draw(small), "vocab_size": draw(st.integers(2, 90)), "tie_word_embeddings": True}
    fast = common | {"n_layer": draw(small), "vocab_size": draw(st.integers(2, 40)), "tie_word_embeddings": False}
    return {
        "text_config": slow | {"attention_qk_norm": True},
        "audio_decoder_config": fast
        | {"attention_qk_norm": False, "num_codebooks": draw(st.integers(2, 6)), "text_dim": own.width},
    }


@given(config=dual())
@few
def test_the_stacks_have_the_parameters_of_qwen3_and_llama(config):
    """Packed matrices hold as much as separate ones: 9 tensors a layer against 11."""
    slow, fast = config["text_config"], config["audio_decoder_config"]
    own = fish_speech.widths(slow)
    qwen3 = decoder("qwen3", own, slow["n_layer"], slow["vocab_size"], tied=True)
    llama = decoder("llama", own, fast["n_layer"], fast["vocab_size"], tied=False)
    table = fast["num_codebooks"] * fast["vocab_size"] * own.width
    assert shapes.parameters(fish_speech.slow_ar(config)) == shapes.parameters(qwen3)
    assert shapes.parameters(fish_speech.fast_ar(config)) == shapes.parameters(llama) + table
    assert len(qwen3) - len(fish_speech.slow_ar(config)) == 2 * slow["n_layer"]


@given(config=dual())
@few
def test_kinds_divide_the_tensors(config):
    table = fish_speech.tensors(config)
    by_kind = {kind: {n: s for n, s in table.items() if fish_speech.kind(n) == kind} for kind in fish_speech.KINDS}
    assert shapes.total(by_kind.values()) == shapes.parameters(table)
    fast = config["audio_decoder_config"]
    assert shapes.parameters(by_kind["output_head"]) == fast["vocab_size"] * fast["dim"]


def published_fish() -> FishSpeech:
    return FishSpeech(published.dataset("fish_speech_s2_pro"))


def test_the_published_stacks_as_modules():
    """The planted answers of the source: 4,032,298,496 and 424,696,320 parameters, built from the published sizes."""
    record = published_fish()
    slow, fast = record.slow, record.fast
    own = fish_speech.widths(slow)
    qwen3 = decoder("qwen3", own, 36, slow["vocab_size"], tied=True)
    llama = decoder("llama", own, 4, fast["vocab_size"], tied=False)
    assert (shapes.parameters(qwen3), len(qwen3)) == (4_032_298_496, 398)
    assert record.qwen3_parameters == 4_032_298_496
    assert shapes.parameters(llama) == record.llama_parameters == 424_696_320


# ---- the codec


class Snake(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1, channels, 1))


def test_blocks_of_the_codec():
    """Against blocks put together here from torch's own layers."""
    c = 6
    unit = nn.Sequential(Snake(c), weight_norm(nn.Conv1d(c, c, 7)), Snake(c), weight_norm(nn.Conv1d(c, c, 1)))
    convnext = nn.ModuleList([nn.Conv1d(c, c, 7, groups=c), nn.LayerNorm(c), nn.Linear(c, 4 * c), nn.Linear(4 * c, c)])
    layer = nn.TransformerEncoderLayer(c, 2, 9, bias=False)
    assert shapes.parameters(fish_codec.residual_unit(c)) == shapes.parameters(named(unit))
    assert shapes.parameters(fish_codec.convnext(c)) == shapes.parameters(named(convnext)) + c
    # torch's layer has no gate and no scales, but the same packed attention and two norms
    own = shapes.parameters(fish_codec.transformer_layer(c, 9))
    assert own == shapes.parameters(named(layer)) + 9 * c + 2 * c


def test_planted_answers_of_the_codec():
    parts = published_fish().codec
    assert sum(part.parameters for part in parts.values()) == 391_430_530
    assert sum(part.parameters + part.buffer_elements for part in parts.values()) == 694_993_282
    record = published_fish()
    assert (record.codec_parameters["total"], record.codec_elements["total"]) == (391_430_530, 694_993_282)
    assert record.codec_parameters["total"] == sum(part.parameters for part in parts.values())
    assert {name: part.parameters for name, part in parts.items()} == {
        "encoder": 76_851_328,
        "decoder": 54_104_162,
        "quantizer": 260_475_040,
    }


def test_smaller_masks_change_buffers_only():
    config = dict(published_fish().setting("codec_config"))
    half = config | {"transformer": {**config["transformer"], "block_size": 8192}}
    before, after = fish_codec.codec(config)["encoder"], fish_codec.codec(half)["encoder"]
    assert after.table == before.table
    assert before.buffer_elements - after.buffer_elements == 16384**2 - 8192**2 + 8192 * 64
