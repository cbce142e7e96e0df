"""T-1 logit lens: what would be lost if tokens left the network before its end?"""

from fixtures.claims import claim, not_applicable

ORIGINAL = "qwen3-4b-instruct-2507"


@claim("T-1.33", "published", on=ORIGINAL)
def test_the_last_four_layers_gain_from_61_percent(logit_lens):
    """Layers 32 to 35 lift accuracy from 61 % to 99.5 %."""
    top1 = logit_lens.published_setting.top1
    assert abs(top1.sel(slot=31) - 0.61) <= 0.005
    assert abs(top1.sel(slot=35) - 0.995) <= 0.0005


@claim("T-1.33b", "corrected")
def test_the_last_ninth_gains_a_quarter(logit_lens):
    """The last ninth of the depth gains at least 25 points of accuracy (pilots: 33 to 57)."""
    assert logit_lens.gain_within(8 / 9, 1) >= 0.25


@claim("T-1.34", "published", on=ORIGINAL)
def test_leaving_before_layer_32_loses_nearly_forty_percent(logit_lens):
    """Leaving before layer 32 loses nearly 40 % of the accuracy, read as 35 to 42 %."""
    top1 = logit_lens.published_setting.top1
    assert 0.35 <= 1 - top1.sel(slot=31) / top1.sel(slot=35) <= 0.42


@claim("T-1.34b", "corrected")
def test_leaving_at_eight_ninths_loses_a_quarter(logit_lens):
    """Leaving at 8/9 of the depth loses at least 25 % of the accuracy (pilots: 33 to 57 %).

    The most general claim of this experiment.
    """
    top1 = logit_lens.top1
    assert 1 - top1.sel(slot=logit_lens.slot_at(8 / 9)) / top1.sel(slot=logit_lens.last) >= 0.25


@claim("T-1.35", "published", on=ORIGINAL)
def test_a_confidence_based_exit_at_layer_32_is_right_71_percent(logit_lens):
    """A confidence-based exit at layer 32 would get 71 % right.

    The figure is that of a fixed exit for all tokens; no rule of confidence was measured.
    """
    assert abs(logit_lens.published_setting.top1.sel(slot=32) - 0.71) <= 0.005


@claim("T-1.35b", "hypothesis")
def test_confident_exits_are_right(logit_lens):
    """Tokens that leave at 11/12 of the depth because their lens is more than 90 % sure are right 9 times of 10."""
    accuracy = logit_lens.variable("confident_accuracy").sel(slot=logit_lens.slot_at(11 / 12))
    if logit_lens.variable("confident_fraction").sel(slot=logit_lens.slot_at(11 / 12)) == 0:
        not_applicable("no token is that sure at 11/12 of the depth")
    assert accuracy >= 0.9


@claim("T-1.35c", "hypothesis")
def test_confident_exits_are_worth_while(logit_lens):
    """At 11/12 of the depth the lens is more than 90 % sure of at least a quarter of the tokens."""
    assert logit_lens.variable("confident_fraction").sel(slot=logit_lens.slot_at(11 / 12)) >= 0.25


@claim("T-1.36", "published", on=ORIGINAL)
def test_layer_29_could_draft(logit_lens):
    """Predictions at layer 29 could serve as drafts: 47.5 % are right, read as at least 45 %.

    The number only; nothing was drafted.
    """
    assert logit_lens.published_setting.top1.sel(slot=29) >= 0.45


@claim("T-1.36b", "corrected")
def test_five_sixths_of_the_depth_could_draft(logit_lens):
    """At 5/6 of the depth the lens is right about at least 30 % of the tokens (pilots: 39 to 64 %)."""
    assert logit_lens.top1.sel(slot=logit_lens.slot_at(5 / 6)) >= 0.3
