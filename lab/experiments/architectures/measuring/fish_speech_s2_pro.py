"""Counts from the tensor headers of a dual autoregressive speech checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import xarray as xr

from lab.architectures import fish_speech, headers
from lab.architectures.checkpoints import CONFIG
from lab.architectures.shapes import Shapes, parameters, subset
from lab.records import variable
from lab.subjects.configuration import read_config

PREFIXES = (fish_speech.SLOW, fish_speech.FAST)


def measure(folder: Path) -> xr.Dataset:
    """The figures of a checkpoint's `config.json` and safetensors headers."""
    config, found = read_config(folder / CONFIG), headers.read(folder)
    table = headers.shapes(found)
    by_prefix = [subset(table, prefix) for prefix in PREFIXES]
    slow, fast = (_per_layer(table, prefix, depth) for prefix, depth in zip(PREFIXES, _depths(config), strict=True))
    variables = {
        "tensor_count": variable((), len(table), "tensors", "tensors in the safetensors files"),
        "parameters_total": variable((), parameters(table), "parameters", "elements of all of them"),
        "parameters_by_prefix": variable("prefix", list(map(parameters, by_prefix)), "parameters", "elements by name"),
        "parameters_by_kind": variable(("prefix", "kind"), [_by_kind(part) for part in by_prefix], "parameters", KIND),
        "slow_layer_parameters": variable("layer", slow, "parameters", "elements of each Slow AR layer"),
        "fast_layer_parameters": variable("fast_layer", fast, "parameters", "elements of each Fast AR layer"),
    }
    dtypes = headers.dtypes(found)
    settings = {"config": config, "tensor_groups": headers.grouped(table), "weight_dtype": ", ".join(dtypes)}
    coords = {
        "prefix": list(PREFIXES),
        "kind": list(fish_speech.KINDS),
        "layer": range(len(slow)),
        "fast_layer": range(len(fast)),
    }
    digest = headers.digest(settings)
    return xr.Dataset(variables, coords, {"settings": json.dumps(settings), "digest": digest})


KIND = "elements by name and by what the tensors are for"


def _depths(config: fish_speech.Config) -> tuple[int, int]:
    return config["text_config"]["n_layer"], config["audio_decoder_config"]["n_layer"]


def _per_layer(table: Shapes, prefix: str, depth: int) -> list[int]:
    """Elements of each layer that the configuration names; 0 where the file has none."""
    return [parameters(subset(table, f"{fish_speech.STACKS[prefix]}.{index}.")) for index in range(depth)]


def _by_kind(table: Shapes) -> list[int]:
    kinds = {name: fish_speech.kind(name) for name in table}
    return [parameters({name: table[name] for name in table if kinds[name] == kind}) for kind in fish_speech.KINDS]
