"""The Oobleck autoencoder of audio, from its configuration: tensors, and lengths of latents and decoded audio.

Residual units of Snake activations and weight-normed convolutions; every stage of the encoder divides the length
by its stride (kernel 2s, padding ceil(s/2)), and the decoder mirrors it.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, prod
from typing import Any

from lab.architectures.shapes import (
    Shapes,
    convolution,
    convolved_length,
    joined,
    transposed_convolution,
    transposed_length,
    under,
    weight_normed,
)

Config = Mapping[str, Any]


def autoencoder(config: Config) -> Shapes:
    """Encoder and decoder."""
    return joined(under("encoder", _encoder(config)), under("decoder", _decoder(config)))


def downsampling(config: Config) -> int:
    """Samples per latent: the product of the strides."""
    return prod(config["downsampling_ratios"])


def latents_of(config: Config, samples: int) -> int:
    """Latents that the encoder makes of so many samples."""
    length = convolved_length(samples, 7, 1, 3)
    for stride in config["downsampling_ratios"]:
        length = convolved_length(length, 2 * stride, stride, ceil(stride / 2))
    return convolved_length(length, 3, 1, 1)


def samples_of(config: Config, latents: int) -> int:
    """Samples that the decoder makes of so many latents."""
    length = convolved_length(latents, 7, 1, 3)
    for stride in reversed(config["downsampling_ratios"]):
        length = transposed_length(length, 2 * stride, stride, ceil(stride / 2))
    return convolved_length(length, 7, 1, 3)


def residual_unit(channels: int) -> Shapes:
    """Two activations, each before a convolution, of kernel 7 and 1."""
    return joined(
        under("snake1", snake(channels)),
        under("conv1", weight_normed(convolution(channels, channels, 7))),
        under("snake2", snake(channels)),
        under("conv2", weight_normed(convolution(channels, channels, 1))),
    )


def snake(channels: int) -> Shapes:
    """The activation x + sin(a x)^2 / b with one `a` and one `b` per channel."""
    return {"alpha": (1, channels, 1), "beta": (1, channels, 1)}


def _units(channels: int) -> Shapes:
    return joined(*(under(f"res_unit{number}", residual_unit(channels)) for number in (1, 2, 3)))


def _encoder(config: Config) -> Shapes:
    width, audio = config["encoder_hidden_size"], config["audio_channels"]
    channels = [width * multiple for multiple in (1, *config["channel_multiples"])]
    blocks = []
    for index, stride in enumerate(config["downsampling_ratios"]):
        inputs, outputs = channels[index], channels[index + 1]
        down = weight_normed(convolution(inputs, outputs, 2 * stride))
        block = joined(_units(inputs), under("snake1", snake(inputs)), under("conv1", down))
        blocks.append(under(f"block.{index}", block))
    return joined(
        under("conv1", weight_normed(convolution(audio, width, 7))),
        *blocks,
        under("snake1", snake(channels[-1])),
        under("conv2", weight_normed(convolution(channels[-1], width, 3))),
    )


def _decoder(config: Config) -> Shapes:
    width, audio = config["decoder_channels"], config["audio_channels"]
    channels = [width * multiple for multiple in (1, *config["channel_multiples"])][::-1]
    blocks = []
    for index, stride in enumerate(reversed(config["downsampling_ratios"])):
        inputs, outputs = channels[index], channels[index + 1]
        up = weight_normed(transposed_convolution(inputs, outputs, 2 * stride))
        block = joined(under("snake1", snake(inputs)), under("conv_t1", up), _units(outputs))
        blocks.append(under(f"block.{index}", block))
    return joined(
        under("conv1", weight_normed(convolution(config["decoder_input_channels"], channels[0], 7))),
        *blocks,
        under("snake1", snake(channels[-1])),
        under("conv2", weight_normed(convolution(width, audio, 7, bias=False))),
    )
