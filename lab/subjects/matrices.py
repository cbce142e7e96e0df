"""The weight matrices of a decoder's layers, read from its files one at a time, under names that architectures share.

Names are those of Llama: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj. Fused projections (Phi-3,
GPT-2, GPT-NeoX) are split where their shape proves the layout; any other matrix keeps the path that it has in its
layer (`mamba.in_proj`, `mlp.shared_expert.up_proj`), and stacks of experts, which are no matrices, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lab.errors import UserError
from lab.subjects.anatomy import PROBE_TOKENS, Decoder
from lab.subjects.configuration import safetensors_of, tensor_shapes

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

_ATTENTION_PARENT = r"(self_attn|attn|attention|self_attention)\."
_MLP_PARENT = r"((mlp|feed_forward|ffn)\.)?"
#: path of a weight in its layer -> the matrices that it holds, from its first row on
_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    *((rf"{_ATTENTION_PARENT}{name}", (name,)) for name in ATTENTION),
    (rf"{_ATTENTION_PARENT}(out_proj|dense|c_proj)", ("o_proj",)),
    (rf"{_ATTENTION_PARENT}(qkv_proj|c_attn|query_key_value)", ("q_proj", "k_proj", "v_proj")),
    *((rf"{_MLP_PARENT}{name}", (name,)) for name in MLP),
    (rf"{_MLP_PARENT}gate_up_proj", ("gate_proj", "up_proj")),
    (rf"{_MLP_PARENT}(fc1|c_fc|dense_h_to_4h)", ("up_proj",)),
    (rf"{_MLP_PARENT}(fc2|c_proj|dense_4h_to_h)", ("down_proj",)),
)


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a layer, not yet read.

    Attributes:
        layer: number of the layer.
        name: the shared name, or the weight's own path.
        tensor: name of the tensor in the files.
        module: path of the module within the layer.
        rows: which output features of the tensor it is; None is all.
        transposed: whether the tensor lies as [in, out].
    """

    layer: int
    name: str
    tensor: str
    module: str
    rows: tuple[int, ...] | None
    transposed: bool


class LayerWeights:
    """The weights of a decoder's layers on disk.

    Args:
        decoder: tells which parameters are a layer's, and what they are for.
        folder: of the safetensors files; see `lab.subjects.weights.required_location`.

    Raises:
        UserError: the files lack a tensor that a layer needs.
    """

    def __init__(self, decoder: Decoder, folder: Path):
        self._decoder = decoder
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for file in safetensors_of(folder):
            shapes = tensor_shapes(file)
            self._shapes |= shapes
            self._files |= dict.fromkeys(shapes, file)
        self._folder = folder
        names = {id(module): name for name, module in decoder.model.named_modules()}
        self._paths = [names[id(layer)] for layer in decoder.layers]
        self.left_out: set[str] = set()  #: paths of weights that are no matrices
        self.matrices = [matrix for layer in range(decoder.n_layers) for matrix in self._of_layer(layer)]

    @property
    def names(self) -> list[str]:
        """Names of the matrices, those that architectures share first."""
        found = dict.fromkeys(matrix.name for matrix in self.matrices)
        shared = [name for name in (*ATTENTION, *MLP) if name in found]
        return shared + [name for name in found if name not in shared]

    def read(self, matrix: Matrix) -> np.ndarray:
        """The matrix as float32 [out, in]; exact for weights stored in float32 and shorter."""
        whole = self._tensor(matrix.tensor)
        whole = whole.T if matrix.transposed else whole
        values: np.ndarray = (whole if matrix.rows is None else whole[list(matrix.rows)]).numpy()
        return values

    def stored_dtypes(self) -> list[str]:
        """How the files hold the matrices: `F32`, `BF16`, ..."""
        found = set()
        for file in set(self._files.values()):
            with safe_open(file, "pt") as tensors:
                found |= {
                    tensors.get_slice(matrix.tensor).get_dtype()
                    for matrix in self.matrices
                    if self._files[matrix.tensor] == file
                }
        return sorted(found)

    def head_dim(self, layer: int) -> int:
        """Width of an attention head of this layer."""
        config = self._decoder.config
        own = [getattr(module, "head_dim", None) for module in self._decoder.layers[layer].modules()]
        return next((int(size) for size in own if size), None) or int(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )

    def _tensor(self, name: str) -> Tensor:
        with safe_open(self._files[name], "pt") as tensors:
            found: Tensor = tensors.get_tensor(name).float()
        return found

    def _of_layer(self, layer: int) -> Iterable[Matrix]:
        modules = dict(self._decoder.layers[layer].named_modules())
        for path, parameter in self._decoder.layers[layer].named_parameters():
            module, _, kind = path.rpartition(".")
            if kind != "weight" or parameter.dim() > 2:
                self.left_out |= {path} if parameter.dim() > 1 else set()
            elif parameter.dim() == 2:
                transposed = isinstance(modules[module], Conv1D)
                shape = tuple(parameter.shape[::-1] if transposed else parameter.shape)
                tensor = self.file_name(layer, path, tuple(parameter.shape))
                for name, rows in self._parts(layer, module, shape).items():
                    yield Matrix(layer, name, tensor, module, rows, transposed)

    def file_name(self, layer: int, path: str, shape: tuple[int, ...]) -> str:
        """Name in the files of a layer's parameter: the model's own, or the only one that ends alike."""
        exact = f"{self._paths[layer]}.{path}"
        if self._shapes.get(exact) == shape:
            return exact
        # Files of a tower, or of a model without its head, lack or add what stands before the list of layers.
        end = re.escape(f"{'.'.join(self._paths[layer].split('.')[-2:])}.{path}")
        alike = [name for name, size in self._shapes.items() if re.search(rf"(^|\.){end}$", name) and size == shape]
        if len(alike) != 1:
            raise UserError(f"the weights in {self._folder} hold no {exact}; save the model again with save_pretrained")
        return alike[0]

    def _parts(self, layer: int, module: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...] | None]:
        names = next((names for pattern, names in _NAMES if re.fullmatch(pattern, module)), ())
        if names == ("q_proj",):
            return self._query(layer, shape[0])
        if len(names) == 1:
            return {names[0]: None}
        if names[:1] == ("gate_proj",):
            half = shape[0] // 2
            return {"gate_proj": tuple(range(half)), "up_proj": tuple(range(half, 2 * half))}
        split = self._fused_attention(layer, shape[0], by_head=module.endswith("query_key_value")) if names else None
        return split or {module: None}

    def _query(self, layer: int, rows: int) -> dict[str, tuple[int, ...] | None]:
        """Queries, and the gate of the attention's output where each head's rows hold both (Qwen3-Next)."""
        size, heads = self.head_dim(layer), int(self._decoder.config.num_attention_heads)
        if rows != 2 * heads * size:
            return {"q_proj": None}
        each = np.arange(rows).reshape(heads, 2, size)
        return {"q_proj": tuple(each[:, 0].ravel().tolist()), "q_gate_proj": tuple(each[:, 1].ravel().tolist())}

    def _fused_attention(self, layer: int, rows: int, *, by_head: bool) -> dict[str, tuple[int, ...] | None] | None:
        size, heads = self.head_dim(layer), int(self._decoder.config.num_attention_heads)
        groups = (rows // size - heads) // 2
        if rows != (heads + 2 * groups) * size or groups < 1 or heads % groups or (by_head and groups != heads):
            return None  # a layout that the shape does not prove
        names = ("q_proj", "k_proj", "v_proj")
        if by_head:
            each = np.arange(rows).reshape(heads, 3, size)
            return {name: tuple(each[:, index].ravel().tolist()) for index, name in enumerate(names)}
        borders = np.cumsum([0, heads * size, groups * size, groups * size]).tolist()
        return {name: tuple(range(*borders[index : index + 2])) for index, name in enumerate(names)}

    # ---- gains of the norms around a matrix

    def gains(self) -> Mapping[tuple[int, str], tuple[np.ndarray | None, np.ndarray | None]]:
        """Gains of the norms before and after each linear map: (layer, module) -> (input [in], output [one head]).

        Which norm feeds which map is seen in one forward pass of a few tokens: the map's input is the norm's
        output, or the norm's input is a view of the map's output. Gains come from the files, in full precision.
        """
        found: dict[tuple[int, str], tuple[np.ndarray | None, np.ndarray | None]] = {}
        for layer, seen in enumerate(self._watch()):
            gains = {path: self._gain(layer, path) for path in seen.norms}
            for path, (given, made) in seen.maps.items():
                before = [gains[norm] for norm, (_, out) in seen.norms.items() if out is given]
                after = [gains[norm] for norm, (into, _) in seen.norms.items() if into.data_ptr() == made.data_ptr()]
                found[layer, path] = (before[0] if before else None, after[0] if after else None)
        return found

    @torch.no_grad()
    def _watch(self) -> list[_Seen]:
        """Inputs and outputs of the norms and linear maps of each layer, in one short forward pass."""
        seen = [_Seen({}, {}) for _ in self._decoder.layers]
        hooks = []
        for layer, note in zip(self._decoder.layers, seen, strict=True):
            for path, module in layer.named_modules():
                if _is_norm(module):
                    hooks.append(module.register_forward_hook(_noting(note.norms, path)))
                elif isinstance(module, (nn.Linear, Conv1D)):
                    hooks.append(module.register_forward_hook(_noting(note.maps, path)))
        try:
            ids = torch.arange(1, PROBE_TOKENS + 1, device=self._decoder.device)
            self._decoder.model(input_ids=ids.remainder(self._decoder.config.vocab_size)[None], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def _gain(self, layer: int, path: str) -> np.ndarray:
        """Gain of a norm [width], whether it multiplies by w or by 1 + w: half the difference of its answers to +-x."""
        norm = deepcopy(dict(self._decoder.layers[layer].named_modules())[path]).float().cpu()
        for name, parameter in norm.named_parameters():
            stored = self._tensor(self.file_name(layer, f"{path}.{name}", tuple(parameter.shape)))
            parameter.data.copy_(stored)
        width = next(norm.parameters()).shape[-1]
        signs = torch.ones(width)
        signs[1::2] = -1  # mean 0 and mean square 1: neither kind of norm changes it
        with torch.no_grad():
            gain: np.ndarray = ((norm(signs) - norm(-signs)) / 2 * signs).double().numpy()
        return gain


@dataclass(frozen=True)
class _Seen:
    """What one layer's norms and linear maps were given and made: path -> (input, output)."""

    norms: dict[str, tuple[Tensor, Tensor]]
    maps: dict[str, tuple[Tensor, Tensor]]


def _is_norm(module: nn.Module) -> bool:
    own = [parameter.dim() for parameter in module.parameters(recurse=False)]
    return type(module).__name__.endswith("Norm") and bool(own) and set(own) == {1}


def _noting(seen: dict[str, tuple[Tensor, Tensor]], path: str) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        if args and isinstance(output, Tensor):
            seen[path] = (args[0], output)

    return hook
