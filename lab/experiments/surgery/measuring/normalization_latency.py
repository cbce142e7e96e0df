"""Times of norms as kernels: on a CUDA device, where the source took them."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
import xarray as xr

from lab.normalization.latency import measured as measured_shape
from lab.normalization.latency import why_not_compiled
from lab.normalization.settings import Bench
from lab.records import variable
from lab.store import Arrays, Sweep

DIMENSIONS = ("norm_type", "hidden_size", "sequence_length")
COMPILED = "rms_norm_compiled"
DESCRIBED = {
    "forward_latency": "median time of a call",
    "backward_latency": "median time of the backward pass of its sum",
    "total_latency": "sum of the medians of forward and backward pass",
}


def coords(device: torch.device, bench: Bench) -> dict[str, Any]:
    """Labels of the timings' dimensions; none where no timings are taken."""
    labels = (list(bench.norm_types), list(bench.widths), list(bench.lengths))
    return dict(zip(DIMENSIONS, labels, strict=True)) if device.type == "cuda" else {}


def measured(device: torch.device, dtype: torch.dtype, bench: Bench, sweep: Sweep) -> dict[str, xr.Variable]:
    """Times of every norm at every shape [norm_type, hidden_size, sequence_length]; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    times = sweep.shard("latency", lambda: _times(device, dtype, bench, sweep))
    return {name: variable(DIMENSIONS, times[name], "ms", words) for name, words in DESCRIBED.items()}


def _times(device: torch.device, dtype: torch.dtype, bench: Bench, sweep: Sweep) -> Arrays:
    shape = (len(bench.norm_types), len(bench.widths), len(bench.lengths))
    found = np.full((2, *shape), np.nan)
    problem = why_not_compiled(device, dtype) if COMPILED in bench.norm_types else None
    if problem:
        warnings.warn(f"{COMPILED} is not timed: PyTorch cannot compile here ({problem})", RuntimeWarning, stacklevel=2)
    for done, place in enumerate(np.ndindex(shape)):
        kind, width, length = bench.norm_types[place[0]], bench.widths[place[1]], bench.lengths[place[2]]
        if kind != COMPILED or not problem:
            found[(slice(None), *place)] = measured_shape(kind, width, length, device, dtype, bench)
        sweep.progress(done + 1, int(np.prod(shape)), "shapes timed")
    return {"forward_latency": found[0], "backward_latency": found[1], "total_latency": found.sum(0)}
