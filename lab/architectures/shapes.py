"""Which tensors the common blocks own, and of which shapes, as functions of their widths: counting without building.

A table maps the names of a module's parameters to their shapes, as `named_parameters` of the PyTorch module
would; buffers are not in it. Tables are put together with `under` and `joined`, and counted with `parameters`.
Calibration holds every block here against the module of a maintained library, built without memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


@dataclass(frozen=True)
class Widths:
    """Sizes of one transformer layer.

    Attributes:
        width: of the residual stream.
        mlp_width: inner size of the gated MLP.
        heads, kv_heads: query heads, and heads of keys and values.
        head_dim: width of one head.
    """

    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def attention_parameters(self) -> int:
        """Elements of the four projections: d h (2 q + 2 k)."""
        return self.width * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def mlp_parameters(self) -> int:
        """Elements of the gated MLP: 3 d f."""
        return 3 * self.width * self.mlp_width


def parameters(table: Mapping[str, Shape]) -> int:
    """Elements of all tensors of a table."""
    return sum(map(prod, table.values()))


def under(prefix: str, table: Mapping[str, Shape]) -> Shapes:
    """The table of a module that is called `prefix` in its parent."""
    return {f"{prefix}.{name}": shape for name, shape in table.items()}


def joined(*tables: Mapping[str, Shape]) -> Shapes:
    """One table of several modules; two tensors of one name are a mistake."""
    found: Shapes = {}
    for table in tables:
        twice = found.keys() & table.keys()
        if twice:
            raise ValueError(f"tensors stand in two tables: {', '.join(sorted(twice))}")
        found |= table
    return found


def stack(block: Mapping[str, Shape], count: int, name: str = "layers") -> Shapes:
    """`count` equal blocks, `layers.0.` to `layers.{count - 1}.`."""
    return joined(*(under(f"{name}.{index}", block) for index in range(count)))


def subset(table: Mapping[str, Shape], prefix: str) -> Shapes:
    """The tensors whose name starts with `prefix`."""
    return {name: shape for name, shape in table.items() if name.startswith(prefix)}


# ---- single modules


def embedding(rows: int, width: int) -> Shapes:
    """A lookup table."""
    return {"weight": (rows, width)}


def linear(inputs: int, outputs: int, *, bias: bool = True) -> Shapes:
    """A dense layer."""
    return {"weight": (outputs, inputs)} | ({"bias": (outputs,)} if bias else {})


def rms_norm(width: int) -> Shapes:
    """A norm with a gain and no shift."""
    return {"weight": (width,)}


def layer_norm(width: int) -> Shapes:
    """A norm with gain and shift."""
    return {"weight": (width,), "bias": (width,)}


def convolution(inputs: int, outputs: int, kernel: int, *, groups: int = 1, bias: bool = True) -> Shapes:
    """A 1-d convolution; `groups == inputs` is a depthwise one."""
    return {"weight": (outputs, inputs // groups, kernel)} | ({"bias": (outputs,)} if bias else {})


def transposed_convolution(inputs: int, outputs: int, kernel: int, *, bias: bool = True) -> Shapes:
    """A 1-d transposed convolution; its weight has the inputs first."""
    return {"weight": (inputs, outputs, kernel)} | ({"bias": (outputs,)} if bias else {})


def weight_normed(table: Mapping[str, Shape]) -> Shapes:
    """A convolution with weight norm: its weight becomes a direction and a gain per entry of the first axis."""
    shape = table["weight"]
    rest = {name: other for name, other in table.items() if name != "weight"}
    return rest | {"weight_g": (shape[0], 1, 1), "weight_v": shape}


# ---- blocks of a decoder


def attention(widths: Widths, *, qk_norm: bool) -> Shapes:
    """Attention with grouped queries, no biases, and norms on each query and key head if `qk_norm`."""
    query, key = widths.heads * widths.head_dim, widths.kv_heads * widths.head_dim
    norms = [under(name, rms_norm(widths.head_dim)) for name in ("q_norm", "k_norm")]
    return joined(
        under("q_proj", linear(widths.width, query, bias=False)),
        under("k_proj", linear(widths.width, key, bias=False)),
        under("v_proj", linear(widths.width, key, bias=False)),
        under("o_proj", linear(query, widths.width, bias=False)),
        *(norms if qk_norm else []),
    )


def gated_mlp(widths: Widths) -> Shapes:
    """SwiGLU: gate, up and down projection without biases."""
    return joined(
        under("gate_proj", linear(widths.width, widths.mlp_width, bias=False)),
        under("up_proj", linear(widths.width, widths.mlp_width, bias=False)),
        under("down_proj", linear(widths.mlp_width, widths.width, bias=False)),
    )


def layer(widths: Widths, *, qk_norm: bool) -> Shapes:
    """A pre-norm decoder layer, of Llama without and of Qwen3 with norms on queries and keys."""
    return joined(
        under("self_attn", attention(widths, qk_norm=qk_norm)),
        under("mlp", gated_mlp(widths)),
        under("input_layernorm", rms_norm(widths.width)),
        under("post_attention_layernorm", rms_norm(widths.width)),
    )


def decoder(widths: Widths, layers: int, vocabulary: int, *, qk_norm: bool, head: bool) -> Shapes:
    """Embedding, layers and final norm; with an LM head of its own if `head`, else with none or a tied one."""
    model = joined(
        under("embed_tokens", embedding(vocabulary, widths.width)),
        stack(layer(widths, qk_norm=qk_norm), layers),
        under("norm", rms_norm(widths.width)),
    )
    return joined(under("model", model), {"lm_head.weight": (vocabulary, widths.width)} if head else {})


# ---- lengths


def convolved_length(length: int, kernel: int, stride: int, padding: int) -> int:
    """Frames that a convolution makes of `length` frames."""
    return (length + 2 * padding - kernel) // stride + 1


def transposed_length(length: int, kernel: int, stride: int, padding: int) -> int:
    """Frames that a transposed convolution makes of `length` frames."""
    return (length - 1) * stride - 2 * padding + kernel


def band(length: int, window: int) -> list[int]:
    """Keys that each query sees in a bidirectional layer which keeps |i - j| <= window [query]."""
    return [min(query + window, length - 1) - max(query - window, 0) + 1 for query in range(length)]


def total(tables: Iterable[Mapping[str, Shape]]) -> int:
    """Elements of several tables."""
    return sum(map(parameters, tables))
