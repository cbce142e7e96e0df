"""The anatomy of a decoder: its parts, found by watching one small forward pass, and the calls of its layers.

No part is looked up by an architecture's name. The layers are the module list with as many entries as
the configuration has layers; the final norm is the module that takes the last layer's output; the head
is checked against the model's own logits. So any decoder that Transformers runs can be studied, and one
that cannot be taken apart is refused at once instead of being measured wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lab.errors import UserError
from lab.subjects import token_prefix
from lab.subjects.calls import Call, Captured, hidden_of, may_depend_on_row, row_independent
from lab.subjects.head import Head, possible_heads

#: Tokens of the forward pass that reveals the anatomy; enough for the short convolutions of hybrid decoders.
PROBE_TOKENS = 4


class Decoder:
    """A Transformers decoder taken apart.

    The model is put into evaluation mode: an instrument that measures must not drop anything out.

    Args:
        model: a causal language model; a multimodal model is studied by its text tower.

    Attributes:
        model: the model itself.
        embedding: token embedding.
        layers: the decoder layers, in the order in which the model applies them.
        final_norm: norm between the last layer and the head; `nn.Identity` where the model has none.
        unembedding: head of the vocabulary, logits before scaling and capping; see `lab.subjects.head`.

    Raises:
        UserError: the layers cannot be found, or the parts do not reproduce the model's own logits.
    """

    def __init__(self, model: Any):
        self.model = model.eval()
        self.config = self.model.config.get_text_config(decoder=True)
        self.embedding: nn.Module = self.model.get_input_embeddings()
        self._parent, self._list = _find_layers(self.model, int(self.config.num_hidden_layers))
        self.layers: list[nn.Module] = list(self._list)
        self._tuple_sizes: list[int] = []
        self.final_norm: nn.Module = nn.Identity()
        self.unembedding: Head = self._dissect(possible_heads(self.model, self.config))
        self._recorded: dict[int, tuple[Tensor, Call]] = {}
        self._stand_ins = self._made_stand_ins()
        self._tried: tuple[list[nn.Module], bool] | None = None

    @property
    def n_layers(self) -> int:
        """Number of decoder layers, L."""
        return len(self.layers)

    @property
    def width(self) -> int:
        """Width of the residual stream, d."""
        return int(self.config.hidden_size)

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    @property
    def vocabulary(self) -> int:
        """Number of logits, V."""
        return self.unembedding.vocabulary

    @property
    def device(self) -> torch.device:
        """Device of the token embedding, where token ids must be."""
        return next(self.embedding.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the residual stream."""
        return next(self.embedding.parameters()).dtype

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of normed hidden states [..., d], in the model's dtype, scaled and capped as in the model."""
        return self.unembedding(hidden)

    def norm_and_head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of a residual stream [..., d] at any depth: the logit lens."""
        return self.head(self.final_norm(hidden))

    @property
    def can_split_prefix(self) -> bool:
        """Whether these layers give the same where a common beginning of texts runs apart from them.

        Found out once for the layers that there are, see `lab.subjects.token_prefix`; hooks on them see its tokens.
        """
        if self._tried is None or self._tried[0] != self.layers:
            self._tried = list(self.layers), token_prefix.agrees(self)
        return self._tried[1]

    @torch.no_grad()
    def capture(self, ids: Tensor, arguments: Mapping[str, Any] | None = None) -> Captured:
        """What the model hands to each layer for these token ids [B, T], right-padded, without attention mask.

        The model's own forward runs with every layer short-circuited: masks, rotary embeddings and the
        rest are prepared by the model itself and cost next to nothing. Where an argument may depend on the row,
        a second pass over the first row alone tells which do.

        Args:
            ids: token ids.
            arguments: of the model; None for a forward without a cache.
        """
        ids, arguments = ids.to(self.device), arguments or {"use_cache": False}
        entry, calls = self._record(ids, arguments)
        if not may_depend_on_row(calls, len(ids)):
            return Captured(entry, tuple(calls))
        single = self._record(ids[:1], arguments)[1]
        return Captured(entry, tuple(row_independent(call, one) for call, one in zip(calls, single, strict=True)))

    def _record(self, ids: Tensor, arguments: Mapping[str, Any]) -> tuple[Tensor, list[Call]]:
        try:
            with _replaced(self._list, self._stand_ins):
                self.model(input_ids=ids, **arguments)
        except _AllCaptured:
            if len(self._recorded) == self.n_layers:
                return self._recorded[0][0], [self._recorded[layer][1] for layer in range(self.n_layers)]
        finally:
            self._recorded.clear()
        raise UserError(
            f"{self._name} does not run all of its {self.n_layers} layers; it cannot be studied layer by layer"
        )

    def _made_stand_ins(self) -> dict[str, nn.Module]:
        """Stand-ins for the layers, under the layers' names; made once, since modules are slow to make."""
        return {
            name: _StandIn(layer, size, self._recorded, index, is_last=index == self.n_layers - 1)
            for index, (name, layer, size) in enumerate(
                zip(self._list._modules, self.layers, self._tuple_sizes, strict=True)
            )
        }

    @torch.no_grad()
    def _dissect(self, heads: tuple[Head, ...]) -> Head:
        """Run a few tokens with hooks; learn what each layer returns, the final norm and which head is the model's."""
        order: list[int] = []
        outputs: list[Any] = []
        after: list[tuple[nn.Module, Tensor]] = []
        hooks = [layer.register_forward_hook(_noting(order, outputs, index)) for index, layer in enumerate(self.layers)]
        beside = [module for module in self._parent.children() if not isinstance(module, nn.ModuleList)]
        hooks += [module.register_forward_pre_hook(_noting_input(after)) for module in beside]
        try:
            ids = torch.arange(1, PROBE_TOKENS + 1, device=self.device).remainder(self.config.vocab_size)[None]
            result = self.model(input_ids=ids, use_cache=False, return_dict=True)
        finally:
            for hook in hooks:
                hook.remove()
        if order != list(range(self.n_layers)):
            raise UserError(
                f"{self._name} runs its layers in the order {order}; every layer must run once, in its own slot"
            )
        self._tuple_sizes = [len(output) if isinstance(output, tuple) else 0 for output in outputs]
        final = hidden_of(outputs[-1])
        self.final_norm = next((module for module, given in after if given is final), nn.Identity())
        if final.shape != (1, PROBE_TOKENS, self.width):
            shape = tuple(final.shape)
            raise UserError(f"the layers of {self._name} pass on a tensor of shape {shape}, not [batch, token, width]")
        normed = self.final_norm(final)
        agreeing = [head for head in heads if _alike(head(normed), result.logits)]
        if not agreeing:
            raise UserError(f"the final norm and head found in {self._name} do not give the model's own logits")
        return agreeing[0]


def _alike(ours: Tensor, own: Tensor) -> bool:
    """Whether logits agree but for a few roundings in their dtype."""
    if ours.shape != own.shape:
        return False
    tolerance = 8 * torch.finfo(ours.dtype).eps * float(own.abs().max().clamp(min=1))
    return float((ours.float() - own.float()).abs().max()) <= tolerance


def split_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
    """A layer's hidden state, positional or by name, and the arguments without it."""
    if args:
        return args[0], (tuple(args[1:]), dict(kwargs))
    rest = dict(kwargs)
    return rest.pop("hidden_states"), ((), rest)


class _AllCaptured(Exception):
    """Ends a capturing forward at the last layer, before the head."""


class _StandIn(nn.Module):
    """Takes a layer's place while arguments are captured: notes its call and hands the hidden state on.

    The layer itself is not called, so hooks that others have set on it see real activations only.
    """

    def __init__(
        self, layer: nn.Module, tuple_size: int, recorded: dict[int, tuple[Tensor, Call]], index: int, *, is_last: bool
    ):
        super().__init__()
        # Not as a submodule, or the layer would be moved and renamed with the stand-in.
        object.__setattr__(self, "layer", layer)
        self.tuple_size, self.is_last = tuple_size, is_last
        self.recorded, self.index = recorded, index

    def __getattr__(self, name: str) -> Any:
        # Some models read an attribute of the layer, such as its attention type, before they call it.
        return getattr(object.__getattribute__(self, "layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, call = split_call(args, kwargs)
        self.recorded[self.index] = hidden, call
        if self.is_last:
            raise _AllCaptured
        return (hidden,) + (None,) * (self.tuple_size - 1) if self.tuple_size else hidden


@contextmanager
def _replaced(modules: nn.ModuleList, others: dict[str, nn.Module]) -> Iterator[None]:
    """Put other modules, under the same names, into a module list for a while."""
    own = modules._modules  # all at once: setting items one by one took a fifth of a capture
    try:
        modules._modules = others
        yield
    finally:
        modules._modules = own


def _find_layers(model: Any, n_layers: int) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder's list of layers and the module that owns it; the shallowest list of the right length wins."""
    for module in model.get_decoder().modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == n_layers:
                return module, child
    name = type(model).__name__
    raise UserError(
        f"no list of {n_layers} decoder layers found in {name}; only decoders of Transformers can be studied"
    )


def _noting(order: list[int], outputs: list[Any], index: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        order.append(index)
        outputs.append(output)

    return hook


def _noting_input(seen: list[tuple[nn.Module, Tensor]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            seen.append((module, args[0]))

    return hook
