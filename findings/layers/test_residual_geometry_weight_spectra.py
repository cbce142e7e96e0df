"""T-4 residual geometry with T-9: does the rank of a layer's weights predict the dimension of its output?"""

import scipy

from fixtures.claims import claim


@claim("T-4.33", "published")
def test_weight_rank_does_not_predict_dimension(residual_geometry, weight_spectra):
    """The effective rank of the weights does not predict the effective dimension after the layer: Pearson's p > 0.05.

    Published as r = 0.157, p = 0.36; its stored files give 0.264 and 0.12. Mean over the layer's
    matrices of the participation ratio of squared singular values, over the largest possible rank.
    """
    rank = weight_spectra.mean_ratio
    assert scipy.stats.pearsonr(rank, residual_geometry.participation_ratio.values[1:][rank.layer]).pvalue > 0.05


@claim("T-4.33b", "control")
def test_rank_for_90_percent_does_not_predict_dimension(residual_geometry, weight_spectra):
    """The rank that holds 90 % of the weights' energy does not predict the dimension either: Pearson's p > 0.05.

    The published files say it does (r = 0.473, p = 0.004): T-4.33 depends on which rank is meant.
    """
    rank = weight_spectra.of(weight_spectra.mean("energy_rank_90"), *weight_spectra.matrices)
    assert scipy.stats.pearsonr(rank, residual_geometry.participation_ratio.values[1:][rank.layer]).pvalue > 0.05


@claim("T-4.33c", "control")
def test_weight_rank_does_not_predict_robust_dimension(residual_geometry, weight_spectra):
    """The effective rank of the weights does not predict the robust effective dimension: Pearson's p > 0.05.

    Without the massive tokens that make the published profile; a chance relation could hide behind them.
    """
    rank = weight_spectra.mean_ratio
    assert scipy.stats.pearsonr(rank, residual_geometry.robust_participation_ratio.values[1:][rank.layer]).pvalue > 0.05
