"""A beginning that all texts of a batch share, such as a chat template's, run once instead of once per text.

In a causal decoder a token's state depends on the tokens before it alone, whatever layers run in whatever order. So a
layer is called twice: with the common prefix, of which it keeps keys and values, and with the texts after it, whose
queries see those. The layer and its arguments are the model's own, as it prepares them for a cache of that length.

With 24 scored tokens after a prompt, a third of a SmolLM2 batch is prefix, with all of them a sixth; that much is saved
of every layer.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lab.subjects.calls import Call, Captured, hidden_of, mapped

if TYPE_CHECKING:
    from lab.subjects.anatomy import Decoder

#: Kinds of layers whose memory of earlier tokens is keys and values, nothing else.
ATTENTION = ("full_attention", "sliding_attention")
#: Rotary embeddings that depend on how long the text is, which a prefix alone does not tell.
LENGTH_DEPENDENT = ("dynamic", "longrope")
#: In dtypes narrower than float32 the prefix is filled up to a multiple of so many tokens. Kernels round by the sizes
#: of their blocks, and what is rounded in the prefix reaches all texts alike: with the 27 tokens of SmolLM2's, in
#: bfloat16, mean losses of 12 prompts moved by 0.008 nat (root of the mean square of 31 knockouts, AVX2). Filled up to
#: 32 no bit moved. With all 50 prompts 2 to 3 % of the texts' losses do, by up to 0.0004 nat.
TILE = 32
#: How far a token's output may differ with and without a prefix in float32, as a share of its largest component:
#: shapes decide which kernels run, and tiny decoders differ by up to 8 roundings (1e-6). In narrower dtypes no bit may.
TOLERANCE = 1e-5
#: Rows, tokens of the prefix and tokens after it that are tried before the first use; the texts are two tiles long.
PROBE = (2, 27, 37)


@dataclass(frozen=True)
class PrefixedCapture:
    """One batch on its way into the decoder, its common prefix apart.

    A state of such a batch is packed as [1, W + B * T, d]: the prefix and what fills it up, then the rows one after the
    other.

    Attributes:
        entry: residual stream before the first layer, packed.
        length: tokens of the prefix, P.
        prefix: calls for the prefix, filled up on the right [1, W].
        texts: calls for what follows [B, T].
        caches: what stands for the cache in the calls of the prefix and in those of the texts.
    """

    entry: Tensor
    length: int
    prefix: Captured
    texts: Captured
    caches: tuple[Any, Any]

    def apply(self, module: Callable[..., object], states: Tensor, layer: int, copies: int) -> Tensor:
        """A layer's output for k states, packed [k, W + B * T, d]."""
        (rows, tokens), width, filled = self.texts.entry.shape[:2], states.shape[-1], self.prefix.entry.shape[1]
        kept = _Keys()
        prefix = _called(module, states[:, :filled], self.prefix.call(layer, copies), self.caches[0], kept)
        texts = states[:, filled:].reshape(copies * rows, tokens, width)
        texts = _called(module, texts, self.texts.call(layer, copies), self.caches[1], kept.before(rows, self.length))
        return torch.cat([prefix, texts.reshape(copies, rows * tokens, width)], dim=1)

    def unpacked(self, states: Tensor) -> Tensor:
        """States of the texts [k, B, T, d], without the prefix, of packed ones [k, 1, W + B * T, d]."""
        return states[:, 0, self.prefix.entry.shape[1] :].view(len(states), *self.texts.entry.shape)


def capture(decoder: Decoder, ids: Tensor, prefix: Tensor) -> Captured | PrefixedCapture:
    """What the model hands to each layer for texts [B, T] that all follow the same prefix [P]; P may be 0."""
    if not len(prefix):
        return decoder.capture(ids)
    empty, filled = _cache(decoder, 0), _cache(decoder, len(prefix))
    before = decoder.capture(_filled_up(prefix, decoder.dtype)[None], _argument(decoder, empty))
    after = decoder.capture(ids, _argument(decoder, filled))
    entry = torch.cat([before.entry, after.entry.reshape(1, -1, after.entry.shape[-1])], dim=1)
    return PrefixedCapture(entry, len(prefix), before, after, (empty, filled))


def _filled_up(prefix: Tensor, dtype: torch.dtype) -> Tensor:
    """The prefix [P], in narrow dtypes with its last token again until it fills whole tiles [W]; a causal layer's
    earlier tokens do not see those.
    """
    return torch.cat([prefix, prefix[-1:].expand(-len(prefix) % TILE if dtype.itemsize < 4 else 0)])


def agrees(decoder: Decoder) -> bool:
    """Whether every layer gives the same with a prefix apart as without, tried on a few tokens.

    Layers that remember more than keys and values do not, nor do embeddings that depend on a text's length, nor, in
    dtypes narrower than float32, those of a processor whose kernels round otherwise for it.
    """
    if not is_attention_alone(decoder.config):
        return False
    try:
        return _layers_agree(decoder)
    except Exception as error:  # whatever keeps a model from running so, the ordinary way is right for it, only slower
        logging.getLogger(__name__).info("%s takes no prefix apart: %s", type(decoder.model).__name__, error)
        return False


def is_attention_alone(config: Any) -> bool:
    """Whether a configuration names nothing that a few tokens would not reveal: chunks, and rotations by length."""
    kinds = getattr(config, "layer_types", None) or ATTENTION
    return set(kinds) <= set(ATTENTION) and not set(_rotary_types(config)) & set(LENGTH_DEPENDENT)


def _rotary_types(config: Any) -> list[str]:
    """Kinds of rotary embeddings, of which some models have one per kind of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    return [
        str(each["rope_type"]) for each in (found, *found.values()) if isinstance(each, dict) and "rope_type" in each
    ]


@torch.no_grad()
def _layers_agree(decoder: Decoder) -> bool:
    rows, length, tokens = PROBE
    ids = torch.arange(1, 1 + rows * (length + tokens), device=decoder.device).remainder(decoder.config.vocab_size)
    ids = ids.reshape(rows, -1)
    ids[:, :length] = ids[0, :length]
    whole, apart = decoder.capture(ids), capture(decoder, ids[:, length:], ids[0, :length])
    assert isinstance(apart, PrefixedCapture)
    if not _alike(whole.entry[:, length:], apart.unpacked(apart.entry[None])[0]):
        return False
    states = whole.entry
    for index, layer in enumerate(decoder.layers):
        packed = _packed(states, length, apart.prefix.entry.shape[1])
        found = apart.apply(layer, packed, index, 1)
        states = whole.apply(layer, states, index, 1)
        texts = apart.unpacked(found[None])[0]
        if not _alike(states[:, length:], texts) or not _alike(states[:1, :length], found[:, :length]):
            return False
    return True


def _packed(states: Tensor, length: int, filled: int) -> Tensor:
    """States of whole texts [B, P + T, d] as packed ones [1, W + B * T, d]."""
    prefix = states[:1, [min(position, length - 1) for position in range(filled)]]
    return torch.cat([prefix, states[:, length:].reshape(1, -1, states.shape[-1])], dim=1)


def _alike(these: Tensor, those: Tensor) -> bool:
    """Whether every token's states [..., d] agree: to the bit in narrow dtypes, but for rounding in others."""
    tolerance = TOLERANCE if these.dtype.itemsize >= 4 else 0.0
    difference = (these.float() - those.float()).abs().amax(-1)
    return bool((difference <= tolerance * these.float().abs().amax(-1)).all())


class _Keys:
    """Stands for a cache in one call of a layer: what was kept comes before what is new.

    Args:
        earlier: keys and values [k * B, heads, P, head dim] that each attention of the layer finds, in their order.
    """

    def __init__(self, earlier: list[tuple[Tensor, Tensor]] | None = None):
        self._earlier = earlier
        self._kept: list[tuple[Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [.., heads, P + T, head dim] that the queries may see; what attentions ask of a cache."""
        if self._earlier is not None:
            earlier = self._earlier[len(self._kept)]
            keys, values = (torch.cat(pair, dim=-2) for pair in zip(earlier, (keys, values), strict=True))
        self._kept.append((keys, values))
        return keys, values

    def before(self, rows: int, length: int) -> _Keys:
        """The first keys and values of what is kept, before each of the rows that follow."""
        first = [tuple(kept[..., :length, :] for kept in pair) for pair in self._kept]
        return _Keys([(keys.repeat_interleave(rows, 0), values.repeat_interleave(rows, 0)) for keys, values in first])


def _called(module: Callable[..., object], states: Tensor, call: Call, stand_in: Any, cache: _Keys) -> Tensor:
    args, kwargs = mapped(lambda leaf: cache if leaf is stand_in else leaf, call)
    return hidden_of(module(states, *args, **kwargs))


def _cache(decoder: Decoder, length: int) -> Any:
    """A cache that has seen some tokens, from which the model prepares positions and masks; it holds nothing else."""
    from transformers import DynamicCache

    cache, seen = DynamicCache(), torch.zeros(1, 1, length, 1, device=decoder.device)
    for layer in range(decoder.n_layers if length else 0):
        cache.update(seen, seen, layer)
    return cache


def _argument(decoder: Decoder, cache: Any) -> dict[str, Any]:
    """The cache as an argument of the model; its name has changed in Transformers 5."""
    parameters = inspect.signature(decoder.model.forward).parameters
    return {"cache" if "cache" in parameters else "past_key_values": cache, "use_cache": True}
