"""AS ACE-Step 1.5: the census of components, their parameters and tensors.

Counts are those of modules that maintained libraries built from the four configurations, or of a checkpoint's headers.
Closed forms of the configurations (`lab.architectures.ace_step`) are held against them by AS-1c and AS-1d.
Source of the published sentences: hivaze/dl-experiments, experiments/acestep_v15, whose counts stand in its text alone.
"""

import pytest

from fixtures.claims import claim
from lab.experiments.architectures.acestep_v15 import COMPONENTS

MILLION = 1e6


def test_acestep_v15_matches_snapshot(acestep_v15, snapshot):
    assert acestep_v15 == snapshot


@claim("AS-1", "published")
@pytest.mark.parametrize("component", COMPONENTS)
def test_census(acestep_v15, component):
    """Each component has the number of parameters that the census prints.

    Counted in units of the last printed digit. The text embedder has no row; "about 600 million" in the text is read
    in tens of millions.
    """
    printed, unit = acestep_v15.of("parameters_stated", component), acestep_v15.of("parameters_resolution", component)
    assert round(acestep_v15.parameters(component) / unit) == round(printed / unit)


@claim("AS-1b", "corrected")
def test_census_where_it_is_wrong(acestep_v15):
    """The quantizer has 26,630 parameters, not 24 thousand, and the detokenizer 105.0 million, not 105.1."""
    assert acestep_v15.parameters("fsq_quantizer") == 26_630
    assert round(acestep_v15.parameters("audio_detokenizer") / MILLION, 1) == 105.0


@claim("AS-1c", "control")
@pytest.mark.parametrize("component", COMPONENTS)
def test_census_follows_from_the_configuration(acestep_v15, component):
    """Each component has the parameters and tensors, counted in modules or headers, that its configuration implies."""
    assert acestep_v15.parameters(component) == acestep_v15.implied_parameters(component)
    assert acestep_v15.tensors(component) == acestep_v15.implied_tensors(component)


@claim("AS-1d", "control")
def test_every_shape_follows_from_the_configuration(acestep_v15):
    """There are as many tensors of each shape, component by component, as the configurations imply.

    Whatever their names, which are others in the modules than in the checkpoint.
    """
    assert acestep_v15.groups_beyond == []


@claim("AS-2", "published")
@pytest.mark.parametrize("component", COMPONENTS)
def test_tensor_counts(acestep_v15, component):
    """Each component has the number of tensors that the census prints."""
    assert acestep_v15.tensors(component) == acestep_v15.of("tensors_stated", component)


@claim("AS-2b", "published")
def test_the_census_is_complete(acestep_v15):
    """The rows of the census account for every tensor of the DiT's file."""
    assert acestep_v15.printed_dit_tensors == acestep_v15.dit_tensors


@claim("AS-2c", "corrected")
def test_the_null_condition_is_missing(acestep_v15):
    """The DiT's file has 677 tensors: those of the census, and the null condition of 2,048 parameters that it omits."""
    assert acestep_v15.parameters("null_condition_embedding") == 2048
    assert acestep_v15.tensors("null_condition_embedding") == acestep_v15.dit_tensors - acestep_v15.printed_dit_tensors
    assert acestep_v15.dit_tensors == 677


@claim("AS-3", "published")
def test_total(acestep_v15):
    """All components but the text embedder have about 4,418 million parameters together.

    Within a thousandth, as the spec reads it; AS-3c reads the last digit.
    """
    assert abs(acestep_v15.total / float(acestep_v15.printed("parameters_total_stated")) - 1) < 1e-3


@claim("AS-3b", "corrected")
def test_total_of_the_rows(acestep_v15):
    """The components but the text embedder have 4,416.8 million parameters, about 4.4 billion."""
    assert round(acestep_v15.total / MILLION, 1) == 4416.8


@claim("AS-3c", "published")
def test_total_to_the_last_digit(acestep_v15):
    """All components but the text embedder have 4,418 million parameters together, to the printed million.

    A stricter reading than AS-3: the printed total is beyond the rounding of its own rows, which sum to 4,416.9.
    """
    assert round(acestep_v15.total / MILLION) == round(float(acestep_v15.printed("parameters_total_stated")) / MILLION)


@claim("AS-4", "published")
def test_the_planner_is_the_largest(acestep_v15):
    """The planner is the largest component, with 42 % of the total.

    Of the whole models: the DiT counts with its time embeddings. The share is that of this size of planner.
    """
    assert max(acestep_v15.models, key=acestep_v15.models.get) == "lm_planner"
    assert 0.41 < acestep_v15.parameters("lm_planner") / acestep_v15.total < 0.43


@claim("AS-5", "published")
def test_embedding_of_the_planner(acestep_v15):
    """The embedding is 24 % of the planner."""
    own = acestep_v15.config("lm")
    assert round(100 * own["vocab_size"] * own["hidden_size"] / acestep_v15.parameters("lm_planner")) == 24


@claim("AS-6", "published")
def test_the_planner_is_a_longer_qwen3(acestep_v15):
    """The planner is Qwen3-1.7B with a longer vocabulary.

    What it has more in parameters is what it has more in rows of the embedding, and nothing else.
    """
    extra = acestep_v15.rows_beyond_qwen3 * acestep_v15.config("lm")["hidden_size"]
    assert acestep_v15.parameters_beyond_qwen3 == extra


@claim("AS-14", "published")
def test_condition_encoder(acestep_v15):
    """The condition encoder has 607 million parameters.

    To the printed million: text projector, lyric encoder and timbre encoder.
    """
    printed = float(acestep_v15.printed("condition_encoder_parameters_stated"))
    assert round(acestep_v15.condition_encoder / MILLION) == round(printed / MILLION)


@claim("AS-14b", "corrected")
def test_condition_encoder_by_parts(acestep_v15):
    """The condition encoder has 608.4 million parameters, 606.3 without the text projector."""
    assert round(acestep_v15.condition_encoder / MILLION, 1) == 608.4
    assert round(acestep_v15.together("lyric_encoder", "timbre_encoder") / MILLION, 1) == 606.3


@claim("AS-15", "published")
def test_encoders_are_as_large_as_the_text_embedder(acestep_v15):
    """Lyric and timbre encoder are nearly as large as the text embedder.

    Within 10 % either way, as the spec reads it; AS-15c takes "nearly" for less.
    """
    ratio = acestep_v15.together("lyric_encoder", "timbre_encoder") / acestep_v15.parameters("text_embedder")
    assert 0.9 < ratio < 1.1


@claim("AS-15b", "corrected")
def test_encoders_are_larger_than_the_text_embedder(acestep_v15):
    """Lyric and timbre encoder together are 1.8 % larger than the text embedder."""
    ratio = acestep_v15.together("lyric_encoder", "timbre_encoder") / acestep_v15.parameters("text_embedder")
    assert round(100 * (ratio - 1), 1) == 1.8


@claim("AS-15c", "published")
def test_encoders_are_smaller_than_the_text_embedder(acestep_v15):
    """Lyric and timbre encoder are a little smaller than the text embedder.

    A stricter reading of "nearly as large" than AS-15: by less than 10 %, but smaller.
    """
    ratio = acestep_v15.together("lyric_encoder", "timbre_encoder") / acestep_v15.parameters("text_embedder")
    assert 0.9 < ratio < 1


@claim("AS-22", "published")
def test_autoencoder(acestep_v15):
    """The autoencoder has 168.7 million parameters, 84.3 in the encoder and 84.4 in the decoder.

    Gains of the weight norms count.
    """
    encoder, decoder = (acestep_v15.parameters(name) / MILLION for name in ("vae_encoder", "vae_decoder"))
    assert round(encoder, 1) == 84.3
    assert round(decoder, 1) == 84.4
    assert round(encoder + decoder, 1) == 168.7


@claim("AS-25", "published")
def test_the_quantizer_has_weights_only(acestep_v15):
    """The quantizer has 24 thousand parameters and no learned codebook.

    To the printed thousand.
    """
    assert round(acestep_v15.parameters("fsq_quantizer") / 1000) == 24


@claim("AS-25b", "corrected")
def test_the_quantizer_has_biases(acestep_v15):
    """The quantizer has 24,576 weights and 2,054 biases in 4 tensors, two projections and no codebook."""
    assert acestep_v15.quantizer_parameters == {"weights": 24_576, "biases": 2_054}
    assert acestep_v15.tensors("fsq_quantizer") == 4


@claim("AS-30", "published")
def test_text_embedder(acestep_v15):
    """The text embedder has about 600 million parameters: 28 layers, 1024 wide, a vocabulary of 151,669.

    600 to the nearest ten million.
    """
    own = acestep_v15.config("text_embedder")
    assert (own["num_hidden_layers"], own["hidden_size"], own["vocab_size"]) == (28, 1024, 151_669)
    assert round(acestep_v15.parameters("text_embedder") / MILLION, -1) == 600
