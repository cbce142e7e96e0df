"""T-9 weight spectra: how much of its rank each matrix uses, and what a random matrix of its shape would.

Published claims are worded as the source words them. Where its own data, or another model, say otherwise, the claim
stays and its lettered siblings state what the data do support.

The offline subjects were stored in few bits: their weights lie on a grid, and rounding is noise that flattens a
spectrum. T-9.5d measures by how much: it moves no effective rank that a claim here turns on.
"""

import numpy as np
import pytest

from fixtures.claims import claim
from lab.experiments.layers.weight_spectra import MATRICES, MLP, ROUTING, VALUES
from lab.statistics.correlations import spearman_by_order

ORIGINAL = "qwen3-4b-instruct-2507"
PUBLISHED_ORDER = ("q_proj", "k_proj", "o_proj", "gate_proj", "v_proj", "down_proj", "up_proj")


def test_weight_spectra_matches_snapshot(weight_spectra, snapshot):
    assert weight_spectra == snapshot


# ---- routing and values


@claim("T-9.1", "published")
def test_routing_uses_less_of_its_rank_than_values(weight_spectra, layer):
    """Q and K use a smaller share of their rank than V and O, in every layer.

    Means of the two against means of the two, no threshold. If it failed, the contrast of routing and content would
    not be one of every layer.
    """
    routing = weight_spectra.at(weight_spectra.of(weight_spectra.ratio, *ROUTING), layer)
    values = weight_spectra.at(weight_spectra.of(weight_spectra.ratio, *VALUES), layer)
    assert routing < values


@claim("T-9.1b", "control")
def test_routing_lies_below_values_matrix_by_matrix(weight_spectra, layer):
    """Both Q and K use a smaller share of their rank than both V and O.

    The strict form, which the source does not claim: O is nearly as low as K (6 of its 36 layers fail), so V carries
    the contrast of means.
    """
    ratio = weight_spectra.ratio
    routing = max(weight_spectra.entry(ratio, layer, name) for name in ROUTING)
    assert routing < min(weight_spectra.entry(ratio, layer, name) for name in VALUES)


@claim("T-9.1c", "corrected")
def test_routing_lies_below_values_relative_to_random_matrices(weight_spectra, layer):
    """Relative to random matrices of their shapes, both Q and K lie below both V and O.

    A ratio depends on the shape: a random K or V of the original has 0.71, a random Q or O 0.62. With that taken out
    the strict form holds in all of its layers.
    """
    relative = weight_spectra.relative_rank
    routing = max(weight_spectra.entry(relative, layer, name) for name in ROUTING)
    assert routing < min(weight_spectra.entry(relative, layer, name) for name in VALUES)


@claim("T-9.1d", "corrected")
def test_the_gap_of_routing_and_values_is_wide(weight_spectra):
    """Q and K use less of their rank than V and O in 95 % of the layers, by 0.10 on average.

    The form for any model: published 0.20 and all layers; pilots of three small models 0.17 to 0.28.
    """
    gap = weight_spectra.group_gap(weight_spectra.ratio)
    assert (gap > 0).mean() >= 0.95
    assert gap.mean() >= 0.10


@claim("T-9.1e", "control")
def test_the_gap_survives_the_gains_of_the_norms(weight_spectra):
    """The gap of T-9.1d stands when the gains of the norms that feed Q, K and V, and of Q's and K's own, are folded in.

    The map on the normalised input is W diag(g), and gains are strongly non-uniform in some models. No norm feeds O.
    """
    folded = weight_spectra.folded_ratio
    gap = weight_spectra.group_gap(folded.where(folded["matrix"] != "o_proj", weight_spectra.ratio))
    assert (gap > 0).mean() >= 0.95
    assert gap.mean() >= 0.10


@claim("T-9.1h", "control")
def test_the_gap_survives_the_norm_after_attention(weight_spectra):
    """The gap of T-9.1d stands when the gain of a norm between O and the residual stream is folded into O, too.

    The same as T-9.1e where there is no such norm. Gemma's is so uneven that O falls below Q (0.09 and 0.13).
    """
    gap = weight_spectra.group_gap(weight_spectra.folded_ratio)
    assert (gap > 0).mean() >= 0.95
    assert gap.mean() >= 0.10


@claim("T-9.1f", "control")
def test_the_gap_survives_the_null_of_shapes(weight_spectra):
    """Relative to random matrices of their shapes, Q and K lie below V and O on average, in 95 % of the layers."""
    assert (weight_spectra.group_gap(weight_spectra.relative_rank) > 0).mean() >= 0.95


@claim("T-9.1g", "hypothesis")
def test_query_key_circuits_use_less_of_their_rank_than_output_value_circuits(weight_spectra):
    """Head by head, the query-key circuit uses a smaller share of the head's width than the output-value circuit.

    Q and K mix all heads, but what routes is the bilinear form W_q' W_k of a head, and what it writes W_o W_v. Both
    have the head's width as largest rank, and the same null. 95 % of heads, as T-9.1d asks of layers. The form is that
    of tokens at the same place, without rotary embedding and biases.
    """
    routing, values = (weight_spectra.circuit_ratio(circuit) for circuit in ("qk", "ov"))
    smaller = (routing < values).where(~np.isnan(routing) & ~np.isnan(values))
    assert smaller.mean() >= 0.95


@claim("T-9.1i", "hypothesis")
def test_query_key_circuits_use_less_of_their_rank_on_average(weight_spectra):
    """On average over heads the query-key circuit uses a smaller share of the head's width than the output-value one.

    The sign of T-9.1g, for a model rather than for nearly every head.
    """
    routing, values = (weight_spectra.circuit_ratio(circuit) for circuit in ("qk", "ov"))
    assert routing.mean() < values.mean()


@claim("T-9.2", "published", on=ORIGINAL)
def test_published_group_means(weight_spectra):
    """Mean shares of rank: QK 0.3146, VO 0.5163, attention 0.4154, MLP 0.6070.

    Within 1e-3: the source's means are of ratios rounded to four decimals.
    """
    groups = (ROUTING, VALUES, (*ROUTING, *VALUES), MLP)
    means = np.array([weight_spectra.mean_of(weight_spectra.ratio, *group) for group in groups])
    assert np.abs(means - [0.3146, 0.5163, 0.4154, 0.6070]).max() <= 1e-3


@claim("T-9.2b", "corrected")
def test_order_of_the_group_means(weight_spectra):
    """On average QK use the smallest share of their rank, then VO, then the MLP.

    What the four published means say of other models: their order.
    """
    ratio = weight_spectra.ratio
    routing, values = (weight_spectra.mean_of(ratio, *group) for group in (ROUTING, VALUES))
    assert routing < values < weight_spectra.mean_of(ratio, *weight_spectra.mlp_matrices)


# ---- matrix by matrix


@claim("T-9.3", "published")
def test_queries_use_less_than_keys(weight_spectra, layer):
    """Q uses a smaller share of its rank than K, in every layer.

    K has fewer rows under grouped queries, so that part of this is shape; T-9.3d takes that out.
    """
    ratio = weight_spectra.ratio
    assert weight_spectra.entry(ratio, layer, "q_proj") < weight_spectra.entry(ratio, layer, "k_proj")


@claim("T-9.3b", "corrected")
def test_keys_use_less_than_values(weight_spectra, layer):
    """K uses a smaller share of its rank than V, in every layer: two matrices of one shape."""
    ratio = weight_spectra.ratio
    assert weight_spectra.entry(ratio, layer, "k_proj") < weight_spectra.entry(ratio, layer, "v_proj")


@claim("T-9.3c", "corrected")
def test_queries_use_less_than_outputs(weight_spectra, layer):
    """Q uses a smaller share of its rank than O, two matrices of one shape; true of all layers of the original."""
    ratio = weight_spectra.ratio
    assert weight_spectra.entry(ratio, layer, "q_proj") < weight_spectra.entry(ratio, layer, "o_proj")


@claim("T-9.3d", "control")
def test_queries_use_less_than_keys_relative_to_random_matrices(weight_spectra, layer):
    """Relative to random matrices of their shapes, Q uses less than K."""
    relative = weight_spectra.relative_rank
    assert weight_spectra.entry(relative, layer, "q_proj") < weight_spectra.entry(relative, layer, "k_proj")


@claim("T-9.4", "published", on=ORIGINAL)
def test_order_of_the_matrices(weight_spectra):
    """Mean shares of rank rise in the order Q, K, O, gate, V, down, up."""
    means = weight_spectra.type_means(weight_spectra.ratio)
    assert means.sortby(means)["matrix"].values.tolist() == list(PUBLISHED_ORDER)


@claim("T-9.4b", "corrected")
def test_order_of_the_matrices_is_similar_elsewhere(weight_spectra):
    """Q uses the smallest share of its rank, and the order of the matrices resembles the published one.

    Spearman at least 0.7; pilots 0.86, 0.79 and 0.79.
    """
    means = weight_spectra.type_means(weight_spectra.ratio, PUBLISHED_ORDER)
    assert means.idxmin() == "q_proj"
    assert spearman_by_order(means, np.arange(len(PUBLISHED_ORDER))) >= 0.7


@claim("T-9.4c", "control", on=ORIGINAL)
def test_single_layers_have_the_published_order(weight_spectra):
    """Single layers have the order of the means, too: nine in ten of them.

    They do not: 12 of 36. An order of means is not one of layers.
    """
    layers = weight_spectra.ratio.sel(matrix=list(PUBLISHED_ORDER)).values
    assert (np.diff(layers, axis=1) > 0).all(axis=1).mean() >= 0.9


@claim("T-9.5", "published", on=ORIGINAL)
def test_published_type_means(weight_spectra):
    """Mean shares of rank of Q, K, V, O, gate, up, down: 0.2535, 0.3756, 0.6101, 0.4225, 0.4984, 0.6836, 0.6390.

    Within 2e-4, what rounding to four decimals leaves.
    """
    expected = [0.2535, 0.3756, 0.6101, 0.4225, 0.4984, 0.6836, 0.6390]
    assert abs(weight_spectra.type_means(weight_spectra.ratio) - expected).max() <= 2e-4


@claim("T-9.5b", "published", on=ORIGINAL)
def test_published_exponents(weight_spectra):
    """Mean power-law exponents of Q, K, V, O, gate, up, down: 0.616, 0.548, 0.403, 0.561, 0.353, 0.309, 0.322."""
    expected = [0.616, 0.548, 0.403, 0.561, 0.353, 0.309, 0.322]
    assert abs(weight_spectra.type_means(weight_spectra.exponent) - expected).max() <= 1e-3


@claim("T-9.5c", "published", on=ORIGINAL)
def test_published_fits(weight_spectra):
    """Mean R^2 of the power laws of Q, K, V, O, gate, up, down: 0.766, 0.751, 0.689, 0.719, 0.768, 0.694, 0.709."""
    expected = [0.766, 0.751, 0.689, 0.719, 0.768, 0.694, 0.709]
    assert abs(weight_spectra.type_means(weight_spectra.variable("power_law_r_squared")) - expected).max() <= 1e-3


@claim("T-9.5d", "control")
def test_storing_on_a_grid_moves_no_mean(weight_spectra):
    """Where weights lie on a grid, rounding them as much once more moves mean rank, exponent and r90 by at most 2 %.

    To first order the second rounding does what the storing did, so this bounds the storing's bias. 2 % is a tenth
    of the smallest contrast that claims turn on (published gap of the groups, 0.20). It says nothing about the
    smallest singular values: claims about these do not apply on a grid.
    """
    for name in ("effective_rank", "power_law_exponent", "energy_rank_90"):
        assert weight_spectra.rounding_shift(name).max() <= 0.02


@claim("T-9.6", "published")
def test_the_mlp_uses_more_than_attention(weight_spectra, layer):
    """The MLP's matrices use a larger share of their rank than attention's, on average over each.

    Published as 0.607 against 0.415. In single layers it fails at 1 and 2 of the original, whose MLPs have collapsed.
    """
    mlp = weight_spectra.of(weight_spectra.ratio, *weight_spectra.mlp_matrices)
    attention = weight_spectra.of(weight_spectra.ratio, *ROUTING, *VALUES)
    assert weight_spectra.at(mlp, layer) > weight_spectra.at(attention, layer)


@claim("T-9.6b", "published")
def test_every_mlp_matrix_uses_more_than_any_of_attention(weight_spectra):
    """The MLP has the highest shares of rank, type by type: its lowest mean lies above attention's highest.

    The source says so; in its data V (0.610) lies above the gate (0.498).
    """
    mlp = weight_spectra.type_means(weight_spectra.ratio, weight_spectra.mlp_matrices)
    assert mlp.min() > weight_spectra.type_means(weight_spectra.ratio, (*ROUTING, *VALUES)).max()


@claim("T-9.6c", "corrected")
def test_the_mlp_uses_more_than_attention_in_most_layers(weight_spectra):
    """In 90 % of the layers the MLP's matrices use a larger share of their rank than attention's, on average.

    Published 34 of 36; all layers of three pilots.
    """
    mlp = weight_spectra.of(weight_spectra.ratio, *weight_spectra.mlp_matrices)
    assert (mlp > weight_spectra.of(weight_spectra.ratio, *ROUTING, *VALUES)).mean() >= 0.9


@claim("T-9.6d", "control")
def test_the_mlp_uses_more_relative_to_random_matrices(weight_spectra):
    """Relative to random matrices of their shapes, too, the MLP uses more than attention in 90 % of the layers."""
    mlp = weight_spectra.of(weight_spectra.relative_rank, *weight_spectra.mlp_matrices)
    assert (mlp > weight_spectra.of(weight_spectra.relative_rank, *ROUTING, *VALUES)).mean() >= 0.9


@pytest.mark.parametrize("matrix", MATRICES)
@claim("T-9.7", "published")
def test_every_matrix_lies_below_its_random_baseline(weight_spectra, layer, matrix):
    """Every matrix uses less of its rank than a random one of its shape.

    Stated for all; V of the last layer has 1.004 times its baseline. Nothing forbids it: a trained matrix can be
    flatter than a random one.
    """
    assert weight_spectra.entry(weight_spectra.relative_rank, layer, matrix) < 1


@claim("T-9.7b", "corrected")
def test_all_but_values_lie_below_their_random_baseline_on_average(weight_spectra):
    """On average over layers every matrix but V uses less of its rank than a random one of its shape.

    V lies below it in the original (0.85), but not in every model (Gemma 3 270M pilot: 1.13).
    """
    means = weight_spectra.type_means(weight_spectra.relative_rank, weight_spectra.matrices)
    assert means.drop_sel(matrix="v_proj").max() < 1


@claim("T-9.8", "published")
def test_bands_of_the_random_baseline(weight_spectra):
    """QK use 40 to 60 % of their random baseline, V and the MLP 77 to 86 %.

    Means by type, bands as printed with half a unit of rounding. The gate has 63 %: "77 %" is the mean of the three.
    """
    relative = weight_spectra.type_means(weight_spectra.relative_rank)
    for name in ROUTING:
        assert 0.395 <= relative.sel(matrix=name) <= 0.605
    for name in ("v_proj", *MLP):
        assert 0.765 <= relative.sel(matrix=name) <= 0.865


@claim("T-9.8b", "corrected")
def test_limits_of_the_random_baseline(weight_spectra):
    """Q uses less than 55 % of its random baseline, K less than 65 %, and up more than 75 %.

    Pilots: Q 0.47, 0.28, 0.27; K 0.58, 0.51, 0.44; up 0.87, 0.82, 0.88.
    """
    relative = weight_spectra.type_means(weight_spectra.relative_rank, ("q_proj", "k_proj", "up_proj"))
    assert relative.sel(matrix="q_proj") < 0.55
    assert relative.sel(matrix="k_proj") < 0.65
    assert relative.sel(matrix="up_proj") > 0.75
