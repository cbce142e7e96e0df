"""How T-11 makes mixed-precision recipes, and what they lose."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from lab.experiments.systems.measuring.quantization_workbench import Variables, Workbench, law
from lab.experiments.systems.quantization import WIDTHS_OF_ORACLE
from lab.quantization import recipes
from lab.quantization.layers import Plan
from lab.records import variable
from lab.residual.programs import Program
from lab.residual.sweeps import Sample, token_mean


def recipe_variables(work: Workbench, texts: Sample, measured: Mapping[str, xr.Variable]) -> Variables:
    """Recipes of the source, a true oracle, one histogram dealt out by several predictors, and at random."""
    n = work.n_layers
    bits = _recipe_bits(work, measured)
    permuted = recipes.permuted_thirds(n, work.budget.permutations)
    programs = {name: work.layerwise(vector) for name, vector in bits.items()}
    programs["qk3_vmul5"] = _qk3_vmul5(work)
    programs |= {f"permutation {index}": work.layerwise(vector) for index, vector in enumerate(permuted)}
    loss = work.losses("recipes", texts, programs)["loss"]
    named = len(bits) + 1
    spent = _bits_spent(work, bits)
    work.labels["recipe"] = list(spent)
    work.labels["recipe_layerwise"] = list(bits)
    return {
        "recipe_loss": variable(("recipe", "method_prompt"), loss[:named], "nat/token", "loss under the recipe"),
        "recipe_weighted_bits": variable("recipe", list(spent.values()), "bit", "mean width, weighted by parameters"),
        "recipe_bits": variable(
            ("recipe_layerwise", "layer"), np.stack(list(bits.values())), "bit", "width given to each layer"
        ),
        "permuted_recipe_loss": variable(
            ("permutation", "method_prompt"),
            loss[named:],
            "nat/token",
            "loss with the widths of a third each at 3, 4, 5 bits dealt at random",
        ),
    }


def _bits_spent(work: Workbench, bits: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean width of every recipe, weighted by parameters."""
    sizes = work.sizes
    of_layers = np.sum(list(sizes.values()), axis=0)
    of_types = np.array([of_type.sum() for of_type in sizes.values()])
    widths = np.array([_qk3_width(matrix) for matrix in sizes])
    layerwise = {name: recipes.mean_bits(vector, of_layers) for name, vector in bits.items()}
    return {**layerwise, "qk3_vmul5": recipes.mean_bits(widths, of_types)}


def _recipe_bits(work: Workbench, measured: Mapping[str, xr.Variable]) -> dict[str, np.ndarray]:
    n = work.n_layers
    widths = list(work.budget.layer_bits)
    tokens = measured["scored_tokens"].values
    baseline = float(token_mean(measured["baseline_loss"].values, tokens))
    rise = token_mean(measured["layer_loss"].values, tokens) - baseline
    two, three = rise[:, widths.index(2)], rise[:, widths.index(3)]
    rank = measured["effective_rank_ratio"].values.mean(1)
    at_ends = -np.minimum(np.arange(n), n - 1 - np.arange(n)).astype(float)
    sizes = np.sum(list(work.sizes.values()), axis=0)
    oracle = recipes.greedy_oracle(_losses_by_curvature(work, three), WIDTHS_OF_ORACLE, sizes)
    return {
        "uniform_4bit": recipes.ends(n, first=4, last=4),
        "t9_spectral": recipes.published_rule(rank),
        "sensitivity_oracle": recipes.published_rule(np.exp(baseline) * np.expm1(two)),
        "first_last_protected": recipes.first_last_protected(n),
        "first_layer_5bit": recipes.ends(n, first=5, last=4),
        "last_layer_5bit": recipes.ends(n, first=4, last=5),
        "first_last_8bit": recipes.ends(n, first=8, last=8),
        "greedy_oracle": oracle,
        "sensitivity_thirds": recipes.thirds(two),
        "rank_thirds": recipes.thirds(rank),
        "low_rank_thirds": recipes.thirds(-rank),
        "ends_thirds": recipes.thirds(at_ends),
    }


def _losses_by_curvature(work: Workbench, three: np.ndarray) -> np.ndarray:
    """Single-layer losses [layer, width of the oracle]: measured at 3 bits, above by the squared weight error.

    Single layers at 4 and 5 bits lie below what some hundred tokens resolve; small damage grows with the square of the
    error, D_b = D_3 (e_b / e_3)^2 (calibrated on planted noise), so that the 3-bit loss tells more about them.
    """
    error = np.array([law(work, work.rounding(width)) for width in WIDTHS_OF_ORACLE])
    scaled: np.ndarray = np.maximum(three, 0)[:, None] * (error / error[0]) ** 2
    return scaled


def _qk3_width(matrix: str) -> int:
    return 3 if matrix in ("q_proj", "k_proj") else 5


def _qk3_vmul5(work: Workbench) -> Program:
    plan = Plan(tuple((matrix, work.rounding(_qk3_width(matrix))) for matrix in work.workshop.types))
    return work.workshop.program([plan] * work.n_layers)
