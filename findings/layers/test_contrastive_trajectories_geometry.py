"""T-17 contrastive trajectories beside T-4 residual geometry: does likeness at the pivot follow the cloud's shape?"""

import numpy as np
import xarray as xr

from fixtures.claims import claim
from lab.statistics.correlations import spearman

ORIGINAL = "qwen3-4b-instruct-2507"


@claim("T-17.22c", "corrected", on=ORIGINAL)
def test_shared_antonyms_exceed_the_common_direction(contrastive_trajectories, residual_geometry, layer):
    """Behind a shared stem, antonyms are more alike than any tokens (T-4), by 0.15 from 10 to 95 % of the depth.

    T-17.22b on the published figures, which hold no words of other prompts: the pivot's cosine less T-4's mean cosine
    of random pairs, 0.24 to 0.37. What is left is not the direction that all residual streams share.
    """
    contrastive_trajectories.require_depth(layer, 0.1, 0.95)
    common = float(residual_geometry.cosine_raw_mean.sel(site=layer))
    assert contrastive_trajectories.cosine("antonym", layer, "shared") - common > 0.15


@claim("T-17.31", "published", on=ORIGINAL)
def test_the_last_layer_expands(contrastive_trajectories, residual_geometry):
    """The last layer's drop goes with an expansion: effective dimension up to 119, mean cosine from 0.62 to 0.09.

    The 119 is not in the published geometry, which says 160.
    """
    cosine = residual_geometry.cosine_raw_mean
    last = contrastive_trajectories.last
    assert abs(cosine.sel(site=last - 1) - 0.62) <= 0.015
    assert abs(cosine.sel(site=last) - 0.09) <= 0.015
    assert abs(residual_geometry.participation_ratio.sel(site=last) - 119) <= 1


@claim("T-17.31b", "corrected")
def test_the_last_layer_expands_where_completions_come_apart(contrastive_trajectories, residual_geometry):
    """In the last layer antonyms come apart, the effective dimension grows by half, and mean cosine falls by 0.3."""
    last = contrastive_trajectories.last
    ratio, cosine = residual_geometry.participation_ratio, residual_geometry.cosine_raw_mean
    assert contrastive_trajectories.cosine("antonym", last) < contrastive_trajectories.cosine("antonym", last - 1)
    assert ratio.sel(site=last) > 1.5 * ratio.sel(site=last - 1)
    assert cosine.sel(site=last - 1) - cosine.sel(site=last) > 0.3


@claim("T-17.32", "published", on=ORIGINAL)
def test_the_turn_lies_in_the_collapse(contrastive_trajectories, residual_geometry):
    """At layers 21 to 23, where antonyms diverge more, the effective dimension lies between 1.6 and 7.5.

    It has left the collapse by then: 4.5, 6.0 and 10.1, with the minimum at layer 16.
    """
    assert contrastive_trajectories.ratio("immediate")[21:24].min() > 1
    turn = residual_geometry.participation_ratio.sel(site=slice(21, 23))
    assert turn.min() >= 1.6
    assert turn.max() <= 7.5


@claim("T-17.32b", "hypothesis")
def test_antonyms_come_apart_where_the_cloud_is_narrow(contrastive_trajectories, residual_geometry):
    """The fewer dimensions the cloud has, the more antonyms diverge beside synonyms: rank correlation of 0.5.

    Exploratory; over all layers, both prefixes.
    """
    layers = np.arange(contrastive_trajectories.n_layers)
    ratio = xr.DataArray(contrastive_trajectories.ratio(), {"layer": layers}, ("layer",))
    narrow = xr.DataArray(1 / residual_geometry.participation_ratio.sel(site=layers).values, ratio.coords, ratio.dims)
    assert spearman(ratio, narrow) >= 0.5
