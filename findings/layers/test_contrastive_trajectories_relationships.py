"""T-17 contrastive trajectories: do antonyms diverge otherwise than synonyms?

The source says: more in the first layers ("meaning before form"), less in the last ones. Its groups are not matched;
whether a word is split into tokens differs between them and explains more than the relationship (T-17.21c). Hence
three kinds of evidence: the source's means, tests over its groups, and tests over matched families.
"""

import numpy as np

from fixtures.claims import claim, not_applicable
from lab.statistics.contrasts import group_means

ORIGINAL = "qwen3-4b-instruct-2507"
#: relative depths of the source's layers 0-4, 5-20, 21-23 and 24-35 of 36
EARLY, MIDDLE, TURN, LATE = (0, 5 / 36), (5 / 36, 21 / 36), (21 / 36, 24 / 36), (24 / 36, 1)


@claim("T-17.10", "published", on=ORIGINAL)
def test_signs_over_all_groups(contrastive_trajectories):
    """Over all groups antonyms diverge more at layers 0-3 and 18-23, synonyms at 24-35.

    With 4.1 against 3.0 nat at layer 21, and 1.2 times as much for synonyms at layer 34.
    """
    ratio = contrastive_trajectories.ratio()
    assert ratio[[*range(4), *range(18, 24)]].min() > 1
    assert ratio[24:].max() < 1
    assert abs(contrastive_trajectories.kl("antonym", 21) - 4.1) <= 0.05
    assert abs(contrastive_trajectories.kl("synonym", 21) - 3.0) <= 0.05
    assert abs(1 / ratio[34] - 1.2) <= 0.05


@claim("T-17.10b", "corrected", on=ORIGINAL)
def test_the_layers_between_are_not_mixed(contrastive_trajectories):
    """At layers 4 to 17, called mixed, synonyms diverge more at 13 of 14."""
    assert (contrastive_trajectories.ratio()[4:18] < 1).sum() == 13


@claim("T-17.29", "published", on=ORIGINAL)
def test_overview_of_the_source(contrastive_trajectories):
    """Of 50 groups, antonyms are the exception to the U, and synonyms diverge less up to a crossover at layer 18.

    So the source's overview, about an earlier version of the data.
    """
    assert contrastive_trajectories.variable("group_count").sum() == 50
    antonym = contrastive_trajectories.curve("kl_divergence", "antonym")
    assert antonym[0] <= 2 * antonym.min() or antonym[-1] <= 2 * antonym.min()
    assert contrastive_trajectories.ratio()[:18].min() > 1


@claim("T-17.29b", "corrected", on=ORIGINAL)
def test_overview_of_the_published_data(contrastive_trajectories):
    """Of 111 groups, antonyms have a U too, and layer 18 is where they begin to diverge more than synonyms."""
    assert contrastive_trajectories.variable("group_count").sum() == 111
    antonym = contrastive_trajectories.curve("kl_divergence", "antonym")
    assert antonym[0] > 2 * antonym.min()
    assert antonym[-1] > 2 * antonym.min()
    assert contrastive_trajectories.ratio()[17] < 1 < contrastive_trajectories.ratio()[18]


@claim("T-17.18", "published", on=ORIGINAL)
def test_a_larger_sample_strengthens_the_effects(contrastive_trajectories):
    """From version 2 of the data (groups 0 to 75) to all, the effects grow: 1.16 to 1.19 early, 1.13 to 1.36 late."""
    values, kinds, _, groups = contrastive_trajectories.pairs(prefix="immediate")
    old = groups <= 75
    before = values[old & (kinds == "antonym")].mean(0) / values[old & (kinds == "synonym")].mean(0)
    after = contrastive_trajectories.ratio("immediate")
    assert after[0] > before[0]
    assert 1 / after[34] > 1 / before[34]
    assert abs(before[0] - 1.16) <= 0.01
    assert abs(1 / before[34] - 1.13) <= 0.01


# ---- the first layers


@claim("T-17.11", "published")
def test_antonyms_diverge_more_early(contrastive_trajectories):
    """Without a stem, antonyms diverge more than synonyms in the first seventh of the depth."""
    ratio = contrastive_trajectories.ratio("immediate")
    assert ratio[contrastive_trajectories.layers(*EARLY)].min() > 1


@claim("T-17.11b", "control")
def test_the_early_excess_of_antonyms_is_significant(contrastive_trajectories):
    """The early excess of antonyms survives a permutation test over groups, for KL and for the bounded divergence.

    At one early layer at least, with p < 0.05 after correction for all layers. The source has 48 antonym but 16
    synonym groups; whole groups are permuted, for pairs of one group are not independent.
    """
    early = contrastive_trajectories.layers(*EARLY)
    for name in contrastive_trajectories.divergences:
        assert contrastive_trajectories.contrast(name, "immediate").found(early, sign=1)


@claim("T-17.12", "published")
def test_the_early_excess_is_independent_of_the_prefix(contrastive_trajectories):
    """Meaning is told apart before form: behind a shared stem, too, antonyms diverge more in the first seventh."""
    ratio = contrastive_trajectories.ratio("shared")
    assert ratio[contrastive_trajectories.layers(*EARLY)].min() > 1


@claim("T-17.12b", "corrected", on=ORIGINAL)
def test_the_early_excess_is_reversed_behind_a_stem(contrastive_trajectories):
    """Behind a shared stem, synonyms diverge more than antonyms at layers 0 to 7."""
    assert contrastive_trajectories.ratio("shared")[:8].max() < 1


@claim("T-17.12c", "control")
def test_prefixes_agree_on_the_early_sign(contrastive_trajectories):
    """With and without a stem, the mean early difference of antonyms and synonyms has the same sign.

    An effect of meaning cannot depend on whether the answer begins at once.
    """
    early = contrastive_trajectories.layers(*EARLY)
    immediate, shared = (
        contrastive_trajectories.contrast(prefix=prefix).difference[early].mean() for prefix in ("immediate", "shared")
    )
    assert np.sign(immediate) == np.sign(shared)


# ---- the middle


@claim("T-17.13", "published")
def test_synonyms_diverge_more_in_the_middle(contrastive_trajectories, layer):
    """Without a stem, synonyms diverge more than antonyms from layer 5 to 20 of 36."""
    contrastive_trajectories.require_depth(layer, *MIDDLE)
    assert contrastive_trajectories.ratio("immediate")[layer] < 1


@claim("T-17.13b", "corrected", on=ORIGINAL)
def test_there_are_three_crossovers(contrastive_trajectories):
    """Without a stem there is not one crossover but three: at layers 5, 21 and 24."""
    above = contrastive_trajectories.ratio("immediate") > 1
    assert (np.flatnonzero(above[1:] != above[:-1]) + 1).tolist() == [5, 21, 24]


@claim("T-17.13c", "control")
def test_the_middle_excess_of_synonyms_is_significant(contrastive_trajectories):
    """The excess of synonyms in the middle survives a permutation test over groups at one layer at least."""
    middle = contrastive_trajectories.layers(*MIDDLE)
    assert contrastive_trajectories.contrast(prefix="immediate").found(middle, sign=-1)


@claim("T-17.14", "published")
def test_antonyms_diverge_more_at_the_turn(contrastive_trajectories, layer):
    """Without a stem, antonyms diverge more than synonyms at layers 21 to 23 of 36."""
    contrastive_trajectories.require_depth(layer, *TURN)
    assert contrastive_trajectories.ratio("immediate")[layer] > 1


@claim("T-17.14b", "corrected")
def test_antonyms_diverge_more_beyond_the_middle(contrastive_trajectories):
    """Between half and two thirds of the depth, complete antonyms diverge more than synonyms, by a fifth at some layer.

    Half of the depth included, over both prefixes and significantly, with p < 0.05 after correction for all layers. The
    only effect of the relationship that every cut of the source's data shows; "complete" means that words are whole, as
    in measured families.
    """
    record = contrastive_trajectories
    layers = record.layers_from(0.5, 0.67)
    values, kinds, _, _ = record.pairs(complete=True)
    ratio = values[kinds == "antonym"].mean(0) / values[kinds == "synonym"].mean(0)
    assert ratio[layers].max() > 1.2
    assert record.contrast(complete=True).found(layers, sign=1)


# ---- the last layers


@claim("T-17.15", "published")
def test_synonyms_diverge_more_late(contrastive_trajectories, layer):
    """Without a stem, synonyms diverge more than antonyms in the last third of the depth."""
    contrastive_trajectories.require_depth(layer, *LATE)
    assert contrastive_trajectories.ratio("immediate")[layer] < 1


@claim("T-17.15b", "control")
def test_the_late_excess_of_synonyms_is_significant(contrastive_trajectories):
    """The late excess of synonyms survives a permutation test over groups at one layer at least.

    With p < 0.05 after correction for all layers.
    """
    late = contrastive_trajectories.layers(*LATE)
    assert contrastive_trajectories.contrast(prefix="immediate").found(late, sign=-1)


@claim("T-17.16", "published", on=ORIGINAL)
def test_the_late_excess_grows_up_to_layer_34(contrastive_trajectories):
    """The late excess of synonyms grows and peaks at layer 34."""
    assert 24 + contrastive_trajectories.ratio("immediate")[24:].argmin() == 34


@claim("T-17.16b", "corrected", on=ORIGINAL)
def test_the_late_excess_peaks_at_layer_31(contrastive_trajectories):
    """The late excess of synonyms peaks at layer 31, 1.48 times, and falls to 1.36 at layer 34."""
    excess = 1 / contrastive_trajectories.ratio("immediate")
    assert 24 + excess[24:].argmax() == 31
    assert abs(excess[31] - 1.48) <= 0.005
    assert abs(excess[34] - 1.36) <= 0.005


@claim("T-17.17", "published")
def test_the_late_excess_is_a_commitment_to_form(contrastive_trajectories, layer):
    """The late excess of synonyms is no artefact: it is there if both words end at their pivot.

    The claim is the source's, the condition what it needs: where a word is split, the lens reads its rest. Antonyms
    less synonyms, at equal prefix.
    """
    contrastive_trajectories.require_depth(layer, *LATE)
    assert contrastive_trajectories.contrast(complete=True).difference[layer] < 0


@claim("T-17.17b", "corrected")
def test_complete_antonyms_diverge_more_late(contrastive_trajectories, layer):
    """If both words end at their pivot, antonyms diverge at least as much as synonyms in the last third of the depth.

    By KL and, where it was measured, by the bounded divergence: a model tells words of opposite meaning apart better
    than words of one meaning.
    """
    contrastive_trajectories.require_depth(layer, *LATE)
    for name in contrastive_trajectories.divergences:
        assert contrastive_trajectories.contrast(name, complete=True).difference[layer] >= 0


@claim("T-17.17c", "control")
def test_the_late_excess_of_complete_antonyms_is_significant(contrastive_trajectories):
    """The late excess of complete antonyms survives a permutation test, by KL and by the bounded divergence.

    Over groups, at one layer of the last third at least, with p < 0.05 after correction for all layers.
    """
    late = contrastive_trajectories.layers(*LATE)
    for name in contrastive_trajectories.divergences:
        assert contrastive_trajectories.contrast(name, complete=True).found(late, sign=1)


@claim("T-17.17d", "control")
def test_the_late_sign_is_not_one_of_truth(contrastive_trajectories):
    """The late difference of antonyms and synonyms has the same sign where the antonym is false and where it is not.

    Mean over the last third of the depth, bounded divergence. In the source "antonym" always means "wrong answer".
    """
    record = contrastive_trajectories
    if not record.has("truth"):
        not_applicable("all antonyms of the source are wrong answers")
    late = record.layers(*LATE)
    differences = record.family_differences("js_divergence")[:, late].mean(1, keepdims=True)
    (asserted, opened), _ = group_means(differences, record.rows("truth"))
    assert np.sign(asserted) == np.sign(opened)
