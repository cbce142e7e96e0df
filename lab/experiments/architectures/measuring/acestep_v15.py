"""Counts from the tensor headers of a planning and synthesis music checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import xarray as xr

from lab.architectures import ace_step, checkpoints, headers
from lab.architectures.shapes import Shapes, parameters, subset
from lab.records import variable


def measure(folder: Path) -> xr.Dataset:
    """The figures of the configurations and safetensors headers that lie in a folder: all four models, or the DiT."""
    configs, found = checkpoints.configurations(folder), checkpoints.parts(folder)
    read = {role: headers.read(part) for role, part in found.items()}
    tables: dict[str, Shapes] = {}
    for role, part in read.items():
        tables |= ace_step.census(role, headers.shapes(part))
    # A component of which a file holds nothing counts as 0.
    named = [name for name, (role, _) in ace_step.COMPONENTS.items() if role in read]
    counts = [parameters(tables.get(name, {})) for name in named]
    variables = {
        "parameters": variable("component", counts, "parameters", "elements of the component's tensors"),
        "tensors": variable(
            "component", [len(tables.get(name, {})) for name in named], "tensors", "how many there are"
        ),
    }
    coords: dict[str, list[str] | range] = {"component": named}
    layers = _dit_layers(headers.shapes(read["dit"]), configs["dit"]["num_hidden_layers"]) if "dit" in read else []
    if layers:
        sizes, numbers = [parameters(layer) for layer in layers], [len(layer) for layer in layers]
        variables |= {
            "dit_layer_parameters": variable("layer", sizes, "parameters", "elements of each DiT layer"),
            "dit_layer_tensors": variable("layer", numbers, "tensors", "tensors of each DiT layer"),
        }
        coords["layer"] = range(len(layers))
    settings = {
        "configs": configs,
        "weight_dtype": {role: ", ".join(headers.dtypes(part)) for role, part in read.items()},
        "tensor_groups": {role: headers.grouped(headers.shapes(part)) for role, part in read.items()},
    }
    return xr.Dataset(variables, coords, {"settings": json.dumps(settings), "digest": headers.digest(settings)})


def _dit_layers(table: Shapes, depth: int) -> list[Shapes]:
    start = ace_step.COMPONENTS["dit_layers"][1]
    return [subset(table, f"{start}{index}.") for index in range(depth)]
