"""FS Fish Speech S2 Pro: norms, largest singular values and effective ranks of the weight matrices over depth.

Published figures only: they need the weights, and a checkpoint is judged by its headers. What the sentences say of
depth is T-9's subject on other models. Depth bands: the first 15 % and the last 8 % of the layers, and the middle half.

Not claimed, and why:
- FS-29's further half, that the text embedding's first direction is its mean row: it needs the weights.
- FS-32, that six printed rows of selected matrices agree with the saved statistics: the printed rows are not in the
  record, which holds the saved ones alone. FS-32b and FS-32c check these in themselves.
- FS-35, that the Slow AR keeps the spectral profile of Qwen3-4B: a claim's records are of one subject, and these would
  be of two. T-9's effective rank needs the weights, too, and so does taking Q, K and V out of the packed matrix; the
  stable rank F^2 / s1^2 of the other four matrices would not.
"""

import pytest

from fixtures.claims import claim
from lab.architectures.weight_statistics import gaussian_effective_rank

TEXT, AUDIO = "text_model.model.embeddings", "audio_decoder.embeddings"
#: the source's bands of layers: first and last layer, least and greatest value, and printed decimals
NORMS = {
    "0": (0, 0, 146.4, 146.4, 1),
    "1": (1, 1, 107.8, 107.8, 1),
    "2-4": (2, 4, 103, 141, 0),
    "5-21": (5, 21, 150, 159, 0),
    "22-35": (22, 35, 156, 164, 0),
}
#: matrices of a layer
ALL = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
RANKS = {"0-4": (0, 4, 1955, 2113), "5-21": (5, 21, 2096, 2160), "22-35": (22, 35, 2124, 2230)}
MATRICES = ("attention.wqkv", "attention.wo")


@claim("FS-22", "published")
@pytest.mark.parametrize("layers", NORMS)
def test_norms_by_depth(fish_speech_s2_pro, layers):
    """Slow AR layers have a mean Frobenius norm of 146.4, then 107.8, 103-141 (2-4), 150-159 (5-21) and 156-164.

    Least and greatest value are within one of the printed bounds, in their last digit: some are cut, not rounded.
    """
    first, last, low, high, decimals = NORMS[layers]
    band = fish_speech_s2_pro.within(fish_speech_s2_pro.frobenius, first, last)
    assert abs(float(band.min()) - low) < 10**-decimals
    assert abs(float(band.max()) - high) < 10**-decimals


@claim("FS-22b", "published")
def test_lowest_norm(fish_speech_s2_pro):
    """The Frobenius norm dips at layer 1.

    A dip is the least of all layers.
    """
    assert int(fish_speech_s2_pro.frobenius.idxmin("layer")) == 1


@claim("FS-22c", "published")
def test_norms_rise_at_the_end(fish_speech_s2_pro):
    """From layer 22 to 35 the Frobenius norm has a slight upward trend.

    The rank correlation with depth within these layers is positive.
    """
    assert fish_speech_s2_pro.trend(fish_speech_s2_pro.within(fish_speech_s2_pro.frobenius, 22, 35)) > 0


@claim("FS-22d", "corrected")
def test_early_norms_are_smaller(fish_speech_s2_pro):
    """The first 15 % of the layers have norms below 0.9 times those of the rest, and norms grow with depth.

    Both limits are the spec's. They describe this model: neighbouring layers are alike, and of the 36 circular shifts
    of the profile two correlate as much as the profile itself (itself included), which is no proof against chance.
    """
    norms = fish_speech_s2_pro.frobenius
    assert fish_speech_s2_pro.beginning(norms) < 0.9 * fish_speech_s2_pro.rest(norms)
    assert fish_speech_s2_pro.trend(norms) > 0.6


@claim("FS-22e", "corrected")
def test_norms_rise_and_then_fall(fish_speech_s2_pro):
    """The Frobenius norm rises over layers 5 to 21, which the source calls a plateau, and falls from 22 to 35.

    Rank correlations with depth beyond 0.5, as for the growth of FS-25b.
    """
    norms = fish_speech_s2_pro.frobenius
    assert fish_speech_s2_pro.trend(fish_speech_s2_pro.within(norms, 5, 21)) > 0.5
    assert fish_speech_s2_pro.trend(fish_speech_s2_pro.within(norms, 22, 35)) < -0.5


@claim("FS-23", "published")
def test_extremes_of_the_spectral_norm(fish_speech_s2_pro):
    """The largest singular value is least at layer 7 and greatest at layer 35."""
    assert int(fish_speech_s2_pro.spectral.idxmax("layer")) == 35
    assert int(fish_speech_s2_pro.spectral.idxmin("layer")) == 7


@claim("FS-23b", "corrected")
def test_spectral_norm_rises_at_both_ends(fish_speech_s2_pro):
    """The largest singular value is above 1.1 times the middle half's at both ends, and greatest at the last layer.

    The least is at layer 21 (13.4); layer 7 (13.8) is the third.
    """
    spectral = fish_speech_s2_pro.spectral
    assert fish_speech_s2_pro.beginning(spectral) > 1.1 * fish_speech_s2_pro.middle(spectral)
    assert fish_speech_s2_pro.end(spectral) > 1.1 * fish_speech_s2_pro.middle(spectral)
    assert int(spectral.idxmax("layer")) == int(spectral.layer[-1])


@claim("FS-24", "published")
@pytest.mark.parametrize("matrix", ALL)
def test_ends_have_peaked_spectra(fish_speech_s2_pro, matrix):
    """Layers at both ends have spikier spectra than those in the middle, matrix by matrix.

    By the largest singular value over the Frobenius norm: the value alone grows with the norm.
    """
    peaked = fish_speech_s2_pro.matrix_peakedness.sel(matrix=matrix)
    assert fish_speech_s2_pro.beginning(peaked) > fish_speech_s2_pro.middle(peaked)
    assert fish_speech_s2_pro.end(peaked) > fish_speech_s2_pro.middle(peaked)


@claim("FS-24b", "corrected")
def test_ends_have_peaked_spectra_on_average(fish_speech_s2_pro):
    """On average over matrices spectra are spikier at both ends than in the middle; w1 alone is not so at the end.

    Above 1.1 times the middle half's, as for the largest singular values of FS-23b. w1 has 0.243 at the beginning,
    0.146 in the middle and 0.131 at the end.
    """
    peaked = fish_speech_s2_pro.peakedness
    assert fish_speech_s2_pro.beginning(peaked) > 1.1 * fish_speech_s2_pro.middle(peaked)
    assert fish_speech_s2_pro.end(peaked) > 1.1 * fish_speech_s2_pro.middle(peaked)
    assert [name for name, both in fish_speech_s2_pro.peaked_at_both_ends.items() if not both] == ["feed_forward.w1"]


@claim("FS-25", "published")
@pytest.mark.parametrize("layers", RANKS)
def test_effective_rank_by_depth(fish_speech_s2_pro, layers):
    """The effective rank of a layer is 1955-2113 in layers 0-4, 2096-2160 in 5-21 and 2124-2230 after.

    Least and greatest value are within one of the printed bounds.
    """
    first, last, low, high = RANKS[layers]
    band = fish_speech_s2_pro.within(fish_speech_s2_pro.effective_rank, first, last)
    assert abs(float(band.min()) - low) < 1
    assert abs(float(band.max()) - high) < 1


@claim("FS-25b", "published")
def test_effective_rank_grows(fish_speech_s2_pro):
    """The effective rank of a layer grows with depth.

    As a rank correlation above 0.5. What is called a layer's is that of its two attention matrices: see FS-25c.
    """
    assert fish_speech_s2_pro.trend(fish_speech_s2_pro.effective_rank) > 0.5


@claim("FS-25c", "corrected")
@pytest.mark.parametrize("matrix", MATRICES)
def test_effective_rank_of_attention_grows(fish_speech_s2_pro, matrix):
    """The effective rank of each attention matrix, relative to a Gaussian one of its shape, correlates with depth.

    Of attention alone: the source left out every matrix with a side above 8192, and so the whole MLP.
    """
    assert fish_speech_s2_pro.trend(fish_speech_s2_pro.rank_ratio(matrix)) > 0.5


@claim("FS-25d", "corrected")
def test_effective_rank_falls_at_the_end(fish_speech_s2_pro):
    """The effective rank of attention falls again: of the last third of the layers the last has the least."""
    third = fish_speech_s2_pro.effective_rank[-(fish_speech_s2_pro.effective_rank.size // 3) :]
    assert int(third.idxmin("layer")) == int(third.layer[-1])


@claim("FS-26", "control")
@pytest.mark.parametrize("name", ["frobenius_norm", "spectral_norm", "entropy_effective_rank"])
def test_table_of_the_fast_ar(fish_speech_s2_pro, name):
    """The Fast AR's table of layer means is the mean of its matrices.

    To the rounding of five printed digits, 1e-4. A control, for it could hardly fail: the layer means are equal to the
    mean of five rounded entries at its own rounding, so that they may have been made from them.
    """
    own = {
        "frobenius_norm": fish_speech_s2_pro.fast_frobenius,
        "spectral_norm": fish_speech_s2_pro.fast_spectral,
        "entropy_effective_rank": fish_speech_s2_pro.fast_effective_rank,
    }
    printed = fish_speech_s2_pro.variable(f"fast_ar_layer_mean_{name}")
    assert float(abs(own[name] / printed - 1).max()) < 1e-4


@claim("FS-27", "published")
def test_norm_of_the_last_fast_layer(fish_speech_s2_pro):
    """The last Fast AR layer has a Frobenius norm 17 % below that of the others."""
    norms = fish_speech_s2_pro.fast_frobenius
    assert round(100 * (1 - float(norms[-1] / norms[:-1].mean()))) == 17


@claim("FS-28", "published")
def test_the_last_fast_layer_spikes(fish_speech_s2_pro):
    """The last Fast AR layer is more specialised: it has the largest singular value and the lowest effective rank."""
    assert int(fish_speech_s2_pro.fast_effective_rank.idxmin("fast_layer")) == 3
    assert int(fish_speech_s2_pro.fast_spectral.idxmax("fast_layer")) == 3


@claim("FS-28b", "corrected")
def test_what_spikes_in_the_last_fast_layer(fish_speech_s2_pro):
    """In the last Fast AR layer w2 spikes, wo has its largest singular value and lowest rank, wqkv its highest rank.

    A spike: twice that of any other layer. The other three matrices have their largest singular value in layer 0,
    which has the larger mean.
    """
    spectral = fish_speech_s2_pro.variable("fast_ar_spectral_norm")
    ranks = fish_speech_s2_pro.variable("fast_ar_entropy_effective_rank")
    w2 = spectral.sel(matrix="feed_forward.w2")
    assert float(w2[-1]) > 2 * float(w2[:-1].max())
    assert spectral.idxmax("fast_layer").values.tolist() == [0, 3, 0, 3, 0]
    assert ranks.idxmin("fast_layer").values.tolist() == [0, 3]
    assert int(ranks.sel(attention_matrix="attention.wqkv").idxmax("fast_layer")) == 3


@claim("FS-29", "published")
def test_the_text_embedding_has_one_direction(fish_speech_s2_pro):
    """One direction makes up 73 % of the text embedding's norm.

    Largest singular value over Frobenius norm; 54 % of the squared norm.
    """
    assert round(fish_speech_s2_pro.dominance(TEXT), 2) == 0.73


@claim("FS-30", "published")
def test_the_audio_embedding_is_spread(fish_speech_s2_pro):
    """The audio embedding is spread over directions: the first has 16 % of its norm."""
    assert round(fish_speech_s2_pro.dominance(AUDIO), 2) == 0.16


@claim("FS-30b", "corrected")
def test_text_is_more_dominated_than_audio(fish_speech_s2_pro):
    """The first direction's share of the norm is more than twice as large in the text as in the audio embedding.

    The table of all codebooks (0.39) and the output head (0.26), which the source does not mention, are in between.
    """
    assert fish_speech_s2_pro.dominance(TEXT) > 2 * fish_speech_s2_pro.dominance(AUDIO)


@claim("FS-31", "published")
def test_output_projections_in_the_middle(fish_speech_s2_pro):
    """The output projection's largest singular value is 17.1 at the first layer, 8.6 at 17 and 22.7 at the last."""
    found = fish_speech_s2_pro.variable("slow_ar_spectral_norm").sel(matrix="attention.wo", layer=[0, 17, 35])
    assert found.round(1).values.tolist() == [17.1, 8.6, 22.7]


@claim("FS-31b", "corrected")
def test_output_projections_are_flatter_in_the_middle(fish_speech_s2_pro):
    """Both end layers' output projections have 1.5 times the largest singular value of the middle third's median."""
    found = fish_speech_s2_pro.variable("slow_ar_spectral_norm").sel(matrix="attention.wo")
    third = found.size // 3
    median = float(found[third : found.size - third].median())
    assert float(found[0]) > 1.5 * median
    assert float(found[-1]) > 1.5 * median


@claim("FS-32c", "control")
def test_norms_and_spreads_agree(fish_speech_s2_pro):
    """Norm and standard deviation of every layer matrix tell the same, to the rounding of five printed digits.

    Two columns that were computed apart: it guards the transcription. Rounding alone can make 6.8e-5 of these digits,
    and 5.8e-5 is what there is: 1e-4 leaves room for it and for the means of entries, which are not known.
    """
    assert fish_speech_s2_pro.norm_mismatch < 1e-4


@claim("FS-32b", "control")
@pytest.mark.parametrize("stack", ["slow_ar", "fast_ar"])
def test_spectra_are_possible(fish_speech_s2_pro, stack):
    """No largest singular value exceeds its Frobenius norm, and no effective rank of these weights a Gaussian matrix's.

    Nor its smaller side, which is more. In weights trained as these were a spectrum flatter than that of i.i.d. noise
    points to a mistake of the instrument; matrices made orthogonal would have one.
    """
    ranks = fish_speech_s2_pro.variable(f"{stack}_entropy_effective_rank")
    sides = [fish_speech_s2_pro.matrix_shapes[name] for name in MATRICES]
    limits = [gaussian_effective_rank(rows / columns) * min(rows, columns) for rows, columns in sides]
    peaks = fish_speech_s2_pro.variable(f"{stack}_spectral_norm") / fish_speech_s2_pro.variable(
        f"{stack}_frobenius_norm"
    )
    assert float(peaks.max()) < 1
    assert float((ranks / limits).max()) < 1
    assert float(ranks.min()) >= 1
