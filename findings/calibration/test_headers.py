"""Tensor headers of files that safetensors wrote: what they say, and one line for every way they can be damaged."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lab.architectures import headers
from lab.errors import UserError

pytestmark = pytest.mark.calibration

FIRST = {
    "a.layers.0.w": torch.zeros(2, 3, dtype=torch.bfloat16),
    "a.layers.1.w": torch.zeros(2, 3, dtype=torch.bfloat16),
}
SECOND = {"b": torch.zeros(5), "c.7": torch.zeros((), dtype=torch.float16)}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(FIRST | SECOND, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, tensors in zip(names, (FIRST, SECOND), strict=True):
        save_file(tensors, tmp_path / name)
    index = {name: file for file, tensors in zip(names, (FIRST, SECOND), strict=True) for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return tmp_path


def test_headers_of_one_file(single):
    found = headers.read(single)
    assert headers.shapes(found) == {"a.layers.0.w": (2, 3), "a.layers.1.w": (2, 3), "b": (5,), "c.7": ()}
    assert headers.dtypes(found) == ["bfloat16", "float16", "float32"]
    assert {header.file for header in found.values()} == {"model.safetensors"}


def test_headers_of_shards(sharded, tmp_path_factory):
    whole = tmp_path_factory.mktemp("whole")
    save_file(FIRST | SECOND, whole / "model.safetensors")
    assert headers.shapes(headers.read(sharded)) == headers.shapes(headers.read(whole))


def test_layers_are_grouped(single):
    groups = headers.grouped(headers.shapes(headers.read(single)))
    assert groups == [
        {"name": "a.layers.{i}.w", "shape": [2, 3], "count": 2},
        {"name": "b", "shape": [5], "count": 1},
        {"name": "c.7", "shape": [], "count": 1},
    ]
    assert headers.group_parameters(groups) == 2 * 6 + 5 + 1


def test_no_weight_is_read(single, monkeypatch):
    """A file whose data are a hole of 40 GB tells its headers at once, and costs no memory."""
    shape = [100_000, 100_000]
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * 10**10]}}).encode()
    file = single / "model.safetensors"
    with open(file, "wb") as written:
        written.write(struct.pack("<Q", len(header)) + header)
        written.truncate(8 + len(header) + 4 * 10**10)
    assert headers.shapes(headers.read(single)) == {"w": tuple(shape)}


def cut(size: int):
    return lambda content: content[:size]


DAMAGE = {
    "empty": lambda content: b"",
    "shorter than a length": cut(5),
    "header cut": cut(40),
    "data cut": lambda content: content[:-4],
    "data longer": lambda content: content + b"more",
    "oversize header length": lambda content: struct.pack("<Q", 2**62) + content[8:],
    "header length beyond the file": lambda content: struct.pack("<Q", len(content)) + content[8:],
    "not JSON": lambda content: content[:8] + b"x" * (len(content) - 8),
    "not UTF-8": lambda content: content[:8] + b"\xff" * (len(content) - 8),
    "a pickle": lambda content: b"\x80\x04\x95" + content,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_line(single, damage):
    file = single / "model.safetensors"
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with pytest.raises(UserError, match=r"model\.safetensors is not a whole safetensors file \(.+\); fetch") as caught:
        headers.read(single)
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model-00002-of-00002\.safetensors"):
        headers.read(sharded)


def test_an_index_that_names_other_tensors_is_named(sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["d"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"puts d into model-00001-of-00002\.safetensors, which lacks it"):
        headers.read(sharded)


def test_a_tensor_in_two_shards_is_named(sharded):
    save_file(FIRST | SECOND, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors repeats the tensor a\.layers\.0\.w"):
        headers.read(sharded)


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(UserError, match="holds only pickled weights"):
        headers.read(tmp_path)
