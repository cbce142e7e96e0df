"""What the headers of a checkpoint say: name, shape and dtype of every tensor; no weight is read."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lab.architectures.shapes import Shape, Shapes
from lab.errors import UserError
from lab.subjects.configuration import read_config, safetensors_of, tensor_headers

INDEX = "model.safetensors.index.json"

#: names of the safetensors format -> names of numpy and torch
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class Header:
    """Shape and dtype of one tensor, and the file that holds it."""

    shape: Shape
    dtype: str
    file: str


def read(folder: Path) -> dict[str, Header]:
    """Headers of all tensors of a checkpoint, one file or shards with an index.

    Raises:
        UserError: no safetensors, a damaged or truncated file, a tensor in two files, or an index that names
            tensors which its files lack.
    """
    found: dict[str, Header] = {}
    for file in safetensors_of(folder):
        here = _of_file(file)
        twice = sorted(found.keys() & here.keys())
        if twice:
            raise UserError(f"{file} repeats the tensor {twice[0]} of {found[twice[0]].file}; fetch the model again")
        found |= here
    index = folder / INDEX
    if index.exists():
        _check_index(index, found)
    return found


def shapes(headers: Mapping[str, Header]) -> Shapes:
    """The table of a checkpoint's tensors."""
    return {name: header.shape for name, header in headers.items()}


def dtypes(headers: Mapping[str, Header]) -> list[str]:
    """The dtypes that occur, sorted."""
    return sorted({header.dtype for header in headers.values()})


def pattern(name: str) -> str:
    """A tensor's name without its place in a stack: `layers.7.wo.weight` is one of `layers.{i}.wo.weight`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "{i}", name)


def grouped(table: Mapping[str, Shape]) -> list[dict[str, Any]]:
    """Tensors of one pattern and shape together, sorted: `{"name": ..., "shape": [...], "count": ...}`."""
    counts = Counter((pattern(name), shape) for name, shape in table.items())
    return [{"name": name, "shape": list(shape), "count": counts[name, shape]} for name, shape in sorted(counts)]


def group_parameters(groups: list[dict[str, Any]]) -> int:
    """Elements of groups of tensors."""
    return sum(group["count"] * prod(group["shape"]) for group in groups)


def digest(*parts: Any) -> str:
    """Digest of configurations and tables of tensors: two checkpoints of one architecture share it."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _of_file(file: Path) -> dict[str, Header]:
    return {
        name: Header(shape, DTYPES.get(dtype, dtype), file.name)
        for name, (shape, dtype) in tensor_headers(file).items()
    }


def _check_index(index: Path, found: Mapping[str, Header]) -> None:
    listed = read_config(index).get("weight_map", {})
    wrong = sorted(name for name in listed if name not in found or found[name].file != listed[name])
    if wrong:
        raise UserError(f"{index} puts {wrong[0]} into {listed[wrong[0]]}, which lacks it; fetch the model again")
