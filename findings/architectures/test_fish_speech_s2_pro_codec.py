"""FS Fish Speech S2 Pro: tokens, codebooks and the neural codec.

The source saved nothing of the codec: its printed figures are held against arithmetic on an earlier public
configuration of the codec (`lab.architectures.fish_codec`). A checkpoint's safetensors hold no codec, so these claims
do not apply to one; those about the token ids in its configuration do.

Not claimed of FS-34, for it needs weights: that the rows of the codebook table which no code can name (1024 and above
in blocks 1 to 9) have the norms of their initialisation.
"""

from itertools import pairwise

import pytest

from fixtures.claims import claim
from lab.architectures.fish_codec import COMPONENTS

PRINTED = (*COMPONENTS, "total")


@claim("FS-14", "published")
def test_codes_per_frame(fish_speech_s2_pro):
    """A frame is one semantic and nine residual codes, as many as the Fast AR has codebooks."""
    assert fish_speech_s2_pro.setting("codec_config")["quantizer"]["n_codebooks"] == 9
    assert len(fish_speech_s2_pro.codebook_sizes) == fish_speech_s2_pro.fast["num_codebooks"]


@claim("FS-15", "published")
def test_semantic_tokens(fish_speech_s2_pro):
    """4,096 token ids are semantic codes, as many as the Fast AR's vocabulary has.

    Both ends of the range count; the source's program printed 4,095.
    """
    assert fish_speech_s2_pro.semantic_tokens == 4096
    assert fish_speech_s2_pro.semantic_tokens == fish_speech_s2_pro.fast["vocab_size"]


@claim("FS-15b", "published")
def test_semantic_tokens_are_the_semantic_codebook(fish_speech_s2_pro):
    """There is a semantic token for every entry of the semantic codebook."""
    assert fish_speech_s2_pro.semantic_tokens == fish_speech_s2_pro.codebook_sizes[0]


@claim("FS-16", "published")
def test_listed_ranges_are_the_vocabulary(fish_speech_s2_pro):
    """The listed ranges of token ids make up the vocabulary of 155,776."""
    assert fish_speech_s2_pro.slow["vocab_size"] == 155776
    assert fish_speech_s2_pro.listed_ids == fish_speech_s2_pro.slow["vocab_size"]


@claim("FS-16b", "corrected")
def test_listed_ranges_lie_in_the_vocabulary(fish_speech_s2_pro):
    """The listed ranges are disjoint and inside the vocabulary; 24 control ids and 2 ids of padding are not listed.

    The control ids are the base tokenizer's, 151,643 and 151,646 to 151,668; the padding is what follows the last
    semantic token.
    """
    ranges = fish_speech_s2_pro.listed_ranges
    padding = fish_speech_s2_pro.slow["vocab_size"] - 1 - ranges[-1][1]
    assert all(before[1] < after[0] for before, after in pairwise(ranges))
    assert padding == 2
    assert fish_speech_s2_pro.slow["vocab_size"] - fish_speech_s2_pro.listed_ids - padding == 24


@claim("FS-16c", "corrected")
def test_vocabulary_is_padded(fish_speech_s2_pro):
    """The vocabulary is a multiple of 64."""
    assert fish_speech_s2_pro.slow["vocab_size"] % 64 == 0


@claim("FS-17", "published")
@pytest.mark.parametrize("component", PRINTED)
def test_codec_parameters(fish_speech_s2_pro, component):
    """The codec has 695 million parameters: encoder 346.3, decoder 54.1 and quantizer 294.6.

    Trainable elements, in units of the last printed digit. Only the decoder's are.
    """
    unit = fish_speech_s2_pro.codec_resolution(component)
    printed = round(fish_speech_s2_pro.codec_stated(component) / unit)
    assert round(fish_speech_s2_pro.codec_parameters[component] / unit) == printed


@claim("FS-17b", "corrected")
@pytest.mark.parametrize("component", PRINTED)
def test_codec_state_dict(fish_speech_s2_pro, component):
    """The printed 346.3, 54.1, 294.6 and 695 million are elements of the state dict: masks and rotary tables count.

    Masks of 16384^2 in the encoder and twice 4096^2 in the quantizer reproduce all of them to the printed digit; the
    total is 694.99 million.
    """
    unit = fish_speech_s2_pro.codec_resolution(component)
    printed = round(fish_speech_s2_pro.codec_stated(component) / unit)
    assert round(fish_speech_s2_pro.codec_elements[component] / unit) == printed


@claim("FS-17c", "corrected")
def test_codec_parameters_without_buffers(fish_speech_s2_pro):
    """The codec has 391.4 million parameters; 44 % of its state dict are buffers."""
    trained, stored = fish_speech_s2_pro.codec_parameters["total"], fish_speech_s2_pro.codec_elements["total"]
    assert round(trained / 1e6, 1) == 391.4
    assert round(100 * (1 - trained / stored)) == 44


@claim("FS-18", "published")
def test_the_codec_encoder_is_convolutional(fish_speech_s2_pro):
    """The codec's encoder is convolutional, and its decoder mirrors it.

    Then most of the encoder's parameters would be convolutions.
    """
    encoder = fish_speech_s2_pro.codec["encoder"]
    assert encoder.transformer_parameters / encoder.parameters < 0.5


@claim("FS-18b", "corrected")
def test_the_codec_encoder_is_mostly_a_transformer(fish_speech_s2_pro):
    """71 % of the encoder's parameters are a transformer of 4 layers; the decoder has none."""
    encoder, decoder = fish_speech_s2_pro.codec["encoder"], fish_speech_s2_pro.codec["decoder"]
    assert round(100 * encoder.transformer_parameters / encoder.parameters) == 71
    assert encoder.transformer_layers == 4
    assert decoder.transformer_layers == 0


@claim("FS-19", "published")
def test_layers_of_the_codec(fish_speech_s2_pro):
    """The codec has 16 transformer layers."""
    assert sum(fish_speech_s2_pro.codec_layers.values()) == 16


@claim("FS-19b", "corrected")
def test_layers_of_the_quantizer(fish_speech_s2_pro):
    """16 of the codec's 20 transformer layers are in the quantizer, 8 before and 8 after it."""
    assert fish_speech_s2_pro.codec_layers["quantizer"] == 16
    assert sum(fish_speech_s2_pro.codec_layers.values()) == 20


@claim("FS-20", "published")
def test_codebooks(fish_speech_s2_pro):
    """The semantic codebook has 4096 entries of dimension 8, and each of the nine residual ones 1024."""
    own = fish_speech_s2_pro.setting("codec_config")["quantizer"]
    assert fish_speech_s2_pro.codebook_sizes == [4096, *[1024] * 9]
    assert own["codebook_dim"] == 8


@claim("FS-21", "published")
def test_frame_rate(fish_speech_s2_pro):
    """There are about 21 frames per second.

    44,100 samples over the product of the strides, 2048, is 21.53: within one of 21.
    """
    assert abs(fish_speech_s2_pro.frame_rate - 21) < 1


@claim("FS-21b", "corrected")
def test_code_rate(fish_speech_s2_pro):
    """21.5 frames per second carry 2.196 kbit/s: 12 bits of the semantic code and nine times 10 of the others."""
    assert round(fish_speech_s2_pro.frame_rate, 1) == 21.5
    assert round(fish_speech_s2_pro.kilobits_per_second, 3) == 2.196


@claim("FS-34", "hypothesis")
def test_most_codebook_rows_are_dead(fish_speech_s2_pro):
    """Less than a third of the rows of the codebook table can ever be used.

    It has 4096 rows for each of ten codebooks, and nine of these have 1024 entries.
    """
    assert fish_speech_s2_pro.addressable_rows < 1 / 3
