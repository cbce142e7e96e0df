"""How T-11 measures: layer programs with quantized layers, whole-model methods, recipes, and weight errors."""

from __future__ import annotations

import json

import numpy as np
import xarray as xr

from lab.corpora.corpus import Corpus
from lab.experiments.systems.measuring.quantization_methods import NOISE_SEED, TRUE_TWO_BITS, Method, methods
from lab.experiments.systems.measuring.quantization_recipes import recipe_variables
from lab.experiments.systems.measuring.quantization_weights import memory_variables, weight_variables
from lab.experiments.systems.measuring.quantization_workbench import Texts, Variables, Workbench, law, samples
from lab.experiments.systems.quantization import MATRIX_BITS, TYPE_BITS, Budget
from lab.quantization.layers import WeightMap, matrices
from lab.quantization.libraries import installed_libraries
from lab.quantization.rounding import (
    relative_error,
)
from lab.records import variable
from lab.residual.programs import Program, identity, skip
from lab.residual.sweeps import Sample
from lab.store import Sweep
from lab.subjects.loading import LoadedSubject


def measure(subject: LoadedSubject, corpus: Corpus, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """See `lab.experiments.systems.quantization.measure`."""
    versions = installed_libraries()
    work = Workbench.of(subject, budget, sweep, versions)
    texts = samples(corpus, subject, budget)
    variables = weight_variables(work) | _layer_variables(work, texts.layers)
    variables |= _matrix_variables(work, texts.matrices) | _type_variables(work, texts.methods)
    variables |= _method_variables(work, texts)
    variables |= recipe_variables(work, texts.methods, variables)
    variables |= memory_variables(subject, work)
    coords = {
        "layer": np.arange(work.n_layers),
        "matrix_layer": np.arange(0, work.n_layers, budget.matrix_stride),
        "bits": list(budget.layer_bits),
        "matrix": list(work.workshop.types),
        "prompt_id": ("prompt", list(texts.layers.prompts)),
        "method_prompt_id": ("method_prompt", list(texts.methods.prompts)),
        "matrix_prompt_id": ("matrix_prompt", list(texts.matrices.prompts)),
    }
    settings = {
        "group_size": work.group,
        "matrix_bits": MATRIX_BITS,
        "type_bits": TYPE_BITS,
        "noise_seed": NOISE_SEED,
        "quantization_libraries": versions,
        "text": "the subject's own completions as running text, without their prompts",
        "calibration_tokens": sum(len(text.ids) for text in texts.calibration),
    }
    return xr.Dataset(variables, coords | work.labels, {"settings": json.dumps(settings)})


# ---- layers and matrices


def _layer_variables(work: Workbench, texts: Sample) -> Variables:
    """Single layers at every width and at true 2 bits, layers removed, and all layers at once, on one text."""
    n, shop, widths = work.n_layers, work.workshop, work.budget.layer_bits
    true_two = shop.all(work.rounding(2, TRUE_TWO_BITS))
    programs: dict[str, Program] = {"intact": identity(n)}
    for width in widths:
        plan = shop.all(work.rounding(width))
        programs |= {f"layer {layer} at {width} bits": shop.one_layer(layer, plan) for layer in range(n)}
    programs |= {f"layer {layer} at 2 bits, four levels": shop.one_layer(layer, true_two) for layer in range(n)}
    programs |= {f"without layer {layer}": skip(n, [layer]) for layer in range(n)}
    programs |= {f"all layers at {width} bits": work.uniform(width) for width in widths}
    loss = work.losses("quantized layers", texts, programs)["loss"]
    shaped = loss[1 : 1 + n * len(widths)].reshape(len(widths), n, -1)
    four_levels, removed, whole = np.split(loss[1 + n * len(widths) :], [n, 2 * n])
    single = ("layer", "prompt")
    return {
        "scored_tokens": variable("prompt", texts.scored_tokens, "token", "scored tokens of the layer sweep"),
        "baseline_loss": variable("prompt", loss[0], "nat/token", "loss of the intact model"),
        "layer_loss": variable(
            ("layer", "bits", "prompt"), shaped.swapaxes(0, 1), "nat/token", "loss with one layer rounded to nearest"
        ),
        "true_two_bit_loss": variable(
            single, four_levels, "nat/token", "loss with one layer at 2 bits with four MSE-optimal levels"
        ),
        "knockout_loss": variable(single, removed, "nat/token", "loss without the layer, on the same text"),
        "whole_loss": variable(
            ("bits", "prompt"), whole, "nat/token", "loss with all layers rounded, on the same text"
        ),
    }


def _matrix_variables(work: Workbench, texts: Sample) -> Variables:
    """Single matrices of every so manieth layer at 2 bits, with the intact loss of the same texts."""
    n, shop = work.n_layers, work.workshop
    layers = range(0, n, work.budget.matrix_stride)
    programs: dict[str, Program] = {"intact": identity(n)}
    for layer in layers:
        for matrix in shop.types:
            plan = shop.only(matrix, work.rounding(MATRIX_BITS))
            programs[f"{matrix} of layer {layer} at {MATRIX_BITS} bits"] = shop.one_layer(layer, plan)
    loss = work.losses("quantized matrices", texts, programs)["loss"]
    return {
        "matrix_scored_tokens": variable("matrix_prompt", texts.scored_tokens, "token", "scored tokens of this sweep"),
        "matrix_baseline_loss": variable("matrix_prompt", loss[0], "nat/token", "intact loss on the same texts"),
        "matrix_loss": variable(
            ("matrix_layer", "matrix", "matrix_prompt"),
            loss[1:].reshape(len(layers), len(shop.types), -1),
            "nat/token",
            f"loss with a single matrix at {MATRIX_BITS} bits",
        ),
    }


def _type_variables(work: Workbench, texts: Sample) -> Variables:
    shop = work.workshop
    plans = {matrix: shop.only(matrix, work.rounding(TYPE_BITS)) for matrix in shop.types}
    programs = {
        f"{matrix} of all layers at {TYPE_BITS} bits": shop.program([plan] * work.n_layers)
        for matrix, plan in plans.items()
    }
    loss = work.losses("matrix types", texts, programs)["loss"]
    return {
        "type_loss": variable(
            ("matrix", "method_prompt"),
            loss,
            "nat/token",
            f"loss with one matrix type at {TYPE_BITS} bits in all layers",
        )
    }


# ---- whole models


def _method_variables(work: Workbench, texts: Texts) -> Variables:
    known = methods(work.workshop, work.group, texts.calibration)
    chosen = [method for method in known if work.has_library_of(method.name)]
    programs = {method.name: method.program(work.workshop) for method in chosen}
    loss = work.losses("methods", texts.methods, {"intact": identity(work.n_layers), **programs})["loss"]
    work.labels["method"] = list(programs)
    dims, tokens = ("method", "method_prompt"), texts.methods.scored_tokens
    return {
        "method_scored_tokens": variable("method_prompt", tokens, "token", "scored tokens of methods"),
        "method_baseline_loss": variable("method_prompt", loss[0], "nat/token", "intact loss on the same texts"),
        "method_loss": variable(dims, loss[1:], "nat/token", "loss of the whole model under the method"),
        "method_nominal_bits": variable("method", [m.bits for m in chosen], "bit", "nominal width; NaN for noise"),
        "method_stored_bits": variable(
            "method",
            [_stored_bits(work, method) for method in chosen],
            "bit",
            "stored per weight of the layers' linear maps, scales included; NaN for noise",
        ),
        "method_weight_error": variable(
            "method",
            [_middle_layer_error(work, method.weights) for method in chosen],
            "1",
            "||W - W_hat|| / ||W||, mean over the matrices of the middle layer; NaN if activations change too",
        ),
        "method_gaussian_error": variable(
            "method",
            [law(work, None if method.calibrated else method.weights) for method in chosen],
            "1",
            "the same for Gaussian weights; NaN for methods that are calibrated on texts",
        ),
    }


def _stored_bits(work: Workbench, method: Method) -> float:
    """Mean over the weights of all linear maps."""
    shapes = [linear.weight.shape for layer in work.workshop.decoder.layers for linear in matrices(layer).values()]
    weights = np.array([rows * columns for rows, columns in shapes])
    return float(np.average([method.stored(columns) for _, columns in shapes], weights=weights))


def _middle_layer_error(work: Workbench, weights: WeightMap | None) -> float:
    if weights is None:
        return float("nan")
    middle = work.n_layers // 2
    errors = []
    for path, linear in matrices(work.workshop.decoder.layers[middle]).items():
        own = linear.weight.detach()
        errors.append(relative_error(own, weights(own, f"{middle}.{path}")))
    return float(np.mean(errors))
