"""Layer shuffle recovery: whether the loss identifies the order, and how that relates to what swaps cost (T-3)."""

import numpy as np

from fixtures.claims import claim, not_applicable
from lab.statistics.correlations import spearman_by_order


@claim("LSR-31", "hypothesis")
def test_exchanging_a_layer_with_the_next_raises_the_loss(layer_shuffle_recovery, layer):
    """Exchanging a layer with the next raises the loss on held-out text, by more than three standard errors.

    Prompts are clusters. Where it fails, no search by loss can be relied on to order these two layers.
    """
    if layer == layer_shuffle_recovery.n_layers - 1:
        not_applicable("no layer comes after the last")
    assert layer_shuffle_recovery.neighbour_z[layer] > 3


@claim("LSR-31b", "hypothesis")
def test_the_true_order_is_a_strict_local_optimum(layer_shuffle_recovery):
    """Every exchange of neighbours raises the loss on held-out text, nine tenths by more than three standard errors.

    The condition under which the loss identifies the order, as far as neighbours go.
    """
    assert layer_shuffle_recovery.neighbour_delta.min() > 0
    assert np.mean(layer_shuffle_recovery.neighbour_z > 3) >= 0.9


@claim("LSR-33", "hypothesis")
def test_pairs_that_are_cheap_to_swap_are_confused(layer_shuffle_recovery, layer_swap_cost):
    """Neighbours that are cheap to exchange are those that fingerprints put in the wrong order.

    Spearman's correlation over neighbours of what their swap costs (T-3) with being confused, in any run, is negative.
    A sign only: few pairs are. Confused is what stands against the chain's own direction: one that runs backwards as a
    whole inverts nearly all pairs and confuses few.
    """
    wrong = layer_shuffle_recovery.against_its_direction("activation_flow").mean(axis=0)
    confused = np.diagonal(wrong, offset=1)
    if not 0 < confused.sum() < len(confused):
        not_applicable("fingerprints confuse all neighbours alike")
    costs = layer_swap_cost.at(layer_swap_cost.cost, layer_swap_cost.neighbours)
    assert spearman_by_order(costs, confused) < 0
