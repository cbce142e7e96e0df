"""How T-11 measures: layer programs with quantized layers, whole-model methods, recipes, and weight errors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from lab.corpora.batches import TokenText
from lab.corpora.corpus import Corpus, Text
from lab.errors import UserError
from lab.experiments.systems.measuring.quantization_methods import LAW_ROWS, NOISE_SEED, TRUE_TWO_BITS, methods
from lab.experiments.systems.quantization import MATRIX_BITS, TYPE_BITS, WIDTHS_OF_ORACLE, Budget
from lab.quantization import footprint, recipes
from lab.quantization.layers import Plan, WeightMap, Workshop, label, matrices
from lab.quantization.libraries import require_libraries
from lab.quantization.rounding import (
    Rounding,
    distinct_values,
    gaussian_error,
    largest_group,
    relative_error,
)
from lab.records import variable
from lab.residual.executor import Executor
from lab.residual.programs import Program, identity, skip
from lab.residual.sweeps import ProgramLosses, Sample, token_mean
from lab.store import Arrays, Sweep
from lab.subjects.loading import LoadedSubject
from lab.subjects.weights import required_location

Variables = dict[str, xr.Variable]


def measure(subject: LoadedSubject, corpus: Corpus, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """See `lab.experiments.systems.quantization.measure`."""
    versions = require_libraries()
    work = Workbench.of(subject, budget, sweep)
    layer_texts, method_texts, matrix_texts = samples(corpus, subject, budget)
    variables = _weight_variables(work) | _layer_variables(work, layer_texts)
    variables |= _matrix_variables(work, matrix_texts) | _type_variables(work, method_texts)
    variables |= _method_variables(work, method_texts)
    variables |= _recipe_variables(work, method_texts, variables)
    variables |= _memory_variables(subject, work)
    coords = {
        "layer": np.arange(work.n_layers),
        "matrix_layer": np.arange(0, work.n_layers, budget.matrix_stride),
        "bits": list(budget.layer_bits),
        "matrix": list(work.workshop.types),
        "prompt_id": ("prompt", list(layer_texts.prompts)),
        "method_prompt_id": ("method_prompt", list(method_texts.prompts)),
        "matrix_prompt_id": ("matrix_prompt", list(matrix_texts.prompts)),
    }
    settings = {
        "group_size": work.group,
        "matrix_bits": MATRIX_BITS,
        "type_bits": TYPE_BITS,
        "noise_seed": NOISE_SEED,
        "quantization_libraries": versions,
        "text": "the subject's own completions as running text, without their prompts",
    }
    return xr.Dataset(variables, coords | work.labels, {"settings": json.dumps(settings)})


@dataclass(frozen=True)
class Workbench:
    """What every part of the measurement works with."""

    workshop: Workshop
    losses: ProgramLosses
    budget: Budget
    group: int
    labels: dict[str, list[str] | list[int]]

    @classmethod
    def of(cls, subject: LoadedSubject, budget: Budget, sweep: Sweep) -> Workbench:
        """The tools for one subject."""
        workshop = Workshop(subject.decoder)
        executor = Executor(subject.decoder)
        executor.variants = workshop.variants  # filled as programs are written
        columns = {m.in_features for layer in subject.decoder.layers for m in matrices(layer).values()}
        losses = ProgramLosses(executor, sweep, budget.batch_tokens, budget.head_dtype)
        return cls(workshop, losses, budget, largest_group(columns, budget.group_sizes), {})

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return self.workshop.decoder.n_layers

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.workshop.decoder.dtype

    def rounding(self, bits: int, scheme: str = "symmetric_amax") -> Rounding:
        """Round-to-nearest with this subject's group size."""
        return Rounding(bits, self.group, scheme)

    def uniform(self, bits: int) -> Program:
        """Every layer at one width."""
        return self.layerwise([bits] * self.n_layers)

    def layerwise(self, bits: Sequence[int] | np.ndarray) -> Program:
        """Every layer at its own width."""
        return self.workshop.program([self.workshop.all(self.rounding(int(width))) for width in bits])

    @property
    def sizes(self) -> dict[str, np.ndarray]:
        """Weights of each matrix type [layer]."""
        layers = self.workshop.decoder.layers
        return {
            matrix: np.array(
                [
                    sum(m.weight.numel() for path, m in matrices(layer).items() if label(path) == matrix)
                    for layer in layers
                ]
            )
            for matrix in self.workshop.types
        }


def samples(corpus: Corpus, subject: LoadedSubject, budget: Budget) -> tuple[Sample, Sample, Sample]:
    """Texts of the layer sweep, of methods and recipes, and of single matrices (the first texts of the layer sweep).

    A text is one completion without its prompt, as running text; each is a block of correlated tokens, at most
    `block_tokens` long, and the unit of the bootstrap. Recipes are judged on texts that the layer sweep, from which
    some of them are made, has not seen. Where the corpus is too short for both, it is divided in proportion.
    """
    start = _start_token(corpus, subject)
    texts = [(text.id, _running(text, start, budget.block_tokens)) for text in corpus.texts]
    usable = [(name, text) for name, text in texts if text.targets]
    total = sum(len(text.ids) for _, text in usable)
    wanted = budget.layer_tokens, budget.method_tokens
    scale = 1.0 if None in wanted else min(1.0, total / (wanted[0] + wanted[1]))  # type: ignore[operator]
    if wanted[0] is None:  # everything: every second text, so that both halves are balanced
        halves = usable[::2], usable[1::2]
    else:
        first = _prefix(usable, wanted[0] * scale)
        halves = first, _prefix(usable[len(first) :], (wanted[1] or total) * scale)
    if not all(halves):
        raise UserError(f"the completions of {corpus.subject} are too few for two samples; make more of them")
    matrix = halves[0] if budget.matrix_tokens is None else _prefix(halves[0], budget.matrix_tokens)
    layer_texts, method_texts, matrix_texts = map(_sample, (*halves, matrix))
    return layer_texts, method_texts, matrix_texts


def _start_token(corpus: Corpus, subject: LoadedSubject) -> tuple[int, ...]:
    """The start token, where the subject's prompts begin with it: its attention sinks need one."""
    begin = getattr(subject.decoder.config, "bos_token_id", None)
    return (begin,) if begin is not None and all(text.prompt_ids[:1] == (begin,) for text in corpus.texts) else ()


def _running(text: Text, start: tuple[int, ...], longest: int | None) -> TokenText:
    body = text.completion_ids[:longest]
    first = len(start)
    targets = (index + first for index in range(len(body)) if text.novel[index] and index + first > 0)
    return TokenText(start + body, tuple(targets))


def _prefix(texts: Sequence[tuple[str, TokenText]], tokens: float) -> list[tuple[str, TokenText]]:
    lengths = np.cumsum([len(text.ids) for _, text in texts])
    return list(texts[: int(np.searchsorted(lengths, tokens)) + 1])


def _sample(texts: Sequence[tuple[str, TokenText]]) -> Sample:
    return Sample(tuple(name for name, _ in texts), tuple(text for _, text in texts), ((),) * len(texts))


# ---- weights


def _weight_variables(work: Workbench) -> Variables:
    """Relative errors of rounding, the Gaussian law beside them, and what the weights look like before."""
    bits = sorted({*work.budget.layer_bits, 8, 6, 4, 3, 2}, reverse=True)
    found = work.losses.sweep.shard("weights", partial(_weight_arrays, work, bits))
    work.labels["error_bits"] = list(bits)
    dims = ("layer", "error_bits", "matrix")
    law = [_law(work, work.rounding(width)) for width in bits]
    return {
        "weight_relative_error": variable(dims, found["error"], "1", "||W - W_hat|| / ||W|| of round-to-nearest"),
        "gaussian_relative_error": variable("error_bits", law, "1", "the same for Gaussian weights"),
        "distinct_values": variable(
            ("layer", "matrix"), found["distinct"], "1", "mean number of distinct values in 32 consecutive weights"
        ),
        "effective_rank_ratio": variable(
            ("layer", "matrix"), found["rank"], "1", "participation ratio of squared singular values over the rank"
        ),
        "matrix_weights": variable(
            ("layer", "matrix"), np.stack([work.sizes[name] for name in work.workshop.types], 1), "weight", "weights"
        ),
    }


def _weight_arrays(work: Workbench, bits: Sequence[int]) -> Arrays:
    types = list(work.workshop.types)
    shape = (work.n_layers, len(types))
    error = np.zeros((work.n_layers, len(bits), len(types)))
    distinct, rank = np.zeros(shape), np.zeros(shape)
    for layer, module in enumerate(work.workshop.decoder.layers):
        for path, linear in matrices(module).items():
            at = types.index(label(path))
            weight = linear.weight.detach()
            distinct[layer, at], rank[layer, at] = distinct_values(weight), _effective_rank_ratio(weight)
            for index, width in enumerate(bits):
                error[layer, index, at] = relative_error(weight, work.rounding(width)(weight))
        work.losses.sweep.progress(layer + 1, work.n_layers, "weights")
    return {"error": error, "distinct": distinct, "rank": rank}


def _effective_rank_ratio(weight: torch.Tensor) -> float:
    """(sum s^2)^2 / sum s^4 over min(shape), from the smaller Gram matrix: its trace and its Frobenius norm."""
    wide = weight.float()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    energy = float(gram.double().square().sum())
    return float(gram.trace().double()) ** 2 / energy / min(weight.shape) if energy else 0.0


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


def _method_variables(work: Workbench, texts: Sample) -> Variables:
    chosen = methods(work.workshop, work.group)
    programs = {method.name: method.program(work.workshop) for method in chosen}
    loss = work.losses("methods", texts, {"intact": identity(work.n_layers), **programs})["loss"]
    work.labels["method"] = list(programs)
    maps = [method.weights for method in chosen]
    dims = ("method", "method_prompt")
    return {
        "method_scored_tokens": variable("method_prompt", texts.scored_tokens, "token", "scored tokens of methods"),
        "method_baseline_loss": variable("method_prompt", loss[0], "nat/token", "intact loss on the same texts"),
        "method_loss": variable(dims, loss[1:], "nat/token", "loss of the whole model under the method"),
        "method_nominal_bits": variable("method", [m.bits for m in chosen], "bit", "nominal width; NaN for noise"),
        "method_weight_error": variable(
            "method",
            [_middle_layer_error(work, weights) for weights in maps],
            "1",
            "||W - W_hat|| / ||W||, mean over the matrices of the middle layer; NaN if activations change too",
        ),
        "method_gaussian_error": variable(
            "method", [_law(work, weights) for weights in maps], "1", "the same for Gaussian weights"
        ),
    }


def _middle_layer_error(work: Workbench, weights: WeightMap | None) -> float:
    if weights is None:
        return float("nan")
    middle = work.workshop.decoder.layers[work.n_layers // 2]
    originals = [linear.weight.detach() for linear in matrices(middle).values()]
    return float(np.mean([relative_error(weight, weights(weight)) for weight in originals]))


def _law(work: Workbench, weights: WeightMap | None) -> float:
    return float("nan") if weights is None else gaussian_error(weights, work.group * LAW_ROWS, work.dtype)


def _recipe_variables(work: Workbench, texts: Sample, measured: Mapping[str, xr.Variable]) -> Variables:
    """Recipes of the source, a true oracle, one histogram dealt out by several predictors, and at random."""
    n = work.n_layers
    bits = _recipe_bits(work, measured)
    permuted = recipes.permuted_thirds(n, work.budget.permutations)
    programs = {name: work.layerwise(vector) for name, vector in bits.items()}
    programs["qk3_vmul5"] = _qk3_vmul5(work)
    programs |= {f"permutation {index}": work.layerwise(vector) for index, vector in enumerate(permuted)}
    loss = work.losses("recipes", texts, programs)["loss"]
    named = len(bits) + 1
    sizes = work.sizes
    layer_sizes = np.sum(list(sizes.values()), axis=0)
    spent = {name: recipes.mean_bits(vector, layer_sizes) for name, vector in bits.items()}
    of_type = {matrix: _qk3_width(matrix) for matrix in sizes}
    spent["qk3_vmul5"] = recipes.mean_bits(
        np.array(list(of_type.values())), np.array([s.sum() for s in sizes.values()])
    )
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

    Single layers at 4 and 5 bits lie below what a thousand tokens resolve; small damage grows with the square of the
    error, D_b = D_3 (e_b / e_3)^2 (calibrated on planted noise), so that the 3-bit loss tells more about them.
    """
    law = np.array([_law(work, work.rounding(width)) for width in WIDTHS_OF_ORACLE])
    scaled: np.ndarray = np.maximum(three, 0)[:, None] * (law / law[0]) ** 2
    return scaled


def _qk3_width(matrix: str) -> int:
    return 3 if matrix in ("q_proj", "k_proj") else 5


def _qk3_vmul5(work: Workbench) -> Program:
    plan = Plan(tuple((matrix, work.rounding(_qk3_width(matrix))) for matrix in work.workshop.types))
    return work.workshop.program([plan] * work.n_layers)


# ---- memory


def _memory_variables(subject: LoadedSubject, work: Workbench) -> Variables:
    """Memory of quantized models, one process each; and what arithmetic expects."""
    linear = int(sum(sizes.sum() for sizes in work.sizes.values()))
    total = sum(parameter.numel() for parameter in subject.model.parameters())
    head = subject.decoder.unembedding.weight.numel()
    expected = expected_gigabytes(linear, total, head, bool(subject.facts.tied), work.group)
    found = {
        "linear_weights": variable((), linear, "weight", "weights of the layers' linear maps"),
        "parameters": variable((), total, "weight", "all parameters, a tied matrix counted once"),
    }
    if not work.budget.footprints:
        return found
    folder = required_location(subject.facts)
    rows = []
    for index, method in enumerate(footprint.METHODS):
        compute = partial(_footprint_arrays, str(folder), method, work.group)
        rows.append(work.losses.sweep.shard(f"memory of {method}", compute))
        work.losses.sweep.progress(index + 1, len(footprint.METHODS), "memory")
    work.labels["memory_method"] = list(footprint.METHODS)
    columns = {key: [float(row[key]) for row in rows] for key in ("stored", "resident", "seconds")}
    dim = "memory_method"
    return found | {
        "stored_memory": variable(dim, columns["stored"], "GB", "bytes of all tensors of the loaded model"),
        "resident_memory": variable(dim, columns["resident"], "GB", "growth of a process of its own, trimmed"),
        "expected_memory": variable(dim, [expected[m] for m in footprint.METHODS], "GB", "parameter arithmetic"),
        "load_seconds": variable(dim, columns["seconds"], "s", "time to load and quantize, one thread"),
    }


def _footprint_arrays(folder: str, method: str, group: int) -> Arrays:
    return {key: np.array(value) for key, value in footprint.footprint(Path(folder), method, group).items()}


def expected_gigabytes(linear: int, parameters: int, head: int, tied: bool, group: int) -> dict[str, float]:
    """Memory from parameter counts [GB]: bfloat16 for what is not quantized.

    NF4 takes 4.127 bits (4, 8/64 for a block's scale, 32/(64 x 256) for the scale of scales); INT8 takes 8, its
    channel scales are neglected; torchao also quantizes the head, and a tied one then exists twice. On CPUs torchao
    keeps a 4-bit code in a byte, with a scale (2 bytes) and a zero point (1) per group.
    """
    rest = parameters - linear
    beside_head = rest if tied else rest - head
    in_bytes = {
        "bfloat16": 2.0 * parameters,
        "bitsandbytes_nf4": linear * 4.127 / 8 + 2.0 * rest,
        "bitsandbytes_int8": linear + 2.0 * rest,
        "torchao_int8_weight_only": linear + head + 2.0 * beside_head,
        "torchao_intx4_weight_only": (linear + head) * (1 + 3 / group) + 2.0 * beside_head,
    }
    return {method: size / footprint.GIGABYTE for method, size in in_bytes.items()}
