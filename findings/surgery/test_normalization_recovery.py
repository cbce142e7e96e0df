"""T-15, training: do a few steps on the norms' own parameters make up for a swap?"""

from fixtures.claims import claim


@claim("T-15.33", "hypothesis")
def test_training_norms_recovers_layer_norm(normalization):
    """Training scales and shifts recovers at least 0.8 of what LayerNorm costs on held-out texts.

    Planned by the source, not run: up to 1000 small steps on completions, everything else frozen; 100 in a quick
    budget. The model's own norms are trained alike, and what that gains is taken off: a model learns the texts' style,
    too.
    """
    assert normalization.recovered("layer_norm") >= 0.8


@claim("T-15.33b", "hypothesis")
def test_training_norms_does_not_recover_the_others(normalization):
    """It recovers at most half of what joint group norm and batch norm cost.

    They lack the rescaling of each token, which no scale or shift that is common to all tokens can give back.
    """
    assert normalization.recovered("group_norm_8") <= 0.5
    assert normalization.recovered("batch_norm") <= 0.5
