"""T-15, training: do a few steps on the norms' own parameters make up for a swap?"""

from fixtures.claims import claim


@claim("T-15.33", "hypothesis")
def test_training_norms_recovers_layer_norm(normalization):
    """Training scales and shifts recovers at least 0.8 of what LayerNorm costs on held-out texts.

    Planned by the source, not run: up to 1000 small steps on completions, everything else frozen; 100 in a quick
    budget. The model's own norms are trained alike, and what that gains is taken off: a model learns the texts' style,
    too. Judged after the steps at which this control's loss is lowest, chosen on the control only: afterwards it learns
    the training texts by heart. Does not apply where the swap costs less than 0.02 nat, which a quick budget cannot
    tell from nothing.
    """
    assert normalization.recovered("layer_norm") >= 0.8


@claim("T-15.33b", "hypothesis")
def test_training_norms_does_not_recover_the_others(normalization):
    """It recovers at most half of what joint group norm and batch norm cost.

    They lack the rescaling of each token, which no scale or shift that is common to all tokens can give back. Judged at
    the step of T-15.33. A loss above a uniform guess's counts as that. A swap that overflows or whose training diverged
    was not trained and is left out; if both are, the claim does not apply.
    """
    assert max(normalization.recovered_of("group_norm_8", "batch_norm").values()) <= 0.5
