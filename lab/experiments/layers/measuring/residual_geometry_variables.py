"""What T-4 keeps of a measurement: the variables of its record, all of them sums or means per prompt."""

from __future__ import annotations

#: layers between two states whose cosine is kept
GAPS = (1, 2, 4, 8, 16)
_MEAN = "mean over the tokens of the prompt"
_SITE, _LAYER = ("site", "prompt"), ("layer", "prompt")
#: name in a measured record -> dimensions, unit, description
RECORDED: dict[str, tuple[tuple[str, ...], str, str]] = {
    "scored_tokens": (("prompt",), "token", "tokens measured of the prompt"),
    "norm": (_SITE, "norm", f"norm of the state, {_MEAN}"),
    "norm_square": (_SITE, "norm^2", f"squared norm of the state, {_MEAN}"),
    "norm_min": (_SITE, "norm", "smallest norm of a state of the prompt"),
    "norm_max": (_SITE, "norm", "largest norm of a state of the prompt"),
    "norm_median": (("site",), "norm", "median norm over all tokens, not resampled"),
    "cosine_to_embedding": (_SITE, "cosine", f"cosine with the embedding, {_MEAN}"),
    "cosine_to_final": (_SITE, "cosine", f"cosine with the final state, {_MEAN}"),
    "final_projection_signed": (_SITE, "norm", f"component of embedding or update along the final state, {_MEAN}"),
    "final_projection_signed_square": (_SITE, "norm^2", f"its square, {_MEAN}"),
    "final_norm_fraction": (_SITE, "fraction", f"that component over the final norm, {_MEAN}"),
    "update_norm": (_LAYER, "norm", f"norm of the update, {_MEAN}"),
    "update_norm_square": (_LAYER, "norm^2", f"squared norm of the update, {_MEAN}"),
    "cosine_input_output": (_LAYER, "cosine", f"cosine of the layer's input and output, {_MEAN}"),
    "cosine_input_output_square": (_LAYER, "1", f"its square, {_MEAN}"),
    "update_ratio": (_LAYER, "ratio", f"norm of the update over norm of the output, {_MEAN}"),
    "update_ratio_square": (_LAYER, "1", f"its square, {_MEAN}"),
    "update_alignment": (_LAYER, "cosine", f"cosine of the update with the layer's input, {_MEAN}"),
    "update_alignment_square": (_LAYER, "1", f"its square, {_MEAN}"),
    "update_cosine_to_final": (_LAYER, "cosine", f"cosine of the update with the final state, {_MEAN}"),
    "update_projection_fraction": (_LAYER, "fraction", f"size of that cosine, {_MEAN}"),
    "update_mean": (("layer", "prompt", "component"), "1", f"update, {_MEAN}"),
    "drift_cosine": (("gap", "layer", "prompt"), "cosine", f"cosine of the states a gap of layers apart, {_MEAN}"),
    "scatter": (("site", "weighting", "prompt"), "norm^2", "trace of the prompt's scatter matrix A_r"),
    "scatter_product": (("site", "weighting", "prompt", "prompt_other"), "norm^4", "<A_r, A_s>"),
    "direction_scatter": (
        ("site", "direction", "prompt"),
        "norm^2",
        "squared centred states of the prompt along the principal directions of all",
    ),
    "outlier_tokens": (_SITE, "token", "tokens of the prompt of a norm above the outlier factor times the median"),
    "cosine_sum": (("site", "centring", "prompt", "prompt_other"), "1", "sum of the cosines over pairs of tokens"),
    "cosine_square_sum": (
        ("site", "centring", "prompt", "prompt_other"),
        "1",
        "sum of the squared cosines over pairs of tokens",
    ),
    "state_product": (("site", "prompt", "prompt_other"), "norm^2", "inner product of two prompts' summed states"),
    "flatness_rank": ((), "count", "leading eigenvalues that enter spectral_flatness_leading"),
    "category_gap_p_value": (
        (),
        "probability",
        "chance that shuffled categories have as large a gap at the best site",
    ),
}
