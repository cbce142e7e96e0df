"""T-15, query and key norms: removed, made constant, and what they do to the largest elements.

The published comparison reads queries and keys of a model whose every query and key norm is gone and whose stream is
wrecked (loss 11.7). What the norms do in the healthy model is told by their input, `raw_intact`.
"""

import numpy as np

from fixtures.claims import claim
from lab.experiments.surgery.normalization import HALF
from lab.statistics.correlations import spearman_by_order

ORIGINAL = "qwen3-4b-instruct-2507"


@claim("T-15.7", "published")
def test_head_norms_are_essential(normalization):
    """Removing query and key norms multiplies the loss by at least 100 (135.7 published)."""
    rise = normalization.head_norm_damage
    assert rise / normalization.baseline_loss + 1 >= 100


@claim("T-15.7b", "corrected")
def test_without_head_norms_half_of_a_guess_is_lost(normalization):
    """Removing query and key norms costs at least half of what a uniform guess would (0.98 published)."""
    assert normalization.fraction(normalization.head_norm_damage) >= HALF


@claim("T-15.7c", "hypothesis")
def test_head_norms_are_needed_for_their_scale(normalization):
    """With a constant in the place of each head vector's root mean square less than a tenth of that damage is left.

    If it fails, the model needs each query and key to be normed by its own length. Damage beyond a uniform guess's
    counts as that.
    """
    frozen, removed = map(normalization.fraction, (normalization.head_frozen_damage, normalization.head_norm_damage))
    assert frozen < 0.1 * min(removed, 1.0)


@claim("T-15.8", "published", on=ORIGINAL)
def test_head_norms_are_as_critical_as_all_others(normalization):
    """Removing query and key norms costs as much as removing all norms, within a factor of 2.

    "As critical as the main norms." Without any norm the loss is not finite, so no factor exists.
    """
    assert normalization.damage("identity") <= 2 * normalization.head_norm_damage


@claim("T-15.8b", "corrected")
def test_head_norms_cost_less_than_those_of_one_layer(normalization):
    """Removing all query and key norms costs less than removing the reading norms of the median single layer.

    Published: 135.7 times the baseline, and 155.4 for the median layer.
    """
    assert normalization.head_norm_damage < normalization.removed_damage.median()


@claim("T-15.9", "published")
def test_head_norms_amplify_keys_early_and_suppress_queries_late(normalization):
    """The norms amplify the largest key in the first third of the layers and damp the largest query in the last fourth.

    Against the model without any such norm. Published: keys 323-fold at layer 0, queries down to a sixth at layer 35.
    """
    n = normalization.n_layers
    keys, queries = (normalization.amplification(which).values for which in ("key", "query"))
    assert keys[: n // 3].min() > 1
    assert queries[n - n // 4 :].max() < 1


@claim("T-15.9b", "published", on=ORIGINAL)
def test_published_extremes_of_keys_and_queries(normalization):
    """The largest key grows from 1.0 to 314 at layer 0, the largest query falls from 65.5 to 17.6 at layer 32."""
    keys, queries = (normalization.extremes(which) for which in ("key", "query"))
    assert keys.sel(condition="with_qk_norm", layer=0) == 314
    assert abs(keys.sel(condition="without_qk_norm", layer=0) - 1.0) <= 0.05
    assert abs(queries.sel(condition="without_qk_norm", layer=32) - 65.5) <= 0.05
    assert abs(queries.sel(condition="with_qk_norm", layer=32) - 17.6) <= 0.05


@claim("T-15.9c", "corrected")
def test_amplification_falls_with_depth(normalization):
    """Amplification of the largest key and of the largest query falls with depth: Spearman at most -0.5 each.

    -0.949 and -0.932 published, against the broken model.
    """
    for which in ("key", "query"):
        assert spearman_by_order(normalization.amplification(which), normalization.depth) <= -0.5


@claim("T-15.9d", "control")
def test_amplification_falls_with_depth_in_the_intact_model(normalization):
    """The same holds against what the norms are given in the intact model.

    If it fails, the published profile is one of the broken model's growing stream, not of the norms.
    """
    for which in ("key", "query"):
        assert spearman_by_order(normalization.amplification(which, "raw_intact"), normalization.depth) <= -0.5


@claim("T-15.9e", "control")
def test_typical_head_vectors_tell_the_same(normalization):
    """The median root mean square of key vectors tells the same as their largest element: Spearman at least 0.5.

    Amplification against the intact model, over layers. A maximum over texts is one channel of one token.
    """
    normalization.require_head_norms()
    median = normalization.mean("key_rms_median")
    typical = median.sel(condition="with_qk_norm", drop=True) / median.sel(condition="raw_intact", drop=True)
    assert spearman_by_order(normalization.amplification("key", "raw_intact"), np.asarray(typical)) >= 0.5
