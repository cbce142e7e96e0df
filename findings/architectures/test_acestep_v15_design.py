"""AS ACE-Step 1.5: blocks, attention patterns, vocabulary, codes, rates and what runs through the modules.

Names and shapes are those of the counted tensors. What runs through the modules (`data_flow` in the settings) cannot
be read off a configuration or header: it is recorded from public implementations, and calibration runs that of
diffusers on small models, but for one thing: diffusers only samples, so that how training draws timesteps
(`timestep_distribution`, AS-13) is entered by hand from the model's own package. Claims on data flow do not apply to a
checkpoint's headers.
"""

import pytest

from fixtures.claims import claim
from lab.experiments.architectures.acestep_v15 import PLAIN_STACKS, STACKS

MILLION = 1e6
ENCODERS = ("lyric_encoder", "timbre_encoder")
TEN_MINUTES = {"vae_latent": 15_000, "dit_patch": 7_500, "fsq_token": 3_000}


# ---- the diffusion transformer


@claim("AS-8", "published")
def test_attention_alternates(acestep_v15, layer):
    """The DiT's layers alternate between sliding and full attention, beginning with sliding."""
    assert acestep_v15.config("dit")["layer_types"][layer] == ("sliding_attention", "full_attention")[layer % 2]


@claim("AS-8b", "published")
def test_half_of_the_layers_slide(acestep_v15):
    """Of the DiT's 24 layers 12 have sliding and 12 full attention."""
    assert acestep_v15.depth("dit") == 24
    assert acestep_v15.sliding_layers("dit") == 12


@claim("AS-9", "published")
def test_dit_layer(acestep_v15, layer):
    """A DiT layer has two attentions, an MLP, three norms and a table of 6 x 2048: 62.9 million parameters.

    19 tensors: twice four projections and two norms of heads, three MLP matrices, three norms, and the table.
    """
    assert round(float(acestep_v15.dit_layer_parameters.sel(layer=layer)) / MILLION, 1) == 62.9
    assert acestep_v15.dit_layer_tensors.sel(layer=layer).item() == 19


@claim("AS-9b", "control")
def test_dit_layer_follows_from_the_configuration(acestep_v15, layer):
    """A DiT layer is two attentions, an MLP and nine vectors of the width: 2 A + M + 3 d + 6 d."""
    own = acestep_v15.stack("dit")
    attention = own.attention_parameters + 2 * own.head_dim
    expected = 2 * attention + own.mlp_parameters + 9 * own.width
    assert acestep_v15.dit_layer_parameters.sel(layer=layer).item() == expected


@claim("AS-10", "published")
def test_modulation(acestep_v15):
    """AdaLN modulates two of the three sublayers with six vectors, and the output with two.

    A shift, a scale and a gate for self-attention and MLP, a shift and a scale for the output. That the sublayer
    without them is cross-attention is no matter of shapes: calibration runs a block.
    """
    width = acestep_v15.stack("dit").width
    assert acestep_v15.shapes_of("decoder.layers.{i}.scale_shift_table") == [((1, 6, width), acestep_v15.depth("dit"))]
    assert acestep_v15.shapes_of("decoder.scale_shift_table") == [((1, 2, width), 1)]


@claim("AS-10b", "corrected")
def test_modulation_is_shared(acestep_v15):
    """One projection of the time embedding serves all layers; a layer adds a table of its own and nothing else."""
    width = acestep_v15.stack("dit").width
    assert [name for name, _, _ in acestep_v15.groups("dit", "decoder.layers.") if "time" in name] == []
    assert acestep_v15.shapes_of("decoder.time_embed.time_proj.weight") == [((6 * width, width), 1)]


@claim("AS-11", "published")
def test_time_embeddings(acestep_v15):
    """There are two time embeddings of 29.9 million parameters each, in 12 tensors together."""
    first, second = (sorted(acestep_v15.groups("dit", f"decoder.{name}.")) for name in ("time_embed", "time_embed_r"))
    assert first == second
    assert acestep_v15.tensors("dit_time_embeddings") == 12
    assert round(acestep_v15.parameters("dit_time_embeddings") / 2 / MILLION, 1) == 29.9


@claim("AS-12", "published")
def test_the_second_time_embedding_sees_r(acestep_v15):
    """The second time embedding embeds the second time r of mean flow, and half of the training samples have r = t.

    The share is a field of the configuration, `data_proportion`, which the turbo model's training code overrides.
    """
    embedded = acestep_v15.setting("data_flow")["time_embed_r_input"]
    assert acestep_v15.config("dit")["data_proportion"] == 0.5
    assert embedded == "r"


@claim("AS-12b", "corrected")
def test_the_second_time_embedding_sees_a_difference(acestep_v15):
    """The second time embedding embeds t - r, and sampling passes r = t.

    So that its input is 0, and it adds one constant vector. The public training code of the turbo model passes r = t
    too, which nothing here runs.
    """
    assert acestep_v15.setting("data_flow")["time_embed_r_input"] == "t - r"
    assert acestep_v15.setting("data_flow")["sampler_timestep_r"] == "t"


@claim("AS-13", "published")
def test_timesteps_are_log_normal(acestep_v15):
    """Training draws timesteps from a log-normal distribution with mu = -0.4 and sigma = 1."""
    own = acestep_v15.config("dit")
    assert (own["timestep_mu"], own["timestep_sigma"]) == (-0.4, 1)
    assert acestep_v15.setting("data_flow")["timestep_distribution"] == "log-normal"


@claim("AS-13b", "corrected")
def test_timesteps_are_logit_normal(acestep_v15):
    """Training draws timesteps as t = sigmoid(mu + sigma z): a logit-normal distribution, within (0, 1)."""
    assert acestep_v15.setting("data_flow")["timestep_distribution"] == "logit-normal"


@claim("AS-18", "published")
def test_window(acestep_v15):
    """Sliding layers have a window of 128."""
    assert acestep_v15.config("dit")["sliding_window"] == 128


@claim("AS-18b", "corrected")
def test_band(acestep_v15):
    """A query in a sliding layer sees 257 keys, 20.6 seconds of audio.

    The mask keeps |i - j| <= 128, both ways, of patches at 12.5 per second.
    """
    assert acestep_v15.keys_seen == 257
    assert round(acestep_v15.keys_seen / acestep_v15.rates["dit_patch"], 1) == 20.6


@claim("AS-27", "published")
def test_input_channels(acestep_v15):
    """The DiT's 192 input channels are three times 64: noisy latent, source latent and mask."""
    own = acestep_v15.config("dit")
    assert own["in_channels"] == 192
    assert own["in_channels"] == 3 * own["audio_acoustic_hidden_dim"]


@claim("AS-29", "published")
def test_sampling_steps(acestep_v15):
    """The turbo model denoises in 8 steps."""
    assert acestep_v15.setting("data_flow")["sampler_default_steps"] == 8


# ---- one block in all stacks


@claim("AS-16", "published")
@pytest.mark.parametrize("stack", PLAIN_STACKS)
def test_one_block_design(acestep_v15, stack):
    """Planner, lyric and timbre encoder, pooler and detokenizer are built of one block of 50,336,000 parameters.

    16 query and 8 key heads of 128, an MLP of 6144, norms on queries and keys. Counted over the tensors of a stack's
    layers, and divided by the number of its layers.
    """
    assert acestep_v15.layer_parameters(stack) == 50_336_000


@claim("AS-16b", "published")
@pytest.mark.parametrize("stack", [name for name in STACKS if name != "dit"])
def test_one_kernel_serves_all(acestep_v15, stack):
    """One kernel serves the entire system: every stack has the DiT's sizes and masks.

    A layer's tensors are of shapes that a DiT layer has, too, and its attention looks back only where the DiT's does.
    The autoencoder has no attention at all.
    """
    assert acestep_v15.shapes_beyond_dit(stack) == []
    assert acestep_v15.is_causal(stack) == acestep_v15.is_causal("dit")


@claim("AS-16c", "corrected")
def test_what_a_dit_layer_adds(acestep_v15):
    """A DiT layer is the common block with a second attention, its norm, and the table of AdaLN."""
    own = acestep_v15.stack("dit")
    added = own.attention_parameters + 2 * own.head_dim + own.width + 6 * own.width
    assert acestep_v15.layer_parameters("dit") - acestep_v15.layer_parameters("lyric_encoder") == added


@claim("AS-17", "published")
@pytest.mark.parametrize("stack", ENCODERS)
def test_encoders_look_both_ways(acestep_v15, stack):
    """Lyric and timbre encoder are bidirectional.

    Their masks are symmetric, as calibration finds in the module's.
    """
    assert not acestep_v15.is_causal(stack)


@claim("AS-17b", "corrected")
@pytest.mark.parametrize("stack", ENCODERS)
def test_half_of_the_encoders_layers_slide(acestep_v15, stack):
    """Lyric and timbre encoder look both ways, but half of their layers see a band only.

    They take the first entries of the DiT's list of layer types.
    """
    assert not acestep_v15.is_causal(stack)
    assert acestep_v15.sliding_layers(stack) == -(-acestep_v15.depth(stack) // 2)


@claim("AS-17c", "published")
@pytest.mark.parametrize("stack", ENCODERS)
def test_encoders_see_everything(acestep_v15, stack):
    """Lyric and timbre encoder have the full context in both directions, in every layer.

    A stricter reading than AS-17 of what the source says of lyrics: then no layer would see a band only.
    """
    assert not acestep_v15.is_causal(stack)
    assert acestep_v15.sliding_layers(stack) == 0


@claim("AS-19", "published")
def test_timbre_is_pooled_by_a_token(acestep_v15):
    """The timbre encoder pools with a learned CLS token."""
    assert acestep_v15.setting("data_flow")["timbre_pooling"] == "CLS token"


@claim("AS-19b", "corrected")
def test_timbre_is_the_first_frame(acestep_v15):
    """The timbre encoder returns the output of its first frame, although it has a parameter for a CLS token."""
    assert acestep_v15.setting("data_flow")["timbre_pooling"] == "first frame"
    width = acestep_v15.stack("dit").width
    assert acestep_v15.shapes_of("encoder.timbre_encoder.special_token") == [((1, 1, width), 1)]


# ---- tokens and codes


@claim("AS-7", "published")
def test_music_tokens_were_added(acestep_v15):
    """About 65 thousand tokens for genre, instruments, notation and structure were added to the planner's vocabulary.

    Then some of those beyond Qwen3's tokenizer would be no audio codes.
    """
    added = acestep_v15.planner_vocabulary - acestep_v15.setting("base_tokens")["qwen3"]
    assert round(added / 1000) in (65, 66)
    assert added - acestep_v15.audio_code_tokens > 0


@claim("AS-7b", "corrected")
def test_added_tokens_are_audio_codes(acestep_v15):
    """All 65,535 tokens beyond Qwen3's tokenizer are audio codes, and the quantizer can use 64,000 of them."""
    added = acestep_v15.planner_vocabulary - acestep_v15.setting("base_tokens")["qwen3"]
    assert added == acestep_v15.audio_code_tokens
    assert added == 65_535
    assert acestep_v15.fsq_codes == 64_000


@claim("AS-7c", "corrected")
def test_every_code_has_a_token(acestep_v15):
    """The planner's vocabulary has room for every code of the quantizer beside the text embedder's own tokens."""
    own = acestep_v15.config("text_embedder")["vocab_size"]
    assert acestep_v15.planner_vocabulary - own >= acestep_v15.fsq_codes


@claim("AS-24", "published")
def test_codebook(acestep_v15):
    """The quantizer has 8 x 8 x 8 x 5 x 5 x 5 = 64,000 codes, and the DiT a vocabulary of these and 3 more."""
    own = acestep_v15.config("dit")
    assert own["fsq_input_levels"] == [8, 8, 8, 5, 5, 5]
    assert acestep_v15.fsq_codes == 64_000
    assert own["vocab_size"] == acestep_v15.fsq_codes + 3


@claim("AS-28", "published")
def test_pooling_depends_on_context(acestep_v15):
    """A token depends on the context around its window."""
    assert acestep_v15.setting("data_flow")["pooling_sees"] == "context"


@claim("AS-28b", "corrected")
def test_pooling_is_local(acestep_v15):
    """A token depends on the five frames of its own window alone; the band of 128 never binds.

    A window is five frames and the pooling token.
    """
    own = acestep_v15.config("dit")
    assert acestep_v15.setting("data_flow")["pooling_sees"] == "own window"
    assert own["pool_window_size"] + 1 <= own["sliding_window"]


# ---- rates


@claim("AS-20", "published")
def test_reference_clip(acestep_v15):
    """The timbre encoder hears 750 frames, 30 seconds."""
    frames = acestep_v15.config("dit")["timbre_fix_frame"]
    assert frames == 750
    assert frames / acestep_v15.rates["vae_latent"] == 30


@claim("AS-21", "published")
def test_latents_of_ten_seconds(acestep_v15):
    """The autoencoder divides length by 1920: 10 seconds are 250 latents of 64 channels, and decode to 480,000 samples.

    At 25 Hz; and the shapes that the source printed when it ran a clip through.
    """
    seen = acestep_v15.printed("vae_shape_check").sel(tensor=["latent", "decoded"], axis=["channel", "time"])
    assert acestep_v15.downsampling == 1920
    assert acestep_v15.rates["vae_latent"] == 25
    assert (acestep_v15.latent_channels, acestep_v15.latents_of(480_000)) == (64, 250)
    assert acestep_v15.samples_of(250) == 480_000
    assert seen.values.tolist() == [[64, 250], [acestep_v15.config("vae")["audio_channels"], 480_000]]


@claim("AS-21b", "corrected")
def test_round_trip_keeps_multiples(acestep_v15):
    """The round trip keeps the length of multiples of 1920 samples, and cuts others down to one."""
    whole = [acestep_v15.downsampling * count for count in (1, 2, 249, 250)]
    assert [acestep_v15.samples_of(acestep_v15.latents_of(samples)) for samples in whole] == whole
    assert acestep_v15.samples_of(acestep_v15.latents_of(whole[-1] - 1)) == whole[-2]


@claim("AS-23", "published")
def test_pooling(acestep_v15):
    """Tokens come at 5 Hz, one for every five latents."""
    assert acestep_v15.config("dit")["pool_window_size"] == 5
    assert acestep_v15.rates["fsq_token"] == 5


@claim("AS-26", "published")
@pytest.mark.parametrize("stream", TEN_MINUTES)
def test_ten_minutes(acestep_v15, stream):
    """A song of ten minutes is 15,000 latents, 7,500 patches and 3,000 tokens."""
    assert acestep_v15.frames(stream) == TEN_MINUTES[stream]
