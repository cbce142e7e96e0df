"""FS Fish Speech S2 Pro: tensors, parameters and shapes of the two stacks.

Every count is held against the configuration: `lab.architectures.fish_speech` says which tensors it implies. What
feeds what (`data_flow` in the settings: FS-6, FS-13) is entered by hand from the public implementation; no maintained
library has it, and nothing here runs it.
Source of the published sentences: hivaze/dl-experiments, experiments/fish_speech_s2_pro.
"""

import pytest

from fixtures.claims import claim, not_applicable

SLOW, FAST = "text_model", "audio_decoder"
SHARES = {"mlp": 66.7, "attention": 23.4, "embedding": 9.9}  #: percent of the Slow AR, as printed
WIDTHS = ("dim", "intermediate_size", "vocab_size", "head_dim")


def test_fish_speech_s2_pro_matches_snapshot(fish_speech_s2_pro, snapshot):
    assert fish_speech_s2_pro == snapshot


@claim("FS-1", "published")
def test_size(fish_speech_s2_pro):
    """The checkpoint has 358 tensors with 4.56 billion parameters, 9.12 GB in bfloat16.

    Equality to the printed digits; the size is the parameters' own, without headers and codec. A checkpoint with
    tensors of another dtype refutes it.
    """
    assert int(fish_speech_s2_pro.variable("tensor_count")) == 358
    assert round(fish_speech_s2_pro.parameters / 1e9, 2) == 4.56
    assert fish_speech_s2_pro.weight_dtype == "bfloat16"
    assert round(fish_speech_s2_pro.gigabytes, 2) == 9.12


@claim("FS-1b", "control")
def test_the_configuration_implies_every_tensor(fish_speech_s2_pro):
    """The checkpoint holds the tensors that its configuration implies, name by name and shape by shape, and no others.

    Everything below may be read off the configuration because of this.
    """
    assert sorted(fish_speech_s2_pro.groups ^ fish_speech_s2_pro.expected_groups) == []


@claim("FS-2", "published")
def test_shares_of_the_stacks(fish_speech_s2_pro):
    """The Slow AR holds 88.4 % of the parameters and the Fast AR 11.6 %, by the names of the tensors."""
    assert round(100 * float(fish_speech_s2_pro.prefix_share.sel(prefix=SLOW)), 1) == 88.4
    assert round(100 * float(fish_speech_s2_pro.prefix_share.sel(prefix=FAST)), 1) == 11.6


@claim("FS-3", "published")
def test_the_slow_ar_is_a_qwen3(fish_speech_s2_pro):
    """The Slow AR has the parameters of a Qwen3 of its sizes.

    Equality. It is about shapes: the public implementation rotates adjacent channels and Qwen3 rotates halves, so
    that the weights fit only after a permutation of the rows of Q and K.
    """
    assert (
        int(fish_speech_s2_pro.variable("parameters_by_prefix").sel(prefix=SLOW)) == fish_speech_s2_pro.qwen3_parameters
    )


@claim("FS-3b", "corrected")
def test_the_slow_ar_is_qwen3_4b_with_more_rows(fish_speech_s2_pro):
    """The Slow AR is Qwen3-4B with 3,840 more rows in its vocabulary.

    What it has more in parameters is whole rows, as many as its vocabulary has more entries.
    """
    assert fish_speech_s2_pro.vocabulary_beyond_qwen3_4b == 3840
    assert fish_speech_s2_pro.rows_beyond_qwen3_4b == fish_speech_s2_pro.vocabulary_beyond_qwen3_4b


@claim("FS-3c", "control")
def test_the_fast_ar_is_a_llama_and_a_table(fish_speech_s2_pro):
    """The Fast AR has the parameters of a Llama of its sizes, and of the table of all codebooks."""
    fast = int(fish_speech_s2_pro.variable("parameters_by_prefix").sel(prefix=FAST))
    own = fish_speech_s2_pro.fast
    assert fast - fish_speech_s2_pro.llama_parameters == own["num_codebooks"] * own["vocab_size"] * own["text_dim"]


@claim("FS-4", "published")
def test_size_of_a_slow_layer(fish_speech_s2_pro, layer):
    """Every Slow AR layer has 100.9 million parameters."""
    assert round(float(fish_speech_s2_pro.slow_layer.sel(layer=layer)) / 1e6, 1) == 100.9


@claim("FS-4b", "control")
def test_slow_layers_follow_from_the_configuration(fish_speech_s2_pro, layer):
    """Every Slow AR layer has exactly the parameters that the configuration implies."""
    assert int(fish_speech_s2_pro.slow_layer.sel(layer=layer)) == fish_speech_s2_pro.expected_layer["slow_ar"]


@claim("FS-5", "published")
@pytest.mark.parametrize("fast_layer", range(4))
def test_fast_layers_lack_only_the_qk_norm(fish_speech_s2_pro, fast_layer):
    """A Fast AR layer is a Slow AR layer without the norms on queries and keys.

    They differ by two gains of one head's width, 256 parameters of 100.9 million.
    """
    if fast_layer not in fish_speech_s2_pro.fast_layer.fast_layer:
        not_applicable(f"the Fast AR has no layer {fast_layer}")
    fast = int(fish_speech_s2_pro.fast_layer.sel(fast_layer=fast_layer))
    assert fish_speech_s2_pro.expected_layer["slow_ar"] - fast == 2 * fish_speech_s2_pro.slow["head_dim"]


@claim("FS-6", "published")
def test_the_fast_ar_owns_the_codebook_table(fish_speech_s2_pro):
    """The table of all codebooks (104.9 million parameters) is part of the Fast AR.

    Its name says so, but a part is what uses it: in the public forward pass the rows are summed into the input of
    the Slow AR.
    """
    assert fish_speech_s2_pro.setting("data_flow")["codebook_embeddings_feed"] == "fast_ar"


@claim("FS-6b", "corrected")
def test_shares_by_role(fish_speech_s2_pro):
    """By what they do the Slow AR has 90.7 % of the parameters and the Fast AR 424.7 million, 9.3 %.

    Which also explains the 400 million of the model card.
    """
    slow, fast = fish_speech_s2_pro.role_parameters["slow_ar"], fish_speech_s2_pro.role_parameters["fast_ar"]
    assert round(100 * slow / (slow + fast), 1) == 90.7
    assert round(fast / 1e6, 1) == 424.7


@claim("FS-7", "published")
@pytest.mark.parametrize("kind", SHARES)
def test_shares_within_the_slow_ar(fish_speech_s2_pro, kind):
    """Of the Slow AR 66.7 % are MLP, 23.4 % attention and 9.9 % embedding."""
    assert round(100 * float(fish_speech_s2_pro.kind_share.sel(prefix=SLOW, kind=kind)), 1) == SHARES[kind]


@claim("FS-7b", "published")
def test_norms_are_few(fish_speech_s2_pro):
    """Norms are less than 0.1 % of the Slow AR."""
    assert fish_speech_s2_pro.kind_share.sel(prefix=SLOW, kind="norm") < 0.001


@claim("FS-8", "published")
def test_ties(fish_speech_s2_pro):
    """The Slow AR's head is its embedding; the Fast AR has a head of its own.

    Read off the tensors, and off the configuration's flags.
    """
    assert fish_speech_s2_pro.named(f"{SLOW}.model.output", f"{SLOW}.output") == []
    assert fish_speech_s2_pro.named(f"{FAST}.output") == [f"{FAST}.output.weight"]
    assert fish_speech_s2_pro.slow["tie_word_embeddings"] is True
    assert fish_speech_s2_pro.fast["tie_word_embeddings"] is False


@claim("FS-9", "published")
def test_no_biases(fish_speech_s2_pro):
    """No projection has a bias.

    The source says it of Q, K, V and O; it holds for every tensor.
    """
    assert fish_speech_s2_pro.named("bias") == []


@claim("FS-10", "published")
def test_the_fast_ar_takes_hidden_states_as_they_are(fish_speech_s2_pro):
    """The Fast AR receives the Slow AR's hidden states at their own width, without a projection."""
    assert fish_speech_s2_pro.fast["text_dim"] == fish_speech_s2_pro.slow["dim"]
    assert fish_speech_s2_pro.fast["text_dim"] == fish_speech_s2_pro.fast["dim"]
    assert fish_speech_s2_pro.named("project") == []


@claim("FS-11", "published")
def test_audio_hidden_width(fish_speech_s2_pro):
    """The audio stack works at a hidden width of 5120.

    A width that is used is the side of some tensor.
    """
    assert fish_speech_s2_pro.fast["audio_hidden_dim"] == 5120
    assert fish_speech_s2_pro.fast["audio_hidden_dim"] in fish_speech_s2_pro.sides


@claim("FS-11b", "corrected")
def test_which_widths_are_used(fish_speech_s2_pro):
    """Width, MLP width, head width and vocabulary are sides of tensors; two more widths of the configuration are not.

    `audio_hidden_dim` and `moe_intermediate_size`: fields that nothing uses.
    """
    used = {part[name] for part in (fish_speech_s2_pro.slow, fish_speech_s2_pro.fast) for name in WIDTHS}
    assert used <= fish_speech_s2_pro.sides
    assert fish_speech_s2_pro.fast["audio_hidden_dim"] not in fish_speech_s2_pro.sides
    assert fish_speech_s2_pro.fast["moe_intermediate_size"] not in fish_speech_s2_pro.sides


@claim("FS-12", "published")
def test_no_experts(fish_speech_s2_pro):
    """Fields for a mixture of experts are there, but the model is dense."""
    assert all(not part["use_moe"] for part in (fish_speech_s2_pro.slow, fish_speech_s2_pro.fast))
    assert all(part["num_experts"] == 1 for part in (fish_speech_s2_pro.slow, fish_speech_s2_pro.fast))
    assert fish_speech_s2_pro.named("router", "expert", ".gate.") == []


@claim("FS-13", "published")
def test_length_of_the_fast_ar(fish_speech_s2_pro):
    """The Fast AR runs over 11 positions, one more than there are codebooks.

    The configuration allows 11; what runs is in the public implementation: the hidden state and nine codes.
    """
    assert fish_speech_s2_pro.fast["max_seq_len"] == fish_speech_s2_pro.fast["num_codebooks"] + 1
    assert fish_speech_s2_pro.setting("data_flow")["fast_ar_positions"] == fish_speech_s2_pro.fast["max_seq_len"]


@claim("FS-13b", "corrected")
def test_the_fast_ar_has_room_for_every_codebook(fish_speech_s2_pro):
    """The Fast AR has room for a position per codebook."""
    assert fish_speech_s2_pro.fast["max_seq_len"] >= fish_speech_s2_pro.fast["num_codebooks"]


@claim("FS-33", "hypothesis")
def test_the_fast_ar_works_as_much_as_the_slow_ar(fish_speech_s2_pro):
    """Per frame the Fast AR does as much work as the Slow AR, with a tenth of its parameters.

    Multiply-adds with weights: it runs its 4 layers once per codebook, 40 layer passes against 36. Within 10 %.
    """
    assert fish_speech_s2_pro.role_parameters["fast_ar"] < 0.11 * fish_speech_s2_pro.role_parameters["slow_ar"]
    assert 0.9 < fish_speech_s2_pro.work["fast_ar"] / fish_speech_s2_pro.work["slow_ar"] < 1.1
