"""Layer shuffle recovery: what methods cost, and the counts behind them."""

from fixtures.claims import claim

ORIGINAL = "qwen3-1.7b"


# ---- time and work


@claim("LSR-7", "published", on=ORIGINAL)
def test_the_best_pipeline_takes_19_seconds(layer_shuffle_recovery):
    """Fingerprints and swaps recover all 28 layers in about 19 seconds on a B200, loading not counted."""
    steps = ("activation_flow", "pairwise_bubble")
    assert abs(sum(layer_shuffle_recovery.of("wall_time", step) for step in steps) - 19) <= 0.5
    assert layer_shuffle_recovery.of("position_accuracy", "pairwise_bubble") == 1


@claim("LSR-7b", "hypothesis")
def test_block_exchanges_reach_as_much_with_less_work(layer_shuffle_recovery):
    """Exchanges of blocks recover at least as much order as the published swaps, with less layer work.

    Both race their trials and share beginnings, so the difference is the search's alone. Means over runs.
    """
    layer_shuffle_recovery.require_whole_searches()
    ours, theirs = "block_descent", "pairwise_bubble"
    assert layer_shuffle_recovery.of("kendall_tau", ours) >= layer_shuffle_recovery.of("kendall_tau", theirs)
    assert layer_shuffle_recovery.of("layer_passes", ours) < layer_shuffle_recovery.of("layer_passes", theirs)


@claim("LSR-7c", "hypothesis")
def test_racing_saves_nine_tenths_of_the_forward_passes(layer_shuffle_recovery):
    """Racing trials and sharing their beginnings, swaps cost less than a tenth of a forward pass per trial.

    The published loop takes one pass of all text for each. Racing was expected to save a factor of 10.
    """
    layer_shuffle_recovery.require_whole_searches()
    passes = layer_shuffle_recovery.of("layer_passes", "pairwise_bubble")
    assert layer_shuffle_recovery.of("trial_orders", "pairwise_bubble") / passes > 10


@claim("LSR-8", "published", on=ORIGINAL)
def test_swaps_are_faster_because_they_try_fewer_orders(layer_shuffle_recovery):
    """Swaps are faster than insertions because they try fewer orders: times are in the ratio of trials, within 1 %.

    Two passes each: 1 + 2 * 784 trials against 1 + 2 * 27 + 351, 3.864; times have 3.865.
    """
    slow, fast = "remove_reinsert", "pairwise_bubble"
    times = layer_shuffle_recovery.of("wall_time", slow) / layer_shuffle_recovery.of("wall_time", fast)
    trials = layer_shuffle_recovery.of("trial_orders", slow) / layer_shuffle_recovery.of("trial_orders", fast)
    assert abs(times / trials - 1) <= 0.01


@claim("LSR-8b", "corrected")
def test_swaps_try_fewer_orders_than_insertions(layer_shuffle_recovery):
    """Swaps try fewer orders than insertions."""
    layer_shuffle_recovery.require_whole_searches()
    trials = layer_shuffle_recovery.of("trial_orders", "pairwise_bubble")
    assert trials < layer_shuffle_recovery.of("trial_orders", "remove_reinsert")


@claim("LSR-8c", "corrected")
def test_swaps_cost_less_layer_work_than_insertions(layer_shuffle_recovery):
    """Raced or not, swaps cost less layer work than insertions."""
    layer_shuffle_recovery.require_whole_searches()
    passes = layer_shuffle_recovery.of("layer_passes", "pairwise_bubble")
    assert passes < layer_shuffle_recovery.of("layer_passes", "remove_reinsert")


@claim("LSR-28", "published", on=ORIGINAL)
def test_construction_runs_406_layers(layer_shuffle_recovery):
    """Construction by loss costs 406 forward passes of a single layer; there are 378 pairs of layers.

    L (L + 1) / 2 candidates and L (L - 1) / 2 pairs.
    """
    n = layer_shuffle_recovery.n_layers
    assert layer_shuffle_recovery.stated("greedy_perplexity")["layer_forwards_stated"] == n * (n + 1) / 2 == 406
    assert layer_shuffle_recovery.stated("causal_pairwise")["pairs"] == n * (n - 1) / 2 == 378


@claim("LSR-28b", "corrected", on=ORIGINAL)
def test_construction_runs_434_layers(layer_shuffle_recovery):
    """Construction costs 406 candidates and 28 updates of the stream, 434 layers, beside 406 heads that cost more."""
    n = layer_shuffle_recovery.n_layers
    assert layer_shuffle_recovery.stated("greedy_perplexity")["layer_forwards_counted"] == n * (n + 1) / 2 + n


@claim("LSR-28c", "corrected")
def test_construction_tries_half_the_square_of_layers(layer_shuffle_recovery):
    """Construction by loss tries L (L + 1) / 2 candidates."""
    n = layer_shuffle_recovery.n_layers
    assert layer_shuffle_recovery.of("trial_orders", "greedy_perplexity") == n * (n + 1) / 2


# ---- counts


@claim("LSR-26", "published", on=ORIGINAL)
def test_the_architecture_as_stated(layer_shuffle_recovery):
    """Qwen3-1.7B has 28 layers, 1.7 billion parameters, 3.4 GB in bfloat16, and about 25 million per layer."""
    parameters = layer_shuffle_recovery.mean("parameters_total")
    assert layer_shuffle_recovery.n_layers == 28
    assert abs(parameters / 1e9 - 1.7) <= 0.05
    assert abs(2 * parameters / 1e9 - 3.4) <= 0.05
    assert abs(layer_shuffle_recovery.mean("parameters_per_layer") / 1e6 - 25) <= 2.5


@claim("LSR-26b", "corrected", on=ORIGINAL)
def test_a_layer_has_50_million_parameters(layer_shuffle_recovery):
    """A layer of Qwen3-1.7B has 50,336,000 parameters: its matrices, two norms of 2048 and two of 128.

    The source's text on another model states 50.3 million for the same block.
    """
    gains = 2 * 2048 + 2 * 128
    assert layer_shuffle_recovery.mean("parameters_per_layer") == layer_shuffle_recovery.matrix_parameters + gains


@claim("LSR-26c", "corrected")
def test_the_configuration_tells_the_parameters_of_a_layer(layer_shuffle_recovery):
    """The matrices that the configuration tells of are at least 99 % of a layer's parameters, and no more than all.

    What is left are gains of norms and biases. If it failed, the layer would hold matrices that methods do not name.
    """
    share = layer_shuffle_recovery.matrix_parameters / layer_shuffle_recovery.mean("parameters_per_layer")
    assert 0.99 <= share <= 1


@claim("LSR-27", "published", on=ORIGINAL)
def test_sizes_of_the_features(layer_shuffle_recovery):
    """Features have 4, 128, 4352 and 16,384 numbers per layer: statistics, spectra, gains, fingerprints."""
    of = layer_shuffle_recovery.settings
    features, probe = (layer_shuffle_recovery.stated(part) for part in ("weight_features", "activation_probe"))
    assert len(features["statistics"]) == 4
    assert features["svd_top_k"] * len(features["svd_matrices"]) == 128
    assert 2 * of["hidden_size"] + 2 * of["head_dim"] == 4352
    assert 2 * of["hidden_size"] * len(probe["scales"]) == probe["fingerprint_dim"] == 16_384


@claim("LSR-27b", "corrected")
def test_features_have_the_sizes_of_their_definition(layer_shuffle_recovery):
    """Measured features have the sizes that configuration and definition give: 4, 32 per matrix, 8 per channel.

    At most 32 per matrix, for a small one has fewer singular values.
    """
    sizes, of = layer_shuffle_recovery.mean("feature_size"), layer_shuffle_recovery.settings
    assert sizes.sel(feature="parameter_statistics") == 4
    assert sizes.sel(feature="singular_spectrum") <= 32 * len(of["spectrum_of"])
    assert sizes.sel(feature="activation_fingerprint") == 4 * 2 * of["hidden_size"]


# ---- calibration text


@claim("LSR-29", "published")
def test_calibration_text_is_the_models_own(layer_shuffle_recovery):
    """Text like that of calibration is in distribution: every scored token of the held-out text is the model's own.

    The source says it of its calibration text. Measured is the share in the held-out text, which is made in the same
    way, and cut to a length of its own. Question and completion are scored alike, by the source and here.
    """
    assert layer_shuffle_recovery.mean("own_token_share") == 1


@claim("LSR-29b", "corrected")
def test_own_text_is_nearer_to_the_model_than_the_question(layer_shuffle_recovery):
    """The loss on the model's own text is below that on the question, with the layers in order."""
    assert layer_shuffle_recovery.mean("own_loss") < layer_shuffle_recovery.mean("question_loss")


@claim("LSR-29c", "published", on=ORIGINAL)
def test_calibration_text_is_not_padded(layer_shuffle_recovery):
    """No calibration text is padded: the shortest has more than the 256 tokens to which all are cut."""
    text = layer_shuffle_recovery.stated("calibration")
    assert text["shortest_text_tokens"] > text["max_tokens"]
    assert text["padding_share"] == 0
