"""T-17 contrastive trajectories beside T-3 layer swap cost: are layers that commit to a form bound to their place?"""

from fixtures.claims import claim

#: relative depths of the source's layers 24-35 of 36
LATE = (24 / 36, 1)


@claim("T-17.33", "published")
def test_layers_of_commitment_are_expensive_to_swap(contrastive_trajectories, layer_swap_cost):
    """The last third of the layers, where forms are committed to, is more expensive to swap than layers are on average.

    On the source's own figures it is slightly cheaper, and over all layers the excess of synonyms does not go with
    the cost (rank correlation -0.08).
    """
    cost = layer_swap_cost.layer_cost
    late = cost.isel(layer=contrastive_trajectories.layers(*LATE))
    assert late.mean() > cost.mean()
