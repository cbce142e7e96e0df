"""T-15, learned scales: how far they have left one, and whether they tell channels or layers apart."""

from fixtures.claims import claim
from lab.statistics.correlations import spearman_by_order

ORIGINAL = "qwen3-4b-instruct-2507"


def figures(normalization, site):
    """Mean, standard deviation and shares within 10 and 50 % of one, over all layers and channels of a site."""
    names = ("global_mean", "global_std", "within_10pct_fraction", "within_50pct_fraction")
    return [normalization.scale_figure(f"scale_{name}", site) for name in names]


@claim("T-15.24", "published", on=ORIGINAL)
def test_pre_attention_scales_have_left_one(normalization):
    """Pre-attention scales: mean 1.010, standard deviation 1.331, 7.5 % within a tenth of one, 31.3 % within a half."""
    mean, std, tenth, half = figures(normalization, "pre_attention")
    assert abs(mean - 1.010) <= 0.0006
    assert abs(std - 1.331) <= 0.0006
    assert abs(tenth - 0.075) <= 0.0006
    assert abs(half - 0.313) <= 0.0006


@claim("T-15.24b", "corrected")
def test_few_pre_attention_scales_are_near_one(normalization):
    """At most a fifth of the pre-attention scales lies within a tenth of one (0.075 published)."""
    assert normalization.scale_figure("scale_within_10pct_fraction", "pre_attention") <= 0.2


@claim("T-15.25", "published", on=ORIGINAL)
def test_pre_mlp_scales_are_closer_to_one(normalization):
    """Pre-MLP scales: mean 0.796, standard deviation 0.380, 11.5 % within a tenth of one, 80.0 % within a half."""
    mean, std, tenth, half = figures(normalization, "pre_mlp")
    assert abs(mean - 0.796) <= 0.0006
    assert abs(std - 0.380) <= 0.0006
    assert abs(tenth - 0.115) <= 0.0006
    assert abs(half - 0.800) <= 0.0006


@claim("T-15.25b", "corrected")
def test_pre_mlp_scales_vary_less(normalization):
    """Pre-MLP scales vary less than pre-attention scales, over layers and channels."""
    mlp, attention = (normalization.scale_figure("scale_global_std", site) for site in ("pre_mlp", "pre_attention"))
    assert mlp < attention


@claim("T-15.26", "published")
def test_scales_gate_channels(normalization):
    """Pre-attention scales act as gates of channels: most of their variance lies within layers.

    The source infers it from the few scales near one.
    """
    assert normalization.between_layer_share() < 0.5


@claim("T-15.26b", "corrected")
def test_scales_differ_mostly_between_layers(normalization):
    """At least half of the variance of scales lies between layers, before attention and before the MLP.

    0.70 and 0.69 published: what moves scales away from one is a factor per layer.
    """
    assert normalization.between_layer_share("pre_attention") >= 0.5
    assert normalization.between_layer_share("pre_mlp") >= 0.5


@claim("T-15.26c", "corrected")
def test_pre_attention_scales_rise_with_depth(normalization):
    """The mean pre-attention scale rises with depth: Spearman at least 0.8 (0.990 published)."""
    assert spearman_by_order(normalization.at("scale_mean"), normalization.depth) >= 0.8
