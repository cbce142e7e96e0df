"""T-1 logit lens: the paths of single tokens. When do they settle, which kinds settle last, which layers hurt them?

Crystallization is the first slot from which the target stays in the lens's top 10. A layer hurts a
token if it worsens a rank that was below 100.
"""

from fixtures.claims import claim, not_applicable
from lab.statistics.correlations import spearman

ORIGINAL = "qwen3-4b-instruct-2507"
#: The classes of the source's table, which leaves white space out.
TABLED = ("content_word", "function_word", "punctuation", "number")
#: Fewer tokens of a class than this decide nothing about it.
ENOUGH_TOKENS = 60


# ---- crystallization


@claim("T-1.18", "published", on=ORIGINAL)
def test_published_crystallization(logit_lens):
    """Tokens crystallize at layer 25.4 on average (median 25, standard deviation 4.8)."""
    lens = logit_lens.published_setting
    assert abs(lens.variable("crystallization_layer_mean") - 25.4) <= 0.1
    assert lens.variable("crystallization_layer_median") == 25
    assert abs(lens.variable("crystallization_layer_std") - 4.8) <= 0.05


@claim("T-1.18b", "corrected")
def test_tokens_crystallize_late(logit_lens):
    """Tokens crystallize between 55 and 85 % of the depth on average (original 0.73; pilots 0.65 to 0.76)."""
    assert 0.55 <= logit_lens.crystallization_depth <= 0.85


@claim("T-1.18c", "corrected", on=ORIGINAL)
def test_crystallization_has_two_modes(logit_lens):
    """Crystallization has two modes, at layers 23 and 29: its mean of 25.4 is typical of neither."""
    histogram = logit_lens.variable("crystallization_histogram")
    assert histogram.idxmax() == 23
    assert histogram.sel(slot=slice(26, None)).idxmax() == 29
    assert histogram.sel(slot=29) > 1.3 * histogram.sel(slot=slice(24, 29)).min()


@claim("T-1.18d", "control")
def test_crystallization_does_not_rest_on_ties(logit_lens):
    """Float32 logits with mid-ranks move mean crystallization by at most 2 % of the depth.

    Most early positions are tied in bfloat16, but a token that crystallizes is far from the ties.
    """
    logit_lens.require_both_settings()
    assert abs(logit_lens.crystallization_depth - logit_lens.published_setting.crystallization_depth) <= 0.02


@claim("T-1.19", "published", on=ORIGINAL)
def test_published_first_top1(logit_lens):
    """Tokens first lead at layer 27.8 on average (median 29)."""
    lens = logit_lens.published_setting
    assert abs(lens.variable("first_top1_layer_mean") - 27.8) <= 0.05
    assert lens.variable("first_top1_layer_median") == 29


@claim("T-1.19b", "corrected")
def test_tokens_first_lead_late(logit_lens):
    """Tokens first lead between 65 and 90 % of the depth on average (original 0.80; pilots 0.72 to 0.81)."""
    assert 0.65 <= logit_lens.first_top1_depth <= 0.9


@claim("T-1.20", "published", on=ORIGINAL)
def test_two_layers_lie_between_shortlist_and_commitment(logit_lens):
    """Between shortlist and commitment lie 2.4 layers, read as 2 to 3.

    The difference of two means that are not comparable: crystallization lasts, a first lead need not.
    """
    lens = logit_lens.published_setting
    assert 2 <= lens.variable("first_top1_layer_mean") - lens.variable("crystallization_layer_mean") <= 3


@claim("T-1.20b", "corrected")
def test_lasting_lead_comes_later_than_the_shortlist(logit_lens):
    """Tokens lead for good at least 5 % of the depth later than they enter the top 10 for good.

    Both events last, and both are taken of the same tokens (pilots: 9 to 21 %).
    """
    assert logit_lens.variable("stable_top1_delay") / logit_lens.n_layers >= 0.05


# ---- kinds of tokens


@claim("T-1.21", "published", on=ORIGINAL)
def test_numbers_crystallize_layers_later(logit_lens):
    """Numbers crystallize at least 3 layers later than content words (published: 4.2)."""
    mean = logit_lens.published_setting.type_crystallization
    assert mean.sel(token_type="number") - mean.sel(token_type="content_word") >= 3


@claim("T-1.21b", "corrected")
def test_numbers_crystallize_later(logit_lens):
    """Numbers crystallize at least 4 % of the depth later than content words."""
    logit_lens.require_tokens("number", ENOUGH_TOKENS)
    mean = logit_lens.type_crystallization
    later = mean.sel(token_type="number") - mean.sel(token_type="content_word")
    assert later / logit_lens.n_layers >= 0.04


@claim("T-1.21c", "control")
def test_numbers_crystallize_later_within_categories(logit_lens):
    """Numbers crystallize later than content words of the same prompt category.

    More than half of the published numbers stand in reasoning prompts, so the category could do it.
    Its support is the bootstrap over prompts: 0.95 means that the lower bound lies above 0.
    """
    logit_lens.require_tokens("number", ENOUGH_TOKENS)
    assert logit_lens.variable("number_delay_within_category") > 0


@claim("T-1.22", "published")
def test_order_of_token_classes(logit_lens):
    """Content words crystallize before function words, these before punctuation, and numbers last.

    Published: 24.9, 25.3, 25.5, 29.1. The first two steps are within the noise of tokens.
    """
    logit_lens.require_tokens("number", ENOUGH_TOKENS)
    mean = logit_lens.published_setting.type_crystallization
    ordered = mean.sel(token_type=["content_word", "function_word", "punctuation", "number"])
    assert ordered.diff("token_type").min() > 0


@claim("T-1.22b", "corrected")
def test_numbers_crystallize_last(logit_lens):
    """Numbers crystallize later than tokens of any other class."""
    logit_lens.require_tokens("number", ENOUGH_TOKENS)
    mean = logit_lens.type_crystallization
    assert mean.sel(token_type="number") > mean.drop_sel(token_type="number").max()


@claim("T-1.23", "published", on=ORIGINAL)
def test_content_words_crystallize_first(logit_lens):
    """Content words crystallize earliest of all tokens.

    White-space tokens, which the source leaves out of its table, are earlier: 24.76 against 24.90.
    """
    assert logit_lens.published_setting.type_crystallization.idxmin() == "content_word"


@claim("T-1.23b", "corrected", on=ORIGINAL)
def test_content_words_crystallize_first_of_the_tabled_classes(logit_lens):
    """Of the source's four classes of tokens, white space aside, content words crystallize earliest.

    At layer 24.9 against 25.3 for function words; the order of the two is not to be expected of other models.
    """
    tabled = logit_lens.published_setting.type_crystallization.sel(token_type=list(TABLED))
    assert tabled.idxmin() == "content_word"


@claim("T-1.24", "published", on=ORIGINAL)
def test_published_ranks_at_layer_32(logit_lens):
    """At layer 32 numbers rank 141 on average, content words 13, function words 4 and punctuation 3."""
    ranks = {kind: logit_lens.published_setting.type_rank(kind).sel(slot=32) for kind in logit_lens.TOKEN_TYPES}
    assert abs(ranks["number"] - 141) <= 0.5
    assert abs(ranks["content_word"] - 13) <= 0.5
    assert abs(ranks["function_word"] - 4) <= 0.5
    assert abs(ranks["punctuation"] - 3) <= 0.5


@claim("T-1.24b", "published", on=ORIGINAL)
def test_all_but_numbers_rank_below_13_at_layer_32(logit_lens):
    """At layer 32 all classes but numbers have a mean rank below 13. (Content words: 13.38.)"""
    ranks = logit_lens.published_setting.variable("token_type_mean_rank").sel(slot=32)
    assert ranks.drop_sel(token_type="number").max() < 13


@claim("T-1.24d", "corrected", on=ORIGINAL)
def test_numbers_rank_ten_times_worse_at_layer_32(logit_lens):
    """At layer 32 the mean rank of numbers is at least ten times that of any other class.

    An order of magnitude: 141.5 against 13.4 for content words, the next.
    """
    ranks = {kind: logit_lens.published_setting.type_rank(kind).sel(slot=32) for kind in logit_lens.TOKEN_TYPES}
    assert ranks.pop("number") >= 10 * max(ranks.values())


@claim("T-1.24c", "corrected")
def test_numbers_rank_worst_near_the_end(logit_lens):
    """At 11/12 of the depth, mean log10(1 + rank) of numbers exceeds that of every other class by at least 0.3.

    A factor of 2 in rank, in a mean that no single token rules.
    """
    logit_lens.require_tokens("number", ENOUGH_TOKENS)
    ranks = logit_lens.variable("token_type_log_rank").sel(slot=logit_lens.slot_at(11 / 12))
    assert ranks.sel(token_type="number") - ranks.drop_sel(token_type="number").max() >= 0.3


@claim("T-1.25", "published", on=ORIGINAL)
def test_numbers_converge_in_the_last_two_layers(logit_lens):
    """Numbers converge only in layers 34 and 35: mean rank above 100 at layer 33, below 1 at layer 34."""
    rank = logit_lens.published_setting.type_rank("number")
    assert rank.sel(slot=33) > 100
    assert rank.sel(slot=34) < 1


@claim("T-1.25b", "corrected")
def test_numbers_settle_no_earlier_than_others(logit_lens):
    """The mean rank of numbers falls below 1 no earlier than that of any other class."""
    logit_lens.require_tokens("number", ENOUGH_TOKENS)
    others = [logit_lens.settled_slot(kind) for kind in logit_lens.TOKEN_TYPES if kind != "number"]
    assert logit_lens.settled_slot("number") >= max(others)


@claim("T-1.26", "published", on=ORIGINAL)
def test_few_numbers_are_right_at_layer_32(logit_lens):
    """Only 14 % of the numbers are right at layer 32.

    The source's summary does not hold this figure.
    """
    accuracy = logit_lens.published_setting.variable("token_type_top1_accuracy").sel(slot=32, token_type="number")
    assert abs(accuracy - 0.14) <= 0.005


@claim("T-1.39", "hypothesis")
def test_reasoning_crystallizes_later(logit_lens):
    """Tokens of reasoning prompts crystallize later than tokens of other prompts.

    Support of 0.95 means that the bootstrap interval over prompts lies above 0.
    """
    own, others = (
        logit_lens.variable("category_crystallization_mean"),
        logit_lens.variable("other_category_crystallization_mean"),
    )
    assert own.sel(category="reasoning") - others.sel(category="reasoning") > 0


@claim("T-1.40", "hypothesis")
def test_late_crystallization_is_uncertainty(logit_lens):
    """Tokens that crystallize late are those that the model is unsure of.

    Rank correlation of crystallization and final surprisal of at least 0.5; then token classes must be
    compared at equal surprisal (T-1.40b).
    """
    assert logit_lens.variable("crystallization_surprisal_correlation") >= 0.5


@claim("T-1.40b", "hypothesis")
def test_numbers_are_late_at_equal_surprisal(logit_lens):
    """Numbers crystallize later than content words of equal final surprisal (tenths of the distribution).

    Token classes are to be compared, so the other side is one class, that of T-1.21. Against all other
    tokens, half of them function words and punctuation, the sign turns in SmolLM2-135M: +3.7 layers,
    but -4.4 against content words.
    """
    logit_lens.require_tokens("number", ENOUGH_TOKENS)
    assert logit_lens.variable("number_delay_at_equal_surprisal") > 0


# ---- layers that hurt


@claim("T-1.27", "published", on=ORIGINAL)
def test_published_ranking_of_hurt(logit_lens):
    """Layers 26, 28, 27, 0 and 24 hurt most tokens: 17.7, 17.3, 15.4, 14.9 and 13.4 %."""
    lens = logit_lens.published_setting
    assert lens.layers_by_hurt[:5] == [26, 28, 27, 0, 24]
    assert abs(lens.hurt_fraction.sel(layer=[26, 28, 27, 0, 24]) - [0.177, 0.173, 0.154, 0.149, 0.134]).max() <= 0.0005


@claim("T-1.28", "published", on=ORIGINAL)
def test_published_profile_of_hurt(logit_lens):
    """Layers 1 to 9 hurt below 2 % of the tokens, 11 to 21 2 to 13 %, 24 to 28 13 to 18 %, those from 32 on below 5 %.

    In whole percents.
    """
    hurt = logit_lens.published_setting.hurt_fraction
    ramp, height = hurt.sel(layer=slice(11, 21)), hurt.sel(layer=slice(24, 28))
    assert hurt.sel(layer=slice(1, 9)).max() < 0.02
    assert 0.015 <= ramp.min() <= ramp.max() < 0.135
    assert 0.125 <= height.min() <= height.max() < 0.185
    assert hurt.sel(layer=slice(32, None)).max() < 0.05


@claim("T-1.28b", "corrected")
def test_risk_of_hurt_falls_with_depth(logit_lens):
    """The share of eligible tokens that a layer hurts falls with depth: rank correlation of at most -0.5.

    The published profile divides by all tokens, although only those of rank below 100 can be hurt: it
    rises because more and more tokens can. Pilots fall from 0.5 and more to about 0.
    """
    rate = logit_lens.conditional_hurt_rate
    known = rate.dropna("layer")
    assert spearman(known, known.layer) <= -0.5


@claim("T-1.28c", "control", on=ORIGINAL)
def test_hurt_rises_without_a_dip(logit_lens):
    """From layer 11 to the height at 26 the share of hurt tokens never falls by more than 2 points.

    The source describes a ramp; its data dip from 12.7 to 6.4 % at layer 22.
    """
    assert logit_lens.hurt_fraction.sel(layer=slice(11, 26)).diff("layer").min() >= -0.02


@claim("T-1.29", "published", on=ORIGINAL)
def test_layer_0_stands_alone_in_hurting(logit_lens):
    """Layer 0 hurts at least 5 times as many tokens as any of layers 1 to 9."""
    hurt = logit_lens.published_setting.hurt_fraction
    assert hurt.sel(layer=0) >= 5 * hurt.sel(layer=slice(1, 9)).max()


@claim("T-1.29b", "hypothesis")
def test_a_hurtful_layer_0_destroys_the_embeddings_ranking(logit_lens):
    """Where layer 0 hurts at least half of the eligible tokens, it also worsens the median rank 1.5-fold.

    The published peak follows from tied embeddings (T-1.16): what is near the input token loses its place.
    """
    rate = float(logit_lens.conditional_hurt_rate.sel(layer=0))
    if not rate >= 0.5:
        not_applicable(f"layer 0 hurts {rate:.0%} of the eligible tokens")
    assert logit_lens.median_rank.sel(slot=0) > 1.5 * logit_lens.median_rank.sel(slot=-1)
