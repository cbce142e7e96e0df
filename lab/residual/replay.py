"""One decoder layer as a function of its input: its update, its branches, and their derivatives.

g(x) = layer(x) - x, with the other arguments of the layer's real call (mask, rotary tables) replayed. States lie
within O(|g|) of each other, so g is formed in float32 with float32 weights unless told otherwise; the layer
is copied for it, alone.

Derivatives are exact, by forward mode (`torch.func.jvp`) under `vmap`: the point is evaluated once for all
directions. The fused kernels of scaled-dot-product attention have no forward mode (nor has any of them one under
`vmap`), so everything here runs under PyTorch's math backend, which computes the same function.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lab.errors import UserError, first_line
from lab.memory import keep_freed_memory
from lab.subjects.anatomy import split_call
from lab.subjects.calls import Captured, hidden_of

#: Directions that are differentiated together; their activations are in memory at once.
DIRECTIONS_AT_ONCE = 16


@dataclass(frozen=True)
class Response:
    """What a layer makes of its input: update g, and its two branches where the layer has two.

    Attributes:
        update: layer(x) - x [..., B, T, d].
        attention: a(x), output of the attention branch; None for layers that are not built that way.
        mlp: b(x), output of the MLP branch as a function of the layer's input; None likewise.
    """

    update: Tensor
    attention: Tensor | None = None
    mlp: Tensor | None = None

    def parts(self) -> dict[str, Tensor]:
        """The functions that are there, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __sub__(self, other: Response) -> Response:
        mine, others = self.parts(), other.parts()
        return Response(**{name: mine[name] - others[name] for name in mine if name in others})


class LayerReplay:
    """A decoder layer's update on one batch of texts.

    Args:
        layer: the decoder layer; it is copied unless it has the dtype already.
        index: its index, which picks its call arguments.
        captured: the batch's call arguments, see `Decoder.capture`.
        dtype: float32 is the sound one; bfloat16 shows what rounding does.

    Raises:
        UserError: a product of the layer has no forward mode.
    """

    def __init__(self, layer: nn.Module, index: int, captured: Captured, dtype: torch.dtype = torch.float32):
        self.index, self.captured, self.dtype = index, captured, dtype
        own = next(layer.parameters()).dtype
        self.layer = layer if own == dtype else copy.deepcopy(layer).to(dtype)
        if next(self.layer.parameters()).device.type == "cpu":
            keep_freed_memory()

    def on(self, captured: Captured) -> LayerReplay:
        """The same layer on another batch."""
        other = copy.copy(self)
        other.captured = captured
        return other

    @torch.no_grad()
    def __call__(self, states: Tensor) -> Response:
        """Response [k, B, T, d] to states [k, B, T, d], or [B, T, d] to states [B, T, d]."""
        flat = states.reshape(-1, *states.shape[-2:]).to(self.dtype)
        copies = len(states) if states.dim() == 4 else 1
        with sdpa_kernel(SDPBackend.MATH):
            found = self._response(flat, copies)
        return _checked({name: value.reshape(states.shape) for name, value in found.items()}, flat)

    @torch.no_grad()
    def jvp(self, states: Tensor, directions: Tensor) -> Response:
        """J v for every direction: derivatives [k, B, T, d] at states [B, T, d] along directions [k, B, T, d]."""

        def along(direction: Tensor) -> dict[str, Tensor]:
            tangents: dict[str, Tensor] = jvp(self._response, (point,), (direction,))[1]
            return tangents

        point = states.to(self.dtype)
        with sdpa_kernel(SDPBackend.MATH):
            try:
                slopes = vmap(along, chunk_size=DIRECTIONS_AT_ONCE)(directions.to(self.dtype))
            except NotImplementedError as error:
                kind = type(self.layer).__name__
                raise UserError(
                    f"PyTorch cannot differentiate a {kind} forwards ({first_line(error)}); "
                    "its linearization gap cannot be measured"
                ) from error
        return _checked(slopes, directions)

    def blocks(self, states: Tensor, positions: Tensor) -> OwnTokenBlocks:
        """The Jacobian blocks d g_t / d x_t at one position t of every row; states [B, T, d], positions [B]."""
        return OwnTokenBlocks(self, states.to(self.dtype), positions)

    def _response(self, states: Tensor, copies: int = 1) -> dict[str, Tensor]:
        args, kwargs = _cast(self.captured.call(self.index, copies), self.dtype)
        with _watching(self.layer) as calls:
            output = hidden_of(self.layer(states, *args, **kwargs))
        return {"update": output - states} | _branches(states, calls)


def _checked(found: dict[str, Tensor], stream: Tensor) -> Response:
    """A response without its branches where they do not make up the update: some layers have other parts beside.

    Args:
        found: response, or derivative of one.
        stream: what the layer adds to, of the same kind; the sum is exact to a handful of its roundings.
    """
    if len(found) == 3:
        update = found["update"]
        rest = update.float() - found["attention"].float() - found["mlp"].float()
        eps = max(torch.finfo(update.dtype).eps, torch.finfo(torch.float32).eps)  # norms work in float32
        scale = stream.float().abs().amax() + update.float().abs().amax()
        if rest.abs().amax() > 8 * eps * scale:
            return Response(update)
    return Response(**found)


class OwnTokenBlocks:
    """J_t = d g_t / d x_t of B rows, as products with vectors [B, d]; all other tokens are held fixed."""

    def __init__(self, replay: LayerReplay, states: Tensor, positions: Tensor):
        self.rows, self.positions = torch.arange(len(states), device=states.device), positions
        self.states = states
        self._function: Callable[[Tensor], Tensor] = lambda token: self._update(replay, token)
        self.point = states[self.rows, positions]
        with sdpa_kernel(SDPBackend.MATH):
            self._pull: Callable[[Tensor], tuple[Tensor]] = vjp(self._function, self.point)[1]

    def _update(self, replay: LayerReplay, token: Tensor) -> Tensor:
        full = self.states.index_put((self.rows, self.positions), token)
        return replay._response(full)["update"][self.rows, self.positions]

    def product(self, vectors: Tensor) -> Tensor:
        """J_t v [B, d]."""
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            tangent: Tensor = jvp(self._function, (self.point,), (vectors,))[1]
        return tangent

    def transposed_product(self, vectors: Tensor) -> Tensor:
        """J_t^T u [B, d]."""
        pulled: Tensor = self._pull(vectors)[0]
        return pulled.detach()


#: a child module, what it was given, and what it returned
_ChildCall = tuple[nn.Module, Any, Any]


def input_norm(layer: nn.Module, states: Tensor, call: tuple[tuple[Any, ...], dict[str, Any]]) -> nn.Module | None:
    """The norm that reads the layer's input: the first child module given it; None if no child is.

    Args:
        layer: a decoder layer.
        states: any input [B, T, d].
        call: the other arguments of the layer's call.
    """
    with _watching(layer) as calls, torch.no_grad():
        layer(states, *call[0], **call[1])
    return next((child for child, given, _ in calls if given is states), None)


@contextmanager
def _watching(layer: nn.Module) -> Iterator[list[_ChildCall]]:
    """Note the calls of a layer's children, in their order."""
    calls: list[_ChildCall] = []

    def note(child: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = split_call(args, kwargs)[0] if args or "hidden_states" in kwargs else None
        calls.append((child, given, hidden_of(output)))

    hooks = [child.register_forward_hook(note, with_kwargs=True) for child in layer.children()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _branches(states: Tensor, calls: list[_ChildCall]) -> dict[str, Tensor]:
    """Outputs of the two branches of a layer x -> m = x + a(x) -> m + b(x), recognised by how tensors are handed on.

    The state m between the branches is what a child is given though no child returned it; a is what was
    returned last before that, b what was returned last of all. A layer whose branches run side by side has no m.
    """
    returned = [id(value) for _, _, value in calls]
    for place, (_, given, _) in enumerate(calls):
        if isinstance(given, Tensor) and given is not states and id(given) not in returned[:place]:
            if given.shape != states.shape or place == 0:
                return {}
            return {"attention": calls[place - 1][2], "mlp": calls[-1][2]}
    return {}


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    """Nested call arguments with floating tensors in another dtype; a mask of -inf stays one."""
    if isinstance(leaf, Tensor):
        return leaf.to(dtype) if leaf.is_floating_point() else leaf
    if isinstance(leaf, dict):
        return {key: _cast(value, dtype) for key, value in leaf.items()}
    if isinstance(leaf, (tuple, list)):
        parts = [_cast(value, dtype) for value in leaf]
        return type(leaf)(*parts) if hasattr(leaf, "_fields") else type(leaf)(parts)
    return leaf
