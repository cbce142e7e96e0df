"""T-7 beside T-2, T-3 and T-9: do curved layers matter more, can linear ones be exchanged, do their weights tell?"""

import numpy as np

from fixtures.claims import claim, not_applicable
from lab.statistics.correlations import pearson, spearman

ORIGINAL = "qwen3-4b-instruct-2507"


@claim("T-7.15", "published")
def test_gap_correlates_with_criticality(linearization_gap, layer_knockout):
    """Nonlinear layers are the critical ones: Pearson above 0.3 of the published gap with the knockout loss of T-2."""
    assert pearson(linearization_gap.rounded_gap, layer_knockout.loss_delta) > 0.3


@claim("T-7.15b", "control")
def test_gap_correlates_with_criticality_without_the_first_layer(linearization_gap, layer_knockout):
    """Without layer 0 the published gap still correlates positively with the rise of the loss (published: -0.18)."""
    beyond = slice(1, None)
    gap, damage = (each.isel(layer=beyond) for each in (linearization_gap.rounded_gap, layer_knockout.loss_delta))
    assert pearson(gap, damage) > 0


@claim("T-7.15c", "corrected")
def test_more_curved_layers_are_less_critical(linearization_gap, layer_knockout):
    """In ranks, and without rounding, more curved layers are the less critical ones (de-noised: -0.57, p = 3e-4)."""
    assert spearman(linearization_gap.gap, layer_knockout.loss_delta) < 0


@claim("T-7.32", "published")
def test_cheapest_swaps_lie_on_the_plateau(linearization_gap, layer_swap_cost):
    """The three neighbouring pairs that are cheapest to exchange lie on the linear plateau, at depths 0.22 to 0.5.

    Published: the eight cheapest are all in layers 25 to 33 of 36.
    """
    pairs = layer_swap_cost.neighbours
    cheapest = np.argsort(layer_swap_cost.at(layer_swap_cost.cost, pairs))[:3]
    if linearization_gap.n_layers != layer_swap_cost.n_layers:
        not_applicable("the two records are of models of different depth")
    assert {layer for index in cheapest for layer in pairs[index]} <= set(linearization_gap.plateau)


@claim("T-7.31", "published", on=ORIGINAL)
def test_higher_weight_rank_means_more_linear(linearization_gap, weight_spectra):
    """Layers of higher effective weight rank are the more linear ones: Pearson -0.43 of mean rank ratio and gap.

    The gap is the first version's, which the source correlated; the reported version has -0.396.
    """
    assert abs(pearson(weight_spectra.mean_ratio, linearization_gap.mean("v1_perturbation_gap")) + 0.43) <= 0.01


@claim("T-7.31b", "control")
def test_weight_rank_correlation_is_no_matter_of_one_layer(linearization_gap, weight_spectra):
    """In ranks too, and without rounding, layers of higher weight rank are the more linear ones at 5 %: -2 / sqrt(L).

    Published: Spearman +0.05, and Pearson -0.19 without layer 1: one layer carries the correlation.
    """
    correlation = spearman(weight_spectra.mean_ratio, linearization_gap.gap)
    assert correlation < -2 / np.sqrt(linearization_gap.n_layers)
