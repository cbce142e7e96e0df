"""T-2 activation patching: is the layer that moves the answer the layer that hurts most when skipped?

The source announces this analysis and holds no figure of it; every claim here is a question of our own.
"""

from itertools import combinations

import numpy as np

from fixtures.claims import claim, not_applicable
from lab.statistics.correlations import spearman
from lab.statistics.depth import label_of_largest


def test_activation_patching_matches_snapshot(activation_patching, snapshot):
    assert activation_patching == snapshot


@claim("T-2.31", "hypothesis")
def test_the_causal_bottleneck_is_the_most_critical_layer(activation_patching, layer_knockout):
    """The layer whose clean update restores most of the answer is the layer whose skipping hurts most.

    Expected to fail: skipping an early layer breaks the format that all later layers read, patching
    finds where the information that decides is moved. Where layer 0 wins both, patching finds the
    changed words themselves, which its clean update carries (it restores 1.00 in SmolLM2-135M and in
    Qwen2.5-Coder-0.5B): T-2.31b leaves it out.
    """
    assert activation_patching.causal_bottleneck_layer == layer_knockout.layers_by_damage[0]


@claim("T-2.31b", "hypothesis")
def test_beyond_the_first_layer_the_bottleneck_is_the_most_critical_layer(activation_patching, layer_knockout):
    """Without layer 0, the layer whose clean update restores most is the layer whose skipping hurts most.

    Layer 0 turns tokens into features: its clean update carries the changed words themselves.
    """
    most_critical = label_of_largest(layer_knockout.loss_delta.isel(layer=slice(1, None)))
    assert activation_patching.later_bottleneck_layer == most_critical


@claim("T-2.32", "hypothesis")
def test_families_share_the_bottleneck(activation_patching):
    """Facts, grammar and arithmetic share the layer whose clean update restores most, within two layers.

    Where that is layer 0 the families share no more than the way in: its clean update carries the
    changed words themselves, whatever they are about. T-2.32c leaves it out.
    """
    bottlenecks = [family.causal_bottleneck_layer for family in activation_patching.families.values()]
    assert max(bottlenecks) - min(bottlenecks) <= 2


@claim("T-2.32b", "hypothesis")
def test_families_share_the_profile_of_recovery(activation_patching):
    """The recovery profiles of any two of facts, grammar and arithmetic correlate at least 0.5 in rank."""
    profiles = [family.update_recovery for family in activation_patching.families.values()]
    assert min(spearman(first, second) for first, second in combinations(profiles, 2)) >= 0.5


@claim("T-2.32c", "control")
def test_families_share_the_bottleneck_beyond_the_first_layer(activation_patching):
    """Without layer 0, facts, grammar and arithmetic share the layer that restores most, within two layers.

    The layer whose clean update does; the tolerance is that of T-2.32.
    """
    bottlenecks = [family.later_bottleneck_layer for family in activation_patching.families.values()]
    assert max(bottlenecks) - min(bottlenecks) <= 2


@claim("T-2.33", "hypothesis")
def test_the_answer_is_handed_over_in_mid_depth(activation_patching):
    """The last position takes over from the changed words between 40 and 85 % of the depth.

    Before the handover, patching the changed words restores more; after it, patching the last position.
    """
    assert 0.4 <= activation_patching.handover_depth <= 0.85


@claim("T-2.33b", "hypothesis")
def test_arithmetic_is_handed_over_later_than_facts(activation_patching):
    """Arithmetic is handed over deeper than facts.

    T-1 suggests it: there, numbers crystallize some layers after words.
    """
    assert activation_patching.of("arithmetic").handover_depth > activation_patching.of("factual").handover_depth


@claim("T-2.33c", "hypothesis")
def test_the_answer_is_handed_over_before_tokens_crystallize(activation_patching, logit_lens):
    """The answer is handed over no deeper than the layer at which tokens crystallize on average.

    What decides must have arrived before the prediction can settle, so handover should come first; an
    order needs no threshold. The texts differ: minimal pairs there, the model's completions here. So a
    failure may say no more than that many tokens settle without anything from afar.
    """
    crystallized = logit_lens.variable("crystallization_layer_mean")
    assert activation_patching.handover_layer <= crystallized


@claim("T-2.34", "hypothesis")
def test_recovery_predicts_criticality(activation_patching, layer_knockout):
    """Beyond layer 0, layers that restore more also hurt more when skipped: rank correlation of at least 0.5."""
    beyond = slice(1, None)
    recovery, damage = activation_patching.update_recovery, layer_knockout.loss_delta
    assert spearman(recovery.isel(layer=beyond), damage.isel(layer=beyond)) >= 0.5


@claim("T-2.34b", "control")
def test_restoring_and_corrupting_an_update_agree(activation_patching):
    """Layers whose clean update restores the answer are those whose corrupted update destroys it.

    Rank correlation of at least 0.7 between the two directions of patching; where they disagree, other
    layers make up for the loss, and neither direction alone says what a layer does.
    """
    if np.ptp(activation_patching.update_recovery.values) == 0:
        not_applicable("no layer's update makes a difference")
    assert spearman(activation_patching.update_recovery, activation_patching.update_damage) >= 0.7
