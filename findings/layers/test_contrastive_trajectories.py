"""T-17 contrastive trajectories: two answers at their pivot, as vectors.

How their next-token distributions diverge is in test_contrastive_trajectories_divergence.py, what the kind of
difference does in test_contrastive_trajectories_relationships.py. Other experiments come in through
test_contrastive_trajectories_geometry.py (T-4), test_contrastive_trajectories_linearity.py (T-7) and
test_contrastive_trajectories_swaps.py (T-3).

Published figures are means over unmatched pairs of 111 groups; measured subjects read matched families. Slot -1 is the
embedding, slot l the residual stream after layer l; depth is (l + 1) / L.
"""

import numpy as np

from fixtures.claims import claim, not_applicable
from lab.corpora.contrastive_groups import RELATIONSHIPS

ORIGINAL = "qwen3-4b-instruct-2507"
#: layers 2 to 34 of 36, where shared antonyms are said to stay alike
ALIKE = (2 / 36, 35 / 36)


def test_contrastive_trajectories_matches_snapshot(contrastive_trajectories, snapshot):
    assert contrastive_trajectories == snapshot


# ---- the instrument


@claim("T-17.35", "published")
def test_states_before_the_pivot_are_identical(contrastive_trajectories):
    """Before the first token that differs, both sequences have the same states: cosine of at least 0.9999.

    Nothing in a causal model looks to the right. A model that fails is not causal, or was padded wrongly, and no
    other claim here means anything.
    """
    assert contrastive_trajectories.variable("cosine_last_shared_min") >= 0.9999


# ---- cosine over depth


@claim("T-17.1", "published")
def test_cosine_is_an_inverted_u(contrastive_trajectories):
    """The cosine at the pivot rises and falls with depth for every relationship.

    Read as: the largest value after a layer other than the last is 0.3 above the embedding's and 0.15 above the
    last layer's. For unrelated pairs of the source the peak is at layer 34, so that it is rather a plateau.
    """
    record = contrastive_trajectories
    for relationship in RELATIONSHIPS:
        assert record.interior_peak(relationship) > record.cosine(relationship, -1) + 0.3
        assert record.interior_peak(relationship) > record.cosine(relationship, record.last) + 0.15


@claim("T-17.1b", "corrected")
def test_cosine_rises_and_falls(contrastive_trajectories):
    """The cosine rises by 0.2 above the embedding's and falls by 0.1 at the last layer, for every relationship.

    Small models have less room: their embeddings are more alike to begin with.
    """
    record = contrastive_trajectories
    for relationship in RELATIONSHIPS:
        assert record.interior_peak(relationship) > record.cosine(relationship, -1) + 0.2
        assert record.interior_peak(relationship) > record.cosine(relationship, record.last) + 0.1


@claim("T-17.2", "published")
def test_cosine_orders_the_relationships(contrastive_trajectories, layer):
    """Antonyms and synonyms are more alike than registers, and registers more than unrelated answers."""
    ant, syn, style, unrelated = (contrastive_trajectories.cosine(kind, layer) for kind in RELATIONSHIPS)
    assert min(ant, syn) > style > unrelated


@claim("T-17.2b", "corrected")
def test_cosine_orders_the_relationships_nearly_everywhere(contrastive_trajectories):
    """At 80 % of the depths antonyms and synonyms are more alike than registers, and those than unrelated answers.

    On the source's figures registers fall below unrelated answers once, at layer 34 of 36.
    """
    record = contrastive_trajectories

    def ordered(slot):
        ant, syn, style, unrelated = (record.cosine(kind, slot) for kind in RELATIONSHIPS)
        return min(ant, syn) > style > unrelated

    assert record.share_of_slots(ordered) >= 0.8


@claim("T-17.2c", "hypothesis")
def test_matched_synonyms_are_most_alike(contrastive_trajectories):
    """Behind one prompt, synonyms are more alike than antonyms, and those than unrelated words, at 80 % of the depths.

    Only matched words can tell: the source's antonyms and synonyms answer different prompts.
    """
    record = contrastive_trajectories
    if not record.has("cosine_similarity"):
        not_applicable("the published groups are not matched")

    def ordered(slot):
        return record.cosine("synonym", slot) > record.cosine("antonym", slot) > record.cosine("unrelated", slot)

    assert record.share_of_slots(ordered) >= 0.8


@claim("T-17.2d", "corrected")
def test_centred_cosine_tells_meaning_from_none(contrastive_trajectories):
    """Without the layer's mean vector, antonyms and synonyms are more alike than unrelated words at 80 % of the depths.

    A raw cosine is ruled by the direction that all residual streams share: in Gemma 3 270M antonyms have 0.94 to 0.99
    from layer 1 on, and words of different prompts hardly less. Not published.
    """
    antonym, synonym, unrelated = map(contrastive_trajectories.centred_cosine, ("antonym", "synonym", "unrelated"))
    assert (np.minimum(antonym, synonym) > unrelated).mean() >= 0.8


@claim("T-17.3", "published")
def test_unrelated_answers_are_farthest_apart(contrastive_trajectories, layer):
    """The normalized distance mirrors the cosine: unrelated answers are farthest apart throughout."""
    distances = {kind: contrastive_trajectories.distance(kind, layer) for kind in RELATIONSHIPS}
    assert max(distances, key=distances.__getitem__) == "unrelated"


@claim("T-17.3b", "corrected")
def test_unrelated_answers_are_mostly_farthest_apart(contrastive_trajectories):
    """Unrelated answers are farthest apart at 80 % of the depths.

    "Throughout" fails at layer 34 of the original, where two registers are farther apart.
    """
    record = contrastive_trajectories

    def farthest(slot):
        return max(RELATIONSHIPS, key=lambda kind: record.distance(kind, slot)) == "unrelated"

    assert record.share_of_slots(farthest) >= 0.8


@claim("T-17.27", "published", on=ORIGINAL)
def test_ranges_of_the_cosine(contrastive_trajectories):
    """From layer 0 to 34 the cosine ranges from 0.54 to 0.75 for antonyms and from 0.51 to 0.77 for synonyms."""
    antonym, synonym = (contrastive_trajectories.curve("cosine_similarity", kind)[1:-1] for kind in RELATIONSHIPS[:2])
    assert abs(antonym.min() - 0.54) <= 0.005
    assert abs(antonym.max() - 0.75) <= 0.005
    assert abs(synonym.min() - 0.51) <= 0.005
    assert abs(synonym.max() - 0.77) <= 0.005


# ---- single pairs


@claim("T-17.25", "published")
def test_traces_of_single_pairs_vary(contrastive_trajectories):
    """Single pairs differ widely: a standard deviation of 0.1 between antonym pairs in the middle of the depth."""
    spread = contrastive_trajectories.spread("cosine_similarity", "antonym")
    assert spread[1:][contrastive_trajectories.layers(0.45, 0.5)].max() >= 0.1


@claim("T-17.25b", "hypothesis")
def test_some_antonyms_come_apart(contrastive_trajectories):
    """Some antonym pair falls to a cosine of 0.35 or less somewhere between the first layer and the last but one.

    The source says so of its 67 pairs; their cosines are not among the published figures.
    """
    assert contrastive_trajectories.cosine_traces("antonym")[:, 1:-1].min() <= 0.35


@claim("T-17.26", "published")
def test_antonyms_are_more_consistently_alike(contrastive_trajectories):
    """Between layers 5 and 34 of 36, more antonym than synonym cells of the heat map reach a cosine of 0.6.

    The source's difference is small, 72 to 68 %, and its single pairs are not among the published figures.
    """
    record = contrastive_trajectories
    middle = record.layers(5 / 36, 35 / 36)
    antonym, synonym = (record.cosine_traces(kind)[:, 1:][:, middle] >= 0.6 for kind in ("antonym", "synonym"))
    assert antonym.mean() > synonym.mean()


@claim("T-17.30", "hypothesis")
def test_antonyms_have_an_onset(contrastive_trajectories):
    """At some layer the antonyms' mean cosine falls two standard deviations below the synonyms'.

    Planned by the source as the onset of divergence; its program prints it, its text is silent. On the published
    figures the gap never exceeds 1.1 standard deviations.
    """
    onsets = [contrastive_trajectories.onset(prefix) for prefix in ("immediate", "shared")]
    assert any(onset is not None for onset in onsets)


@claim("T-17.30b", "hypothesis")
def test_the_choice_is_made_in_the_second_half(contrastive_trajectories):
    """Before the pivot, the preference between anchor and antonym settles in the second half of the depth (median).

    What an onset should mean: from this layer on the sign of ln p(anchor) - ln p(antonym) no longer changes. A late
    median alone is no sign of a choice: with 30 layers random signs, each layer's independent of the others', settle at
    0.98, and those of a random walk at about 0.4. T-17.30d sets it against the former.
    """
    assert np.median(contrastive_trajectories.commitment_depths("antonym")) > 0.5


@claim("T-17.30d", "control")
def test_the_choice_is_kept_longer_than_by_chance(contrastive_trajectories):
    """Before the pivot, the preference settles earlier than if the layers before the last were in random order (mean).

    Each family keeps the number of layers that disagree with its last one. If it failed, "settles" would mean no more
    than that the last layers happen to agree. It excludes signs that are independent from layer to layer, and not a
    slow drift of the margin without a choice, which passes as well.
    """
    by_chance = contrastive_trajectories.commitment_by_chance("antonym")
    assert contrastive_trajectories.commitment_depths("antonym").mean() < by_chance.mean()


@claim("T-17.30c", "hypothesis")
def test_the_right_word_is_preferred(contrastive_trajectories):
    """Where the antonym is false, the model prefers the anchor to it in two thirds of the cases.

    If it does not, the subject does not know the answers, and "antonym" does not mean "false" to it.
    """
    assert contrastive_trajectories.preferred_share("antonym", "asserted") >= 2 / 3


# ---- context against token


@claim("T-17.22", "published")
def test_shared_antonyms_stay_alike(contrastive_trajectories, layer):
    """Context dominates: behind a shared stem, antonyms keep a cosine above 0.63 from layer 2 to 34 of 36."""
    contrastive_trajectories.require_depth(layer, *ALIKE)
    assert contrastive_trajectories.cosine("antonym", layer, "shared") > 0.63


@claim("T-17.22b", "corrected")
def test_shared_antonyms_are_more_alike_than_strangers(contrastive_trajectories, layer):
    """Behind a shared stem, antonyms are more alike than words of other prompts, by 0.15 from 10 to 95 % of the depth.

    A raw cosine is ruled by the direction that all residual streams share. The excess over other prompts is what the
    context leaves; with T-4's mean cosine it is 0.24 to 0.37 on the original (T-17.22c).
    """
    contrastive_trajectories.require_depth(layer, 0.1, 0.95)
    assert contrastive_trajectories.cosine_excess("antonym", "shared")[layer + 1] > 0.15


@claim("T-17.23", "published", on=ORIGINAL)
def test_shared_antonyms_stay_above_072(contrastive_trajectories):
    """Behind a shared stem, antonyms keep a cosine above 0.72 from layer 2 to 34.

    So the source's overview, about an earlier version of the data; T-17.22 is what the figures hold.
    """
    curve = contrastive_trajectories.curve("cosine_similarity", "antonym", "shared")
    assert curve[1:][2:35].min() > 0.72


@claim("T-17.24", "published")
def test_the_last_layer_drives_completions_apart(contrastive_trajectories):
    """The last layer lowers the mean cosine of every relationship."""
    record = contrastive_trajectories
    for relationship in RELATIONSHIPS:
        assert record.cosine(relationship, record.last) < record.cosine(relationship, record.last - 1)


@claim("T-17.24b", "corrected")
def test_the_last_layer_drives_nearly_all_pairs_apart(contrastive_trajectories):
    """The last layer lowers the cosine of 90 % of the word pairs, and the mean by 0.1 in every relationship."""
    record = contrastive_trajectories
    for relationship in RELATIONSHIPS:
        assert record.cosine(relationship, record.last - 1) - record.cosine(relationship, record.last) >= 0.1
    if record.has("cosine_similarity"):
        assert record.falling_share() >= 0.9


@claim("T-17.24c", "control")
def test_the_last_layer_drives_centred_states_apart(contrastive_trajectories):
    """Without the layer's mean vector, too, the last layer lowers the cosine of antonyms and of synonyms.

    A last block that merely takes off the common direction (an outlier of the norm) would fail here.
    """
    for relationship in ("antonym", "synonym"):
        before, after = contrastive_trajectories.centred_cosine(relationship)[-2:]
        assert after < before


# ---- alignment of whole completions


@claim("T-17.8", "published", on=ORIGINAL)
def test_antonym_alignment_stays_high(contrastive_trajectories, layer):
    """Antonym completions keep a linear CKA above 0.85 up to layer 34."""
    contrastive_trajectories.require_depth(layer, 0, 35 / 36)
    assert contrastive_trajectories.curve("linear_cka", "antonym")[layer + 1] > 0.85


@claim("T-17.8b", "corrected", on=ORIGINAL)
def test_antonym_alignment_never_reaches_085(contrastive_trajectories):
    """Antonym completions never reach a linear CKA of 0.85, and end at 0.70.

    0.85 was left over from an earlier version of the data, which held the 19 shared groups only.
    """
    curve = contrastive_trajectories.curve("linear_cka", "antonym")[1:]
    assert curve.max() < 0.85
    assert abs(curve[-1] - 0.70) <= 0.005


@claim("T-17.9", "published", on=ORIGINAL)
def test_synonyms_align_better(contrastive_trajectories, layer):
    """From layer 6 to 29 synonym completions have a higher linear CKA than antonym completions.

    True of the figures and an artefact: completions of one token have no CKA, and the source puts their cosine in
    its place. They are most of the antonyms.
    """
    contrastive_trajectories.require_depth(layer, 6 / 36, 30 / 36)
    synonym, antonym = (
        contrastive_trajectories.curve("linear_cka", kind)[layer + 1] for kind in ("synonym", "antonym")
    )
    assert synonym > antonym


@claim("T-17.9b", "control")
def test_alignment_of_short_completions_measures_nothing(contrastive_trajectories):
    """On texts of different contents and 8 to 16 tokens, the published CKA is above 0.5 and the unbiased one below.

    Means over depth, of completions that differ from the first token on. Unrelated texts should have 0; the published
    estimator cannot say so with fewer tokens than dimensions.
    """
    record = contrastive_trajectories
    assert record.style_alignment("linear_cka", strangers=True)[1:].mean() > 0.5
    assert record.style_alignment("unbiased_cka", strangers=True)[1:].mean() < 0.5


@claim("T-17.9c", "hypothesis")
def test_registers_align_by_content(contrastive_trajectories):
    """By unbiased CKA, one content in two registers is better aligned than two contents, at 80 % of the depths."""
    record = contrastive_trajectories
    same, others = (record.style_alignment("unbiased_cka", strangers=strangers) for strangers in (False, True))
    assert (same > others)[1:].mean() >= 0.8
