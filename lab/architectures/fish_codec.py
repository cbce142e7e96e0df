"""Parameters and stored buffers of a convolutional codec with residual vector quantization, by shape arithmetic.

A descript audio codec in the form of Fish Speech's package: a causal convolutional encoder that ends in a
transformer, a quantizer with two further stages of downsampling around a semantic and several residual codebooks
(a transformer before and after), and a convolutional decoder. A transformer stores a causal mask (block^2) and a
rotary table (block x head width) beside its parameters; counting a state dict counts them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from lab.architectures.shapes import (
    Shapes,
    convolution,
    joined,
    layer_norm,
    linear,
    parameters,
    rms_norm,
    stack,
    transposed_convolution,
    under,
    weight_normed,
)

COMPONENTS = ("encoder", "decoder", "quantizer")

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """What one component of the codec holds.

    Attributes:
        table: its parameters.
        buffer_elements: elements of the masks and rotary tables that its state dict stores.
        transformer_layers: number of them.
        transformer_parameters: elements of the transformers.
    """

    table: Shapes
    buffer_elements: int
    transformer_layers: int
    transformer_parameters: int

    @property
    def parameters(self) -> int:
        """Trainable elements."""
        return parameters(self.table)


def codec(config: Config) -> dict[str, Part]:
    """Encoder, decoder and quantizer."""
    return {"encoder": _encoder(config), "decoder": _decoder(config), "quantizer": _quantizer(config["quantizer"])}


def codebook_sizes(config: Config) -> list[int]:
    """Entries of the semantic codebook, then of the residual ones."""
    own = config["quantizer"]
    return [own["semantic_codebook_size"], *[own["codebook_size"]] * own["n_codebooks"]]


def downsampling(config: Config) -> int:
    """Samples per frame: the product of all strides."""
    return prod(map(int, config["encoder_rates"])) * prod(map(int, config["quantizer"]["downsample_factor"]))


def transformer_layer(width: int, mlp_width: int) -> Shapes:
    """Packed attention with as many key as query heads, gated MLP, two norms, and a scale on either output."""
    return joined(
        under("attention.wqkv", linear(width, 3 * width, bias=False)),
        under("attention.wo", linear(width, width, bias=False)),
        under("feed_forward.w1", linear(width, mlp_width, bias=False)),
        under("feed_forward.w2", linear(mlp_width, width, bias=False)),
        under("feed_forward.w3", linear(width, mlp_width, bias=False)),
        under("attention_norm", rms_norm(width)),
        under("ffn_norm", rms_norm(width)),
        {"attention_layer_scale.gamma": (width,), "ffn_layer_scale.gamma": (width,)},
    )


def transformer(width: int, mlp_width: int, layers: int) -> Shapes:
    """Layers and a final norm."""
    return joined(stack(transformer_layer(width, mlp_width), layers), under("norm", rms_norm(width)))


def convnext(width: int) -> Shapes:
    """A ConvNeXt block: depthwise convolution, norm, two pointwise layers with biases, and a scale."""
    return joined(
        under("dwconv.conv", convolution(width, width, 7, groups=width)),
        under("norm", layer_norm(width)),
        under("pwconv1", linear(width, 4 * width)),
        under("pwconv2", linear(4 * width, width)),
        {"gamma": (width,)},
    )


def residual_unit(channels: int) -> Shapes:
    """Two Snake activations, each before a weight-normed convolution, of kernel 7 and 1."""
    return joined(
        under("block.0", snake(channels)),
        under("block.1", _normed(channels, channels, 7)),
        under("block.2", snake(channels)),
        under("block.3", _normed(channels, channels, 1)),
    )


def snake(channels: int) -> Shapes:
    """The activation x + sin(a x)^2 / a with one `a` per channel."""
    return {"alpha": (1, channels, 1)}


def codebook(width: int, codes: int, code_width: int) -> Shapes:
    """One codebook: projections into and out of its few dimensions, and its entries."""
    return joined(
        under("in_proj", _normed(width, code_width, 1)),
        under("out_proj", _normed(code_width, width, 1)),
        {"codebook.weight": (codes, code_width)},
    )


def _normed(inputs: int, outputs: int, kernel: int) -> Shapes:
    return weight_normed(convolution(inputs, outputs, kernel))


def _buffers(block: int, head_dim: int) -> int:
    return block * block + block * head_dim


def _units(channels: int) -> Shapes:
    return joined(*(under(f"unit.{index}", residual_unit(channels)) for index in range(3)))


def _encoder(config: Config) -> Part:
    channels: int = config["encoder_dim"]
    shared = config["transformer"]
    tables, transformers, layers, buffers = [under("first", _normed(1, channels, 7))], [], 0, 0
    rates, depths = config["encoder_rates"], config["encoder_transformer_layers"]
    for index, (stride, depth) in enumerate(zip(rates, depths, strict=True)):
        name = partial(under, f"block.{index}")
        tables.append(name(joined(_units(channels), under("act", snake(channels)))))
        tables.append(name(under("conv", _normed(channels, 2 * channels, 2 * stride))))
        channels *= 2
        if depth:
            transformers.append(name(under("transformer", transformer(channels, 3 * channels, depth))))
            layers, buffers = layers + depth, buffers + _buffers(shared["block_size"], shared["head_dim"])
    last = joined(under("act", snake(channels)), under("conv", _normed(channels, config["quantizer"]["input_dim"], 3)))
    return _part([*tables, under("last", last)], transformers, layers, buffers)


def _decoder(config: Config) -> Part:
    channels: int = config["decoder_dim"]
    tables = [under("first", _normed(config["quantizer"]["input_dim"], channels, 7))]
    for index, stride in enumerate(config["decoder_rates"]):
        up = weight_normed(transposed_convolution(channels, channels // 2, 2 * stride))
        block = joined(under("act", snake(channels)), under("conv", up), _units(channels // 2))
        tables.append(under(f"block.{index}", block))
        channels //= 2
    last = joined(under("act", snake(channels)), under("conv", _normed(channels, 1, 7)))
    return _part([*tables, under("last", last)], [], 0, 0)


def _quantizer(own: Config) -> Part:
    width: int = own["input_dim"]
    tables = [under("semantic", codebook(width, own["semantic_codebook_size"], own["codebook_dim"]))]
    residual = codebook(width, own["codebook_size"], own["codebook_dim"])
    tables += [under(f"residual.{index}", residual) for index in range(own["n_codebooks"])]
    for index, factor in enumerate(own["downsample_factor"]):
        tables.append(under(f"down.{index}", joined(under("conv", convolution(width, width, factor)), convnext(width))))
        up = under("conv", transposed_convolution(width, width, factor))
        tables.append(under(f"up.{index}", joined(up, convnext(width))))
    inner = own["transformer"]
    one = transformer(inner["dim"], inner["intermediate_size"], inner["n_layer"])
    transformers = [under(f"transformer.{index}", one) for index in range(inner["modules"])]
    layers, buffers = inner["n_layer"] * inner["modules"], _buffers(inner["block_size"], inner["head_dim"])
    return _part(tables, transformers, layers, inner["modules"] * buffers)


def _part(tables: Sequence[Shapes], transformers: Sequence[Shapes], layers: int, buffers: int) -> Part:
    apart = joined(*transformers)
    return Part(joined(*tables, apart), buffers, layers, parameters(apart))
