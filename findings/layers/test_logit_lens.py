"""T-1 logit lens: accuracy, rank and entropy over depth.

The paths of single tokens are in test_logit_lens_tokens.py, early exits in test_logit_lens_exits.py.

Published claims read the published setting (bfloat16 logits, every tie in the target's favour); all
others read the float32 head with mid-ranks wherever it was measured. Slot -1 is the embedding, slot l
the residual stream after layer l; depth is (l + 1) / L.
"""

from fixtures.claims import claim
from lab.statistics.correlations import spearman

ORIGINAL = "qwen3-4b-instruct-2507"
#: Where the source cuts depth into four phases: after layers 12, 21 and 28 of 36.
PHASES = (0, 13 / 36, 22 / 36, 29 / 36, 1)


def test_logit_lens_matches_snapshot(logit_lens, snapshot):
    assert logit_lens == snapshot


# ---- the model's own output


@claim("T-1.1", "published")
def test_last_layer_reproduces_the_greedy_tokens(logit_lens):
    """The last layer predicts 99 % of the model's own greedy tokens, and all of them among its first five."""
    lens = logit_lens.published_setting
    assert lens.top1.sel(slot=lens.last) >= 0.99
    assert lens.top5.sel(slot=lens.last) == 1


@claim("T-1.1b", "corrected")
def test_last_layer_reproduces_nearly_all_greedy_tokens(logit_lens):
    """The last layer predicts at least 97 % of the model's own greedy tokens, and 99.5 % among its first five.

    Not all, because generation and scoring run in different kernels and nearly equal logits swap. Far
    below it the completions are not the model's own, and no other claim here means much.
    """
    assert logit_lens.top1.sel(slot=logit_lens.last) >= 0.97
    assert logit_lens.top5.sel(slot=logit_lens.last) >= 0.995


# ---- accuracy over depth


@claim("T-1.2", "published")
def test_first_half_predicts_hardly_anything(logit_lens):
    """In the first half of the layers the lens is right about at most 1 % of the tokens on average.

    Published as 0.6 %.
    """
    lens = logit_lens.published_setting
    assert lens.early(lens.top1).mean() <= 0.01


@claim("T-1.2b", "corrected")
def test_first_half_predicts_little(logit_lens):
    """In the first half of the layers the lens is right about at most 10 % of the tokens, a quarter of the second half.

    Three pilots gave 1 to 6 %, so that 1 % is not general.
    """
    early = logit_lens.early(logit_lens.top1).mean()
    assert early <= 0.1
    assert early <= logit_lens.late(logit_lens.top1).mean() / 4


@claim("T-1.3", "published")
def test_second_half_predicts_two_fifths(logit_lens):
    """In the second half of the layers the lens is right about 39 % of the tokens on average.

    Its standard deviation over layers is 30 points, so the mean is read as 30 to 60 %.
    """
    lens = logit_lens.published_setting
    assert 0.3 <= lens.late(lens.top1).mean() <= 0.6


@claim("T-1.3b", "corrected")
def test_second_half_predicts_a_good_part(logit_lens):
    """In the second half of the layers the lens is right about 25 to 70 % of the tokens on average.

    Pilots: 35 to 53 %.
    """
    assert 0.25 <= logit_lens.late(logit_lens.top1).mean() <= 0.7


@claim("T-1.5", "published", on=ORIGINAL)
def test_phase_one_is_below_one_percent(logit_lens):
    """Phase 1, layers 0 to 12: the lens is right about less than 1 % of the tokens."""
    assert logit_lens.published_setting.top1.sel(slot=slice(0, 12)).max() < 0.01


@claim("T-1.5b", "corrected")
def test_little_is_predicted_up_to_a_third_of_the_depth(logit_lens, layer):
    """Up to 13/36 of the depth the lens is right about at most 10 % of the tokens."""
    logit_lens.require_depth(layer, *PHASES[0:2])
    assert logit_lens.top1.sel(slot=layer) <= 0.1


@claim("T-1.6", "published", on=ORIGINAL)
def test_phase_two_reaches_six_percent(logit_lens):
    """Phase 2, layers 13 to 21: accuracy goes from 1.1 % to 6.3 %, read as from at least 1 % to at most 7 %."""
    top1 = logit_lens.published_setting.top1
    assert top1.sel(slot=13) >= 0.01
    assert top1.sel(slot=21) <= 0.07


@claim("T-1.6b", "corrected")
def test_less_than_a_third_is_predicted_up_to_three_fifths_of_the_depth(logit_lens, layer):
    """From 13/36 to 22/36 of the depth the lens is right about at most 30 % of the tokens."""
    logit_lens.require_depth(layer, *PHASES[1:3])
    assert logit_lens.top1.sel(slot=layer) <= 0.3


@claim("T-1.7", "published", on=ORIGINAL)
def test_phase_three_rises_to_forty_percent(logit_lens):
    """Phase 3, layers 22 to 28: accuracy rises with every layer, from 11.3 % to 39.7 %."""
    phase = logit_lens.published_setting.top1.sel(slot=slice(22, 28))
    assert phase.diff("slot").min() > 0
    assert abs(phase.sel(slot=22) - 0.113) <= 0.0005
    assert abs(phase.sel(slot=28) - 0.397) <= 0.0005


@claim("T-1.7b", "corrected")
def test_a_tenth_is_gained_in_the_third_phase(logit_lens):
    """From 22/36 to 29/36 of the depth accuracy gains at least 10 points."""
    assert logit_lens.gain_within(*PHASES[2:4]) >= 0.1


@claim("T-1.8", "published", on=ORIGINAL)
def test_phase_four_rises_to_the_output(logit_lens):
    """Phase 4, layers 29 to 35: accuracy rises with every layer, from 47.5 % to 99.5 %."""
    phase = logit_lens.published_setting.top1.sel(slot=slice(29, 35))
    assert phase.diff("slot").min() > 0
    assert abs(phase.sel(slot=29) - 0.475) <= 0.0005
    assert abs(phase.sel(slot=35) - 0.995) <= 0.0005


@claim("T-1.8b", "corrected")
def test_most_is_gained_in_the_last_fifth(logit_lens):
    """Past 29/36 of the depth accuracy gains at least 30 points (pilots: 45 to 64)."""
    assert logit_lens.gain_within(*PHASES[3:5]) >= 0.3


@claim("T-1.9", "published", on=ORIGINAL)
def test_the_knee_lies_at_layers_20_to_22(logit_lens):
    """Accuracy has its knee at layers 20 to 22.

    Read by the chord rule: farthest below the straight line from (0, 0) to the output.
    """
    assert 20 <= logit_lens.published_setting.knee <= 22


@claim("T-1.9b", "corrected")
def test_the_knee_lies_past_the_middle(logit_lens):
    """Accuracy has its knee between half and four fifths of the depth (pilots: 0.56 to 0.67)."""
    assert 0.5 <= logit_lens.depth_of(logit_lens.knee) <= 0.8


@claim("T-1.9c", "control", on=ORIGINAL)
def test_the_curve_bends_most_sharply_at_the_knee(logit_lens):
    """The layer at which accuracy starts to rise faster than before, by most, is at the knee, 20 to 22.

    If phases were more than cuts of a smooth curve, two ways to find their border would agree. The
    data put the largest second difference at layer 29.
    """
    assert 20 <= logit_lens.published_setting.sharpest_bend <= 22


@claim("T-1.10", "corrected", on=ORIGINAL)
def test_no_layer_past_14_lowers_accuracy(logit_lens):
    """No layer from 15 on lowers the accuracy of the lens.

    Our reading of the source's figures; before, only layers 0, 9 and 14 do, the last two by one token of 4,094.
    """
    assert logit_lens.gain.sel(layer=slice(15, None)).min() >= 0


@claim("T-1.10b", "corrected")
def test_layers_past_the_knee_do_not_lower_accuracy(logit_lens, layer):
    """Past three fifths of the depth no layer lowers the accuracy of the lens by more than 2 points.

    2 points are the sampling error of 400 tokens.
    """
    logit_lens.require_depth(layer, 0.6, 1)
    assert logit_lens.gain.sel(layer=layer) >= -0.02


@claim("T-1.30", "published")
def test_the_last_layer_gains_most(logit_lens):
    """The largest gain of accuracy is the last layer's."""
    assert logit_lens.published_setting.layers_by_gain[0] == logit_lens.last


@claim("T-1.30b", "corrected")
def test_the_largest_gain_is_late(logit_lens):
    """The largest gain of accuracy lies past three fifths of the depth.

    Which layer it is depends on the model: Gemma 3 270M gains most at layer 11 of 18, Qwen2.5-Coder at 19 of 24.
    """
    assert logit_lens.depth_of(logit_lens.layers_by_gain[0]) >= 0.6


@claim("T-1.31", "published", on=ORIGINAL)
def test_layer_34_gains_second_most(logit_lens):
    """The second-largest gain of accuracy is layer 34's."""
    assert logit_lens.published_setting.layers_by_gain[1] == 34


@claim("T-1.31b", "corrected", on=ORIGINAL)
def test_order_of_the_four_largest_gains(logit_lens):
    """The largest gains of accuracy are those of layers 35, 32, 33, 34, in this order: layer 34 is fourth."""
    assert logit_lens.layers_by_gain[:4] == [35, 32, 33, 34]


@claim("T-1.32", "published", on=ORIGINAL)
def test_layers_31_and_32_gain_eight_to_ten_points(logit_lens):
    """Layers 31 and 32 gain 8 to 10 points of accuracy each.

    In whole points; the data say 7.7 and 10.4.
    """
    gain = logit_lens.published_setting.gain.sel(layer=[31, 32])
    assert 0.075 <= gain.min() <= gain.max() < 0.105


# ---- entropy


@claim("T-1.4", "published")
def test_entropy_halves_from_the_first_half_to_the_second(logit_lens):
    """The lens's mean entropy in the first half of the layers is at least twice that in the second.

    Published as 7.5 and 3.0 nat. Model-specific: the pilots' ratios are 1.1, 0.8 and 1.7.
    """
    entropy = logit_lens.published_setting.entropy
    assert logit_lens.early(entropy).mean() / logit_lens.late(entropy).mean() >= 2


@claim("T-1.12", "published")
def test_entropy_jumps_at_the_first_layer(logit_lens):
    """Layer 0 raises the lens's entropy by at least 1 nat, from nearly 0 at the embedding.

    Published as from 0.0004 to 4.3 nat.
    """
    entropy = logit_lens.published_setting.entropy
    assert entropy.sel(slot=0) - entropy.sel(slot=-1) >= 1


@claim("T-1.12b", "corrected")
def test_entropy_rises_at_the_first_layer(logit_lens):
    """Layer 0 raises the lens's entropy by at least 0.3 nat (pilots: 0.4 to 4.2)."""
    assert logit_lens.entropy.sel(slot=0) - logit_lens.entropy.sel(slot=-1) >= 0.3


@claim("T-1.13", "published", on=ORIGINAL)
def test_entropy_peaks_in_layers_6_to_8(logit_lens):
    """Entropy peaks in layers 6 to 8. (The pilots peak at layers 28 of 30, 10 of 18, and 2 and 7 of 24.)"""
    assert 6 <= logit_lens.published_setting.entropy.idxmax() <= 8


@claim("T-1.13b", "corrected", on=ORIGINAL)
def test_entropy_has_two_humps(logit_lens):
    """Entropy peaks at 8.36 nat at layer 6, and has a second hump at layer 15.

    "About 8.2 nat in layers 6 to 8" averages 8.36, 8.16 and 7.89.
    """
    entropy = logit_lens.entropy
    assert abs(entropy.max() - 8.36) <= 0.01
    assert entropy.idxmax() == 6
    assert entropy.sel(slot=slice(9, None)).idxmax() == 15


@claim("T-1.37", "corrected", on=ORIGINAL)
def test_entropy_stalls_before_the_last_layer(logit_lens):
    """Entropy stays within 0.01 nat over layers 32 to 34; the last layer alone more than halves it.

    Our reading of the source's figures: accuracy goes from 71 to 89 % meanwhile.
    """
    stalled = logit_lens.entropy.sel(slot=slice(32, 34))
    assert stalled.max() - stalled.min() < 0.01
    assert logit_lens.entropy.sel(slot=35) < logit_lens.entropy.sel(slot=34) / 2


@claim("T-1.37b", "hypothesis")
def test_the_last_layer_sharpens_the_prediction(logit_lens):
    """The last layer more than halves the lens's entropy.

    Model-specific: in the pilots of Qwen2.5-Coder and Gemma 3 it raises the entropy.
    """
    assert logit_lens.entropy.sel(slot=logit_lens.last) < logit_lens.entropy.sel(slot=logit_lens.last - 1) / 2


@claim("T-1.37c", "hypothesis")
def test_the_last_layer_sharpens_where_it_shrinks_the_stream(logit_lens):
    """The last layer lowers the lens's entropy if, and only if, it lowers the norm of the residual stream.

    T-4 sees the norm of the original model drop by a third there. A last layer that removes what all
    tokens have in common would do both.
    """
    before, after = logit_lens.last - 1, logit_lens.last
    norm = logit_lens.variable("residual_norm")
    sharpens = bool(logit_lens.entropy.sel(slot=after) < logit_lens.entropy.sel(slot=before))
    shrinks = bool(norm.sel(slot=after) < norm.sel(slot=before))
    assert sharpens == shrinks


# ---- what the embedding says


@claim("T-1.11", "published")
def test_layer_0_destroys_the_ranking(logit_lens):
    """Layer 0 makes both mean and median rank of the target at least 1.5 times worse than the embedding's.

    Published: mean 77,135 after 41,659.
    """
    lens = logit_lens.published_setting
    assert lens.mean_rank.sel(slot=0) > 1.5 * lens.mean_rank.sel(slot=-1)
    assert lens.median_rank.sel(slot=0) > 1.5 * lens.median_rank.sel(slot=-1)


@claim("T-1.11b", "corrected")
def test_layer_0_worsens_the_median_rank(logit_lens):
    """Layer 0 makes the median rank of the target at least 1.5 times worse than the embedding's.

    The mean is ruled by few tokens of huge ranks. Model-specific: SmolLM2's layer 0 improves it 30-fold.
    """
    assert logit_lens.median_rank.sel(slot=0) > 1.5 * logit_lens.median_rank.sel(slot=-1)


@claim("T-1.14", "published", on=ORIGINAL)
def test_the_embedding_predicts_better_than_layers_0_to_4(logit_lens):
    """The embedding predicts better than each of layers 0 to 4, by mean and median rank and by accuracy."""
    lens = logit_lens.published_setting
    assert lens.recovery(lens.mean_rank, rising=False) > 4
    assert lens.recovery(lens.median_rank, rising=False) > 4
    assert lens.recovery(lens.top10, rising=True) > 4
    assert lens.recovery(lens.top1, rising=True) > 4


@claim("T-1.14b", "corrected", on=ORIGINAL)
def test_how_long_the_embedding_predicts_better_depends_on_the_metric(logit_lens):
    """The first layer better than the embedding is 12 by mean rank, 17 by median, 16 by top-10, 6 by top-1."""
    assert logit_lens.recovery(logit_lens.mean_rank, rising=False) == 12
    assert logit_lens.recovery(logit_lens.median_rank, rising=False) == 17
    assert logit_lens.recovery(logit_lens.top10, rising=True) == 16
    assert logit_lens.recovery(logit_lens.top1, rising=True) == 6


@claim("T-1.15", "published", on=ORIGINAL)
def test_layer_12_is_back_at_the_embedding(logit_lens):
    """The ranking is back at the embedding's level at layer 12 (by mean rank)."""
    lens = logit_lens.published_setting
    assert lens.recovery(lens.mean_rank, rising=False) == 12


@claim("T-1.15b", "control")
def test_recovery_does_not_depend_on_the_metric(logit_lens):
    """By mean rank and by median rank the same layer, or its neighbour, is the first to beat the embedding.

    The source gives layer 12 in its text and layer 17 in its table.
    """
    by_mean = logit_lens.recovery(logit_lens.mean_rank, rising=False)
    assert abs(by_mean - logit_lens.recovery(logit_lens.median_rank, rising=False)) <= 1


@claim("T-1.16", "published")
def test_the_embedding_carries_a_co_occurrence_signal(logit_lens):
    """The embedding predicts more than the repetition of its own token.

    That is what a signal of co-occurrence would be: right about tokens that do not merely repeat the input.
    """
    logit_lens.require_tied_embeddings()
    assert logit_lens.published_setting.top1.sel(slot=-1) > logit_lens.repeat_share + 1e-6


@claim("T-1.16b", "corrected")
def test_a_tied_embedding_predicts_its_own_token(logit_lens):
    """Read at the embedding, a model with tied embeddings is right exactly where the text repeats the input token.

    It predicts the token that it was given, so slot -1 of such a model is no prediction. The gain of the
    final norm can turn the vector away: in Gemma 3 270M accuracy is a quarter of the repeated share.
    """
    logit_lens.require_tied_embeddings()
    assert abs(logit_lens.top1.sel(slot=-1) - logit_lens.repeat_share) <= 1e-6


@claim("T-1.17", "published", on=ORIGINAL)
def test_published_median_ranks(logit_lens):
    """The median rank is 19,414 at layer 12, 3,094 at 17, 69 at 22, 9 at 24, 1 at 28, and 0 from 30 on.

    It is at most 1 first at layer 28, and 0 first at layer 30.
    """
    lens = logit_lens.published_setting
    assert abs(lens.median_rank.sel(slot=[12, 17, 22, 24, 28]) - [19414, 3094, 69, 9, 1]).max() <= 0.5
    assert lens.median_rank.sel(slot=slice(30, None)).max() == 0
    assert lens.first_slot_below(lens.median_rank, 1.5) == 28
    assert lens.first_slot_below(lens.median_rank, 0.5) == 30


@claim("T-1.17b", "corrected")
def test_the_median_token_enters_the_shortlist_late(logit_lens):
    """The median rank falls below 10 between half and 85 % of the depth (original 0.69; pilots 0.67 to 0.80)."""
    assert 0.5 <= logit_lens.depth_of(logit_lens.first_slot_below(logit_lens.median_rank, 10)) <= 0.85


# ---- do neighbouring layers do the same?


@claim("T-1.38", "hypothesis")
def test_layers_that_write_alike_change_the_lens_less(logit_lens):
    """In the first 17/36 of the depth, layers whose update resembles the one before change the lens less.

    The source asks whether layers 0 to 16 do similar or different work. Change is KL(lens after the
    layer || before it), resemblance the mean cosine of the two updates; rank correlation below 0.
    """
    early = slice(1, logit_lens.slot_at(17 / 36))
    change = logit_lens.variable("lens_step_kl").sel(layer=early)
    assert spearman(logit_lens.variable("update_similarity").sel(layer=early), change) < 0


@claim("T-1.38b", "hypothesis")
def test_early_layers_do_different_work(logit_lens):
    """Consecutive updates in the first 17/36 of the depth resemble each other less than later ones do (mean cosine)."""
    border = logit_lens.slot_at(17 / 36)
    similarity = logit_lens.variable("update_similarity")
    assert similarity.sel(layer=slice(1, border)).mean() < similarity.sel(layer=slice(border + 1, None)).mean()
