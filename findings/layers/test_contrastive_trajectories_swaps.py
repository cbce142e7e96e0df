"""T-17 contrastive trajectories beside T-3 layer swap cost: are layers that commit to a form bound to their place?"""

from fixtures.claims import claim
from lab.statistics.correlations import spearman_by_order

#: relative depths of the source's layers 24-35 of 36
LATE = (24 / 36, 1)


@claim("T-17.33", "published")
def test_layers_of_commitment_are_expensive_to_swap(contrastive_trajectories, layer_swap_cost):
    """The last third of the layers, where forms are committed to, is more expensive to swap than layers are on average.

    Compared are mean costs alone, of the last third and of all layers; how far synonyms exceed antonyms is not read,
    that is T-17.33b. On the source's own figures the last third is slightly cheaper.
    """
    cost = layer_swap_cost.layer_cost
    late = cost.isel(layer=contrastive_trajectories.layers(*LATE))
    assert late.mean() > cost.mean()


@claim("T-17.33b", "hypothesis")
def test_the_excess_of_synonyms_goes_with_the_cost_of_swaps(contrastive_trajectories, layer_swap_cost):
    """The more synonyms diverge beside antonyms, the more expensive a layer is to swap: rank correlation above 0.

    Over all layers, without a stem, KL of synonyms less that of antonyms against a layer's mean swap cost. A sign only;
    on the source's own figures it is -0.08 (p = 0.66).
    """
    synonym, antonym = (
        contrastive_trajectories.curve("kl_divergence", kind, "immediate") for kind in ("synonym", "antonym")
    )
    assert spearman_by_order(synonym - antonym, layer_swap_cost.layer_cost) > 0
