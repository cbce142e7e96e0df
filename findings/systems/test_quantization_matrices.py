"""T-11 quantization: which of the seven matrix types of a layer are sensitive?

Published: single matrices at 3 bits, whose mean over layers is carried by one matrix, the gate of layer 2. Measured:
each type in all layers at once at 3 bits, where effects are 20 to 100 times the noise, and single matrices at 2 bits.
"""

import numpy as np

from fixtures.claims import claim
from lab.experiments.systems.quantization import ATTENTION, MLP
from lab.statistics.significance import sign_share, t_test_p_value, wilcoxon_p_value

ORIGINAL = "qwen3-4b-instruct-2507"


@claim("T-11.11", "published")
def test_gate_is_the_most_sensitive_type(quantization):
    """gate_proj is the matrix type most sensitive to 3 bits."""
    quantization.require_seven_matrices()
    assert quantization.type_damage.idxmax() == "gate_proj"


@claim("T-11.11b", "corrected", on=ORIGINAL)
def test_by_the_median_up_is_the_most_sensitive_type(quantization):
    """By the median over layers up_proj is the most sensitive type, not gate_proj.

    0.030 against 0.021 points of perplexity: gate_proj leads by its mean only, and that is one matrix (T-11.12b).
    """
    assert quantization.matrix_delta_perplexity.median("layer").idxmax() == "up_proj"


@claim("T-11.12", "published", on=ORIGINAL)
def test_gate_is_50_times_as_sensitive_as_attention(quantization):
    """gate_proj is at least 50 times as sensitive as the attention matrices.

    Ratio of means over layers: 53.8 to all four, 57.7 to q and k (the blog's 58).
    """
    means = quantization.matrix_delta_perplexity.mean("layer")
    assert means.sel(matrix="gate_proj") >= 50 * means.sel(matrix=list(ATTENTION)).mean()


@claim("T-11.12b", "control", on=ORIGINAL)
def test_without_layer_2_gate_is_not_50_times_as_sensitive(quantization):
    """Without layer 2, gate_proj is less than 10 times as sensitive as attention, and less than up_proj.

    The gate of layer 2 makes up 7.87 of the total of 8.90 points of perplexity.
    """
    means = quantization.matrix_delta_perplexity.drop_sel(layer=2).mean("layer")
    assert means.sel(matrix="gate_proj") < 10 * means.sel(matrix=list(ATTENTION)).mean()
    assert means.sel(matrix="gate_proj") < means.sel(matrix="up_proj")


@claim("T-11.12c", "corrected")
def test_mlp_types_are_more_sensitive_than_attention_types(quantization):
    """The mean damage of the three MLP types is at least twice that of the four attention types.

    A pilot on SmolLM2 gave 2.9 (0.39 and 0.14 nat), the published figures 20 (24 in points of perplexity). MLP matrices
    also hold several times as many weights each, so this is no statement per weight.
    """
    assert quantization.types(MLP).mean() >= 2 * quantization.types(ATTENTION).mean()


@claim("T-11.12d", "corrected")
def test_in_most_layers_the_mlp_is_more_sensitive(quantization):
    """In at least two thirds of the layers the MLP matrices lose more on average than the attention matrices.

    Published: 28 of 36 layers, Wilcoxon p = 1.4e-4; here p <= 0.01 is asked for too. A median over layers, which no
    single matrix carries.
    """
    quantization.require_seven_matrices()
    damage = quantization.matrix_damage
    differences = damage.sel(matrix=list(MLP)).mean("matrix") - damage.sel(matrix=list(ATTENTION)).mean("matrix")
    assert sign_share(differences) >= 2 / 3
    assert wilcoxon_p_value(differences) <= 0.01


@claim("T-11.13", "published", on=ORIGINAL)
def test_most_sensitive_layer_of_each_type(quantization):
    """The most sensitive layer is 2 for gate, 35 for down, 34 for up, 22 for v, 33 for k, 20 for o, 22 for q."""
    worst = quantization.matrix_delta_perplexity.idxmax("layer")
    stated = {"gate_proj": 2, "down_proj": 35, "up_proj": 34, "v_proj": 22, "k_proj": 33, "o_proj": 20, "q_proj": 22}
    assert {matrix: int(worst.sel(matrix=matrix)) for matrix in stated} == stated


@claim("T-11.13b", "corrected", on=ORIGINAL)
def test_most_sensitive_layer_of_up_is_the_last(quantization):
    """The most sensitive up_proj is that of layer 35 (0.199); layer 34 (0.129) is second."""
    damage = quantization.matrix_delta_perplexity.sel(matrix="up_proj")
    assert quantization.ranked(damage)[:2] == [35, 34]


@claim("T-11.14", "published", on=ORIGINAL)
def test_the_gate_of_layer_2_explains_most_of_its_damage(quantization):
    """The gate of layer 2 accounts for more than half of the damage of layer 2 at 3 bits.

    "Most" by a narrow margin: 7.87 of 15.2 points of perplexity, 52 %.
    """
    gate = quantization.matrix_delta_perplexity.sel(layer=2, matrix="gate_proj")
    assert gate > quantization.perplexity_rise_at(3).sel(layer=2) / 2


@claim("T-11.14b", "corrected", on=ORIGINAL)
def test_matrices_of_layer_2_are_super_additive(quantization):
    """The seven matrices of layer 2 lose at most 60 % of what the layer loses as a whole.

    7.97 of 15.2 points of perplexity: 52 %. Shares of a super-additive total explain nothing (T-11.14).
    """
    singles = quantization.matrix_delta_perplexity.sel(layer=2).sum()
    assert singles <= 0.6 * quantization.perplexity_rise_at(3).sel(layer=2)


@claim("T-11.15", "published")
def test_q_and_k_are_the_least_sensitive_types(quantization):
    """q_proj and k_proj are the two least sensitive matrix types."""
    quantization.require_seven_matrices()
    least = quantization.type_damage.sortby(quantization.type_damage).matrix.values[:2]
    assert set(least) == {"q_proj", "k_proj"}


@claim("T-11.15b", "control", on=ORIGINAL)
def test_single_attention_matrices_at_3_bits_are_noise(quantization):
    """The mean damage of none of the four attention types at 3 bits can be told from zero.

    t-tests over layers: p = 0.70 (q), 0.46 (o), 0.26 (v), 0.13 (k). No order among them can be read off.
    """
    damage = quantization.matrix_damage
    assert min(t_test_p_value(damage.sel(matrix=matrix)) for matrix in ATTENTION) > 0.05


@claim("T-11.15c", "corrected")
def test_the_four_least_sensitive_types_are_those_of_attention(quantization):
    """Every attention type is less sensitive than every MLP type."""
    assert quantization.types(ATTENTION).max() < quantization.types(MLP).min()


@claim("T-11.15d", "hypothesis")
def test_single_matrices_lose_less_than_their_layer(quantization):
    """In the median layer the single matrices add up to at most 1.5 times the layer's damage at 2 bits.

    Open: within a layer damage may be super-additive (published layer 2: 0.52) or not. Measured at 2 bits on the first
    of the texts that the layer sweep reads; published figures have 3 bits for both.
    """
    bits = 3 if quantization.source == "published" else 2
    singly = quantization.matrix_damage.sum("matrix")  # of every so manieth layer
    ratio = singly / quantization.damage(bits).sel(layer=singly["layer"])
    assert np.median(ratio) <= 1.5
