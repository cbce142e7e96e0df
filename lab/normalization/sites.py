"""The norms of a decoder, by role.

The same attribute means different things in different models (`post_attention_layernorm` reads the residual stream in
Llama and the attention's output in Gemma 3), so roles follow from how tensors are handed on in one small forward pass:

    pre_attention, pre_mlp     norms that read the residual stream for a sublayer
    post_attention, post_mlp   norms of a sublayer's output
    query, key                 norms of head vectors inside the attention
    final                      the norm before the head

Each is checked to be the RMSNorm y = gain * x / sqrt(mean(x^2) + eps); `gain` is the effective scale, which models
store as `weight` or as `weight - 1`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lab.errors import NotApplicable
from lab.subjects.anatomy import Decoder, split_call
from lab.subjects.calls import hidden_of

PRE = ("pre_attention", "pre_mlp")
POST = ("post_attention", "post_mlp")
BLOCK = ("pre_attention", "post_attention", "pre_mlp", "post_mlp")
HEADS = ("query", "key")
FINAL = "final"
SUBLAYERS = ("attention", "mlp")
EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
#: a norm is taken for an RMSNorm if it differs from the formula by no more than this, relative to its largest output
AGREEMENT = 1e-4


@dataclass(frozen=True)
class Norm:
    """One RMSNorm of a decoder.

    Attributes:
        role: see above.
        layer: index of its layer; the number of layers for the final norm.
        path: its attribute path inside the layer; empty for the final norm.
        gain: effective learned scale [d], float32.
        eps: added to the mean square.
        token_axis: axis of its input along which tokens lie.
    """

    role: str
    layer: int
    path: str
    gain: Tensor
    eps: float
    token_axis: int


@dataclass(frozen=True)
class Norms:
    """All norms of a decoder.

    Attributes:
        layers: norms by role, per layer; every layer has the same roles.
        final: the norm before the head.
    """

    layers: tuple[dict[str, Norm], ...]
    final: Norm

    @property
    def block_roles(self) -> tuple[str, ...]:
        """Roles of norms of the width of the stream, inside layers, in the order in which they run."""
        return tuple(role for role in BLOCK if role in self.layers[0])

    @property
    def pre_roles(self) -> tuple[str, ...]:
        """Roles of norms that read the residual stream."""
        return tuple(role for role in PRE if role in self.layers[0])

    @property
    def head_roles(self) -> tuple[str, ...]:
        """`query` and `key` where the model has such norms, else nothing."""
        return tuple(role for role in HEADS if role in self.layers[0])


def norms_of(decoder: Decoder) -> Norms:
    """The norms of a decoder, found by watching a few tokens pass through each layer.

    Raises:
        NotApplicable: a layer is not built of norms around attention and MLP, or its norms are no RMSNorms.
    """
    tokens = _token_count(decoder)
    ids = torch.arange(1, tokens + 1, device=decoder.device).remainder(decoder.config.vocab_size)[None]
    captured = decoder.capture(ids)
    state, layers = captured.entry, []
    for index, layer in enumerate(decoder.layers):
        with _watching(layer) as calls, torch.no_grad():
            state = captured.apply(layer, state, index, 1)
        found = {**_block_norms(layer, index, calls), **_head_norms(layer, index, calls, tokens)}
        if not found:
            raise NotApplicable(f"layer {index} of {_name(decoder)} has no norm; T-15 studies what norms do")
        layers.append(found)
    different = [index for index, found in enumerate(layers) if list(found) != list(layers[0])]
    if different:
        raise NotApplicable(f"layers 0 and {different[0]} of {_name(decoder)} have norms in different places")
    return Norms(tuple(layers), _checked(decoder.final_norm, FINAL, decoder.n_layers, "", 1))


def _name(decoder: Decoder) -> str:
    return type(decoder.model).__name__


def _token_count(decoder: Decoder) -> int:
    """A number of tokens that is no number of heads, so that the token axis can be told by its size."""
    taken = {getattr(decoder.config, name, 0) for name in ("num_attention_heads", "num_key_value_heads")}
    return next(count for count in range(5, 9) if count not in taken)


@dataclass(frozen=True)
class _Call:
    path: str
    module: nn.Module
    given: Any
    returned: Any


@contextmanager
def _watching(layer: nn.Module) -> Iterator[list[_Call]]:
    """Note the calls of all modules inside a layer, in the order in which they return."""
    calls: list[_Call] = []

    def noting(path: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            alone = len(args) == 1 and not kwargs
            given = split_call(args, kwargs)[0] if args or "hidden_states" in kwargs else None
            calls.append(_Call(path, module, given if alone or "." not in path else None, hidden_of(output)))

        return note

    named = [(path, module) for path, module in layer.named_modules() if path]
    hooks = [module.register_forward_hook(noting(path), with_kwargs=True) for path, module in named]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _is_norm(call: _Call) -> bool:
    """Whether a module keeps its input's shape and has nothing but vectors over the last axis."""
    if any(True for _ in call.module.children()) or not isinstance(call.given, Tensor):
        return False
    shapes = [parameter.shape for parameter in call.module.parameters()]
    same = isinstance(call.returned, Tensor) and call.returned.shape == call.given.shape
    return bool(shapes) and same and all(shape == call.given.shape[-1:] for shape in shapes)


def _block_norms(layer: nn.Module, index: int, calls: Sequence[_Call]) -> dict[str, Norm]:
    """Norms among a layer's children: before a sublayer, or on what the sublayer before them returned."""
    own = [call for call in calls if "." not in call.path]
    sublayers = [call.path for call in own if not _is_norm(call) and any(True for _ in call.module.parameters())]
    if len(sublayers) != 2:
        raise NotApplicable(
            f"layer {index} runs {', '.join(sublayers) or 'no sublayer'}; T-15 studies layers of attention and MLP"
        )
    kinds = dict(zip(sublayers, SUBLAYERS, strict=True))
    found: dict[str, Norm] = {}
    for place, call in enumerate(own):
        if not _is_norm(call):
            continue
        before = own[place - 1] if place else None
        if before is not None and before.path in kinds and call.given is before.returned:
            role = f"post_{kinds[before.path]}"
        else:
            role = f"pre_{next((kinds[later.path] for later in own[place:] if later.path in kinds), 'nothing')}"
        if role in found or role == "pre_nothing":
            raise NotApplicable(f"layer {index} has a norm, {call.path}, that is neither before nor after a sublayer")
        found[role] = _checked(call.module, role, index, call.path, 1)
    return found


def _head_norms(layer: nn.Module, index: int, calls: Sequence[_Call], tokens: int) -> dict[str, Norm]:
    """Norms inside the attention: every implementation norms the queries first, then the keys."""
    inner = [call for call in calls if "." in call.path and _is_norm(call)]
    if not inner:
        return {}
    if len(inner) != 2:
        names = ", ".join(call.path for call in inner)
        raise NotApplicable(f"layer {index} norms inside its sublayers with {names}; T-15 knows a query and a key norm")
    return {
        role: _checked(call.module, role, index, call.path, list(call.given.shape).index(tokens, 1))
        for role, call in zip(HEADS, inner, strict=True)
    }


@torch.no_grad()
def _checked(module: nn.Module, role: str, layer: int, path: str, token_axis: int) -> Norm:
    """The norm's scale and eps, found by calling it in float32 and held against the formula."""
    parameters = list(module.parameters())
    eps = next((float(getattr(module, name)) for name in EPS_NAMES if hasattr(module, name)), None)
    if len(parameters) != 1 or eps is None:
        raise NotApplicable(f"the {role} norm ({type(module).__name__}) is no RMSNorm, which is what T-15 replaces")
    device, width = parameters[0].device, parameters[0].shape[0]
    wide = copy.deepcopy(module).float()
    gain: Tensor = wide(torch.ones(1, 1, width, device=device))[0, 0] * (1 + eps) ** 0.5
    probe = torch.linspace(-1, 2, width, device=device).expand(1, 1, width)
    expected = gain * probe * torch.rsqrt(probe.square().mean(-1, keepdim=True) + eps)
    if float((wide(probe) - expected).abs().max()) > AGREEMENT * float(expected.abs().max().clamp(min=1e-6)):
        raise NotApplicable(f"the {role} norm ({type(module).__name__}) is no RMSNorm, which is what T-15 replaces")
    return Norm(role, layer, path, gain.clone(), eps, token_axis)
