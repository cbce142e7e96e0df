"""T-7 layer linearization gap: how curved layers are around each input, and how much of the published gap is rounding.

Published claims speak of the published setting (bfloat16, central differences, completion tokens alone), their
corrected siblings of the float32 gap with exact derivatives in full context. Of the published figures the latter
exists as an estimate only: the noise-free part of a two-parameter fit to five sizes of the move.
"""

import numpy as np

from fixtures.claims import claim, not_applicable

ORIGINAL = "qwen3-4b-instruct-2507"


def test_linearization_gap_matches_snapshot(linearization_gap, snapshot):
    assert linearization_gap == snapshot


def ends(record, gap):
    """Means of a gap over the first two layers, and at the last one."""
    return record.mean_at(gap, [0, 1]), record.mean_at(gap, [record.n_layers - 1])


# ---- is it curvature at all


@claim("T-7.4", "control")
def test_published_gap_vanishes_with_the_move(linearization_gap, layer):
    """In the published setting a tenth of the move leaves at most 0.3 of the gap, as smoothness demands.

    Of a smooth function the gap falls in proportion to the move: 0.1. What does not fall is rounding: layer(x) - x is
    formed in bfloat16, which rounds the state itself. Published: it grows threefold to fivefold, in all 36 layers.
    """
    gap = linearization_gap.rounded_gap_by_eps.sel(layer=layer)
    assert gap.sel(eps=0.005) <= 0.3 * gap.sel(eps=0.05)


@claim("T-7.4b", "control")
def test_float32_gap_vanishes_with_the_move(linearization_gap, layer):
    """In float32 a tenth of the move leaves at most 0.3 of the gap.

    The gate: where this fails, noise rules the float32 gap too, and the claims about it do not apply.
    """
    gap = linearization_gap.gap_by_eps.sel(layer=layer)
    assert gap.sel(eps=0.005) <= 0.3 * gap.sel(eps=0.05)


@claim("T-7.5", "published")
def test_order_of_the_nonlinearity_rises_with_depth(linearization_gap, layer):
    """The order of the nonlinearity is 0.3 to 1.0 in the first sixth of the layers and 1.5 to 2.0 in the last third.

    Layers 0 to 5 and 25 to 35 of 36. No stored array supports the second half: the orders are 0.38 to 0.56
    everywhere, and an order below 1 says that the gap grows as the move shrinks.
    """
    order = linearization_gap.mean("bfloat16_nonlinearity_order").sel(layer=layer)
    if layer in linearization_gap.within(0, 5 / 36):
        assert 0.3 <= order <= 1.0
    elif layer in linearization_gap.within(25 / 36, 1):
        assert 1.5 <= order <= 2.0
    else:
        not_applicable("the claim speaks of layers at depths up to 0.14 and from 0.69 on")


@claim("T-7.5b", "corrected")
def test_nonlinearity_is_quadratic(linearization_gap, layer):
    """In float32 every layer's nonlinearity is quadratic: order 1.9 to 2.1, with a log-log fit above 0.99.

    The leading term of any smooth function that is not odd about its input. Pilot: 1.98 to 2.00.
    """
    assert 1.9 <= linearization_gap.mean("nonlinearity_order").sel(layer=layer) <= 2.1
    assert linearization_gap.mean("nonlinearity_order_r2").sel(layer=layer) > 0.99


@claim("T-7.5c", "control")
def test_published_order_is_that_of_noise(linearization_gap, layer):
    """In the published setting the order lies below 1, which no smooth function has: noise rules the fit."""
    assert linearization_gap.mean("bfloat16_nonlinearity_order").sel(layer=layer) < 1


@claim("T-7.5d", "published", on=ORIGINAL)
def test_order_is_06_to_08(linearization_gap, layer):
    """The order of the nonlinearity is 0.6 to 0.8.

    The top-level summary's figure. It is the first version's (0.61 to 0.84); the reported one has 0.38 to 0.56.
    """
    assert 0.6 <= linearization_gap.mean("bfloat16_nonlinearity_order").sel(layer=layer) <= 0.8


@claim("T-7.6", "published")
def test_log_log_fits_are_good(linearization_gap, layer):
    """The log-log fits behind the published order explain at least 85 % of the variance.

    True of the published figures, for a slope of the wrong sign; T-7.5b has the fits in float32.
    """
    assert linearization_gap.mean("bfloat16_nonlinearity_order_r2").sel(layer=layer) >= 0.85


# ---- the gap over depth


@claim("T-7.1", "published")
def test_nonlinearity_is_u_shaped(linearization_gap):
    """Nonlinearity is U-shaped over depth: low on a plateau at a quarter to a half, high in the first and last layers.

    Plateau: layers 8 to 18 of 36. Its mean gap is below 0.6 of that of layers 0 and 1, and below 0.65 of the last's
    (published 0.132 against 0.249 and 0.230), in the published setting.
    """
    gap = linearization_gap.rounded_gap
    first, last = ends(linearization_gap, gap)
    assert linearization_gap.mean_at(gap, linearization_gap.plateau) < 0.6 * first
    assert linearization_gap.mean_at(gap, linearization_gap.plateau) < 0.65 * last


@claim("T-7.1b", "corrected")
def test_curvature_is_u_shaped(linearization_gap):
    """Without rounding the mean gap at depths 0.25 to 0.5 is below 0.8 of the mean of the two ends.

    De-noised published figures keep the shape with a weak early end (0.060 against 0.081 and 0.114). The pilot on
    SmolLM2 was flat.
    """
    gap = linearization_gap.gap
    middle = linearization_gap.mean_at(gap, linearization_gap.within(0.25, 0.5))
    assert middle < 0.8 * np.mean(ends(linearization_gap, gap))


@claim("T-7.2", "published", on=ORIGINAL)
def test_plateau_is_48_percent_below_the_first_layers(linearization_gap):
    """The gap on the plateau (layers 8 to 18) is 45 to 50 % below that of layers 0 and 1."""
    gap = linearization_gap.rounded_gap
    assert 0.45 <= 1 - linearization_gap.mean_at(gap, range(8, 19)) / linearization_gap.mean_at(gap, [0, 1]) <= 0.50


@claim("T-7.2b", "published", on=ORIGINAL)
def test_plateau_is_54_percent_below_the_first_layers(linearization_gap):
    """The gap of layers 6 to 18 is about 54 % below that of the first two layers.

    The top-level summary's figure, read as within 2 points. The first version gave 43 %.
    """
    gap = linearization_gap.rounded_gap
    assert 0.52 <= 1 - linearization_gap.mean_at(gap, range(6, 19)) / linearization_gap.mean_at(gap, [0, 1]) <= 0.56


@claim("T-7.3", "published")
def test_one_linear_map_explains_a_plateau_layers_response(linearization_gap, layer):
    """On the plateau a linear map explains about 87 % of a layer's response to moves of 5 %: a gap of at most 0.14.

    As a number true of the published figures; 59 to 73 % of the squared gap there is rounding.
    """
    linearization_gap.require_depth(layer, 8 / 36, 18 / 36)
    assert linearization_gap.rounded_gap.sel(layer=layer) <= 0.14


@claim("T-7.3b", "corrected")
def test_every_layer_is_nearly_linear_nearby(linearization_gap, layer):
    """Without rounding the gap at moves of 5 % is at most 0.15 in every layer (pilot: at most 0.10).

    The move is relative to the norm of the state. Where a few coordinates carry that norm (in Gemma 3 270M two
    directions hold 95 % of the variance after layer 0), it is large for all others, and the gap says so.
    """
    assert linearization_gap.gap.sel(layer=layer) <= 0.15


@claim("T-7.3c", "control")
def test_rounding_is_most_of_the_published_gap(linearization_gap):
    """Rounding makes more than half of the squared published gap in most layers.

    1 - (gap without rounding / published gap)^2, at moves of 5 %. It is 52 to 80 % in the published figures by the
    two-parameter fit; measured, the two settings also differ in context and in the form of J d, which matter less.
    """
    share = 1 - (linearization_gap.gap / linearization_gap.rounded_gap) ** 2
    assert (share > 0.5).mean() > 0.5


@claim("T-7.3d", "control")
def test_central_differences_are_good_enough(linearization_gap, layer):
    """In float32 the even part of the response gives the same gap as the exact derivative, within 5 %.

    Only odd functions tell the two apart (pilot: 0.5 % at moves of 5 %), so the published form is not what hurts.
    """
    even = linearization_gap.mean("even_gap").sel(layer=layer)
    assert abs(even / linearization_gap.gap.sel(layer=layer) - 1) <= 0.05


@claim("T-7.35", "published")
def test_early_layers_are_not_the_linear_ones(linearization_gap):
    """The first third of the layers is at least as nonlinear as the last third, against the source's own hypothesis.

    In the published setting. Of its thirds the figures say 0.175 and 0.180; layers 0 to 5 alone have 0.211.
    """
    gap = linearization_gap.rounded_gap
    first, last = linearization_gap.within(0, 1 / 3 - 1e-6), linearization_gap.within(2 / 3, 1)
    assert linearization_gap.mean_at(gap, first) >= linearization_gap.mean_at(gap, last)


@claim("T-7.35b", "hypothesis")
def test_early_layers_are_the_linear_ones(linearization_gap):
    """Without rounding the first third of the layers is less curved than the last third (de-noised: 0.069, 0.083)."""
    gap = linearization_gap.gap
    first, last = linearization_gap.within(0, 1 / 3 - 1e-6), linearization_gap.within(2 / 3, 1)
    assert linearization_gap.mean_at(gap, first) < linearization_gap.mean_at(gap, last)


# ---- attention and MLP


@claim("T-7.11", "published")
def test_branches_are_equally_nonlinear(linearization_gap):
    """Attention and MLP have the same mean gap within 0.01, in the published setting (0.129 and 0.128)."""
    attention, mlp = linearization_gap.rounded_branches
    assert abs(attention.mean() - mlp.mean()) <= 0.01


@claim("T-7.11b", "corrected")
def test_branches_are_about_equally_curved(linearization_gap):
    """Without rounding the mean gap of attention is 0.7 to 1.6 times that of the MLP (pilot: 1.23)."""
    attention, mlp = linearization_gap.branches
    assert 0.7 <= attention.mean() / mlp.mean() <= 1.6


@claim("T-7.12", "published", on=ORIGINAL)
def test_which_branch_is_the_more_nonlinear(linearization_gap, layer):
    """The MLP is the more nonlinear branch in layers 0 to 4, 34 and 35, attention in layers 5 to 33."""
    attention, mlp = (branch.sel(layer=layer) for branch in linearization_gap.rounded_branches)
    if 5 <= layer <= 33:
        assert attention > mlp
    else:
        assert mlp > attention


@claim("T-7.12b", "hypothesis")
def test_which_branch_is_the_more_curved(linearization_gap, layer):
    """Without rounding too the MLP is the more curved branch at the two ends only, attention in between.

    At the published depths: the first 5 and last 2 of 36 layers. The two branches' outputs differ in size, and so in
    how much rounding they suffer, which alone could give the published pattern.
    """
    attention, mlp = (branch.sel(layer=layer) for branch in linearization_gap.branches)
    if layer in linearization_gap.within(5 / 36, 33 / 36):
        assert attention > mlp
    else:
        assert mlp > attention


@claim("T-7.13", "published")
def test_last_mlp_is_the_most_nonlinear_branch(linearization_gap):
    """The last layer's MLP has the largest gap of all branches, more than twice that of the attention beside it.

    In the published setting: 0.249 and 0.112.
    """
    attention, mlp = linearization_gap.rounded_branches
    assert mlp[-1] == max(attention.max(), mlp.max())
    assert attention[-1] < 0.5 * mlp[-1]


@claim("T-7.13b", "corrected")
def test_most_curved_branch_is_near_the_end(linearization_gap):
    """Without rounding the branch with the largest gap is in the last tenth of the layers."""
    attention, mlp = linearization_gap.branches
    largest = np.maximum(attention.values, mlp.values)
    assert int(largest.argmax()) in linearization_gap.within(0.9, 1)


# ---- layers and texts


@claim("T-7.14", "published")
def test_gap_hardly_varies_over_prompts(linearization_gap, layer):
    """A layer's published gap varies by at most 20 % over prompts (standard deviation over mean)."""
    assert linearization_gap.rounded_variation.sel(layer=layer) <= 0.2


@claim("T-7.14b", "published", on=ORIGINAL)
def test_gap_varies_by_10_to_20_percent_over_prompts(linearization_gap, layer):
    """A layer's gap varies by 10 to 20 % over prompts, except in layers 0 and 33 to 35.

    As worded; the stored figures say 3 to 9 %, and 10.5 % in layer 33.
    """
    if layer in (0, 33, 34, 35):
        not_applicable("the source excepts layers 0 and 33 to 35")
    assert 0.1 <= linearization_gap.rounded_variation.sel(layer=layer) <= 0.2


@claim("T-7.14c", "corrected")
def test_published_gap_is_a_property_of_the_layer(linearization_gap):
    """At least 70 % of the variance of the published gap over layers and prompts lies between layers.

    Published: 82 %. Rounding is a part of it that all texts share.
    """
    assert linearization_gap.between_layers(linearization_gap.rounded_gap_by_prompt) >= 0.7


@claim("T-7.14d", "corrected")
def test_gap_is_a_property_of_the_layer(linearization_gap):
    """Without rounding at least half of the variance of the gap over layers and prompts lies between layers."""
    linearization_gap.require_smooth()
    assert linearization_gap.between_layers(linearization_gap.gap_by_prompt) >= 0.5
