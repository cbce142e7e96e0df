"""T-15 beside T-2, T-4 and T-7: removed norms and removed layers, the jump, and the scale-invariance of layers."""

import numpy as np

from fixtures.claims import claim
from lab.statistics.correlations import spearman_by_order
from lab.statistics.significance import sign_share

ORIGINAL = "qwen3-4b-instruct-2507"


@claim("T-15.12", "published")
def test_removing_norms_hurts_more_than_removing_the_layer(normalization, layer_knockout):
    """In at least 90 % of the layers removing the norms costs more than skipping the whole layer (T-2).

    35 of 36 published (all but layer 0). Not stated by the source, whose figures show it: identity does not remove
    normalization, it feeds the sublayer inputs of a scale that it has never seen.
    """
    assert sign_share(normalization.removed_damage - layer_knockout.loss_delta) >= 0.9


@claim("T-15.12b", "corrected")
def test_removed_norms_do_not_tell_which_layers_matter(normalization, layer_knockout):
    """The two profiles are hardly related: Spearman over layers below 0.5 (0.16 published, p = 0.36)."""
    assert spearman_by_order(normalization.removed_damage, layer_knockout.loss_delta) < 0.5


@claim("T-15.30", "published", on=ORIGINAL)
def test_layers_ignore_scale_because_of_norms(normalization, linearization_gap):
    """Layers ignore the scale of their input because of the norms: T-7's homogeneity gap is about 1.0 in all layers.

    "About" is read as within 0.1.
    """
    gap = linearization_gap.mean("v1_homogeneity_gap")
    assert gap.min() >= 0.9
    assert gap.max() <= 1.1


@claim("T-15.30b", "corrected")
def test_homogeneity_gap_is_near_one(normalization, linearization_gap):
    """T-7's homogeneity gap lies between 0.7 and 1.4 in all layers (0.81 to 1.33 published).

    1 where the update ignores the scale of the input, 0 where it follows it. A sublayer that reads the stream through
    RMSNorm ignores it; eps and sums of two updates are what is left.
    """
    measured = linearization_gap.has("homogeneity_gap")
    gap = linearization_gap.mean("homogeneity_gap" if measured else "v1_homogeneity_gap")
    assert gap.min() >= 0.7
    assert gap.max() <= 1.4


def rank_of_the_jump(normalization, layer_knockout):
    """Rank of the jump layer by what skipping it costs; 1 is the most critical layer."""
    normalization.require_jump(5)
    damage = layer_knockout.loss_delta.values
    return 1 + int((damage > damage[normalization.jump_layer]).sum())


@claim("T-15.31", "published", on=ORIGINAL)
def test_the_jump_layer_is_the_second_most_critical(normalization, layer_knockout):
    """The layer where the stream explodes is the second most critical one by knockout."""
    assert rank_of_the_jump(normalization, layer_knockout) == 2


@claim("T-15.31b", "corrected")
def test_the_jump_layer_is_critical(normalization, layer_knockout):
    """The layer where the pooled stream jumps is among the three most critical ones by knockout.

    It writes the massive activation that later attention rests on.
    """
    assert rank_of_the_jump(normalization, layer_knockout) <= 3


def narrowest(residual_geometry):
    """The site of T-4's smallest participation ratio, embedding and last layer left out, and the one before it."""
    ratio = residual_geometry.interior(residual_geometry.participation_ratio)
    site = int(ratio.site.values[int(np.argmin(ratio.values))])
    return site, site - 1


def change(residual_geometry, name):
    """A figure of T-4 at its narrowest site over that one layer before."""
    site, before = narrowest(residual_geometry)
    profile = residual_geometry.variable(name)
    return float(profile.sel(site=site) / profile.sel(site=before))


@claim("T-15.32", "published")
def test_low_dimension_is_an_outlier(normalization, residual_geometry):
    """T-4's low participation ratio is a complementary view: where it is lowest, one token's norm has exploded.

    There it falls to at most a tenth within a layer, the largest norm grows at least 5-fold and the mean norm at most
    2-fold. Published: 156 to 2.3, 81 to 3368, 47.9 to 50.2.
    """
    assert change(residual_geometry, "participation_ratio") <= 0.1
    assert change(residual_geometry, "norm_max") >= 5
    assert change(residual_geometry, "norm_mean") <= 2


@claim("T-15.32b", "corrected")
def test_low_dimension_is_another_outlier(normalization, residual_geometry):
    """It is not the same outlier: T-4's lowest dimension lies at another layer than the jump of the pooled stream.

    Published: layers 16 and 6. The jump is the first token's; T-4 reads completion tokens, one of which follows ten
    layers later.
    """
    normalization.require_jump(5)
    assert narrowest(residual_geometry)[0] != normalization.jump_layer


@claim("T-15.32c", "control")
def test_dimension_without_the_outlier_does_not_collapse(normalization, residual_geometry):
    """Without the leading direction, which is the outlier's, the participation ratio keeps half of its size there.

    If it fails, ordinary tokens lose directions, too.
    """
    assert change(residual_geometry, "participation_ratio_without_top1") >= 0.5
