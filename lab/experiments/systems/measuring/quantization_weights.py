"""T-11 on weights alone: errors of rounding, traces of earlier storage, and memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lab.experiments.systems.measuring.quantization_workbench import Variables, Workbench, law
from lab.quantization import footprint
from lab.quantization.layers import label, matrices
from lab.quantization.rounding import (
    distinct_values,
    relative_error,
)
from lab.records import variable
from lab.store import Arrays
from lab.subjects.loading import LoadedSubject
from lab.subjects.weights import required_location


def weight_variables(work: Workbench) -> Variables:
    """Relative errors of rounding, the Gaussian law beside them, and what the weights look like before."""
    bits = sorted({*work.budget.layer_bits, 8, 6, 4, 3, 2}, reverse=True)
    found = work.losses.sweep.shard("weights", partial(_weight_arrays, work, bits))
    work.labels["error_bits"] = list(bits)
    dims = ("layer", "error_bits", "matrix")
    gaussian = [law(work, work.rounding(width)) for width in bits]
    return {
        "weight_relative_error": variable(dims, found["error"], "1", "||W - W_hat|| / ||W|| of round-to-nearest"),
        "gaussian_relative_error": variable("error_bits", gaussian, "1", "the same for Gaussian weights"),
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


def memory_variables(subject: LoadedSubject, work: Workbench) -> Variables:
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
    known = [method for method in footprint.METHODS if work.has_library_of(method)]
    work.losses.sweep.progress(0, len(known), "memory")
    compute = partial(_footprint_arrays, folder, known, work.group)
    columns = work.losses.sweep.shard(f"memory of {', '.join(known)}", compute)
    work.labels["memory_method"] = known
    dim = "memory_method"
    return found | {
        "stored_memory": variable(dim, columns["stored"], "GB", "bytes of all tensors of the loaded model"),
        "resident_memory": variable(dim, columns["resident"], "GB", "growth of a process of its own, trimmed"),
        "expected_memory": variable(dim, [expected[m] for m in known], "GB", "parameter arithmetic"),
        "load_seconds": variable(dim, columns["seconds"], "s", "time to load and quantize, one thread"),
    }


def _footprint_arrays(folder: Path, methods: Sequence[str], group: int) -> Arrays:
    rows = footprint.footprints(folder, methods, group)
    return {key: np.array([rows[name][key] for name in methods]) for key in ("stored", "resident", "seconds")}


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
