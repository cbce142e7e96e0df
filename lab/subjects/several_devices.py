"""Subjects that are larger than one CUDA device: their layers lie on several, and the residual stream on the first.

Every layer, and every part of one, brings what it is given to where its weights are and hands its output back, as the
hooks of `accelerate`'s `device_map` do for a whole model. Embedding, final norm and head stay with the stream. So
whatever runs layers one by one, in any order, need not know where they are. Moving [B, T, d] twice per layer costs
little beside the layer itself: for 16,384 tokens of width 4096 that is 0.27 GB, against 6 TFLOP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from lab.errors import UserError
from lab.subjects import loading
from lab.subjects.anatomy import Decoder
from lab.subjects.configuration import safetensors_of, tensor_shapes
from lab.subjects.facts import Facts
from lab.subjects.loading import DTYPES, LoadedSubject
from lab.subjects.products import WIDE
from lab.subjects.weights import required_location

#: Share of a device's free memory that weights may take; the rest is for states and activations.
FOR_WEIGHTS = 0.75


def load(facts: Facts, dtype: str = "bfloat16", device: str = "cpu") -> LoadedSubject:
    """Load a subject as `lab.subjects.loading.load` does, on all CUDA devices if one is too small.

    That is so where `device` is `cuda`, which names no device, and there are several.

    Raises:
        UserError: as there; or all devices together are too small.
    """
    free = _free_memory() if device == "cuda" else []
    if len(free) < 2 or dtype not in DTYPES or _weight_bytes(facts, DTYPES[dtype]) <= FOR_WEIGHTS * free[0]:
        return loading.load(facts, dtype, device)
    subject = loading.load(facts, dtype, "cpu")
    layers = [_bytes(layer) for layer in subject.decoder.layers]
    places = placement(layers, _bytes(subject.model) - sum(layers), [int(FOR_WEIGHTS * each) for each in free])
    if places is None:
        needed, there = _bytes(subject.model) / 1e9, sum(free) / 1e9
        raise UserError(
            f"{facts.name} does not fit into {len(free)} CUDA devices: its weights take {needed:.1f} GB, and "
            f"{FOR_WEIGHTS:.0%} of {there:.1f} GB may be theirs; use a smaller model or dtype"
        )
    return spread(subject, [torch.device("cuda", place) for place in places], torch.device("cuda", 0))


def placement(layers: Sequence[int], rest: int, capacities: Sequence[int]) -> list[int] | None:
    """The device of each layer: layers that follow each other lie together, and all devices are filled alike.

    Args:
        layers: bytes of each layer.
        rest: bytes of everything else, which lies on the first device.
        capacities: bytes that each device offers.

    Returns:
        Indices of devices, rising; None if it does not fit.
    """
    # The least share of their capacity to which devices must be filled, among those at which one of them is full.
    room = [capacities[0] - rest, *capacities[1:]]
    for percent in range(1, 101):
        places = _filled(layers, [max(0, each * percent // 100) for each in room])
        if places is not None:
            return places
    return None


def _filled(layers: Sequence[int], room: Sequence[int]) -> list[int] | None:
    places: list[int] = []
    device, left = 0, room[0]
    for size in layers:
        while size > left:
            device += 1
            if device == len(room):
                return None
            left = room[device]
        left -= size
        places.append(device)
    return places


def spread(subject: LoadedSubject, places: Sequence[torch.device], stream: torch.device) -> LoadedSubject:
    """The subject with its layers on other devices; the model is moved, not copied.

    Args:
        subject: as loaded.
        places: device of each layer.
        stream: device of the residual stream, and of everything that is no layer.
    """
    model, layers = subject.model, subject.decoder.layers
    inside = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        if id(module) not in inside:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.to(stream)  # in place: tied weights stay tied
    for layer, place in zip(layers, places, strict=True):
        layer.to(place)
        for module in layer.modules():  # its parts too, for instruments that call them alone
            add_hook_to_module(module, AlignDevicesHook(execution_device=place, io_same_device=True))
    _narrow(model)
    return replace(subject, decoder=Decoder(model), device=stream)


def _narrow(model: nn.Module) -> None:
    """Give linear maps that left the CPU their own products back; see `widen_slow_products`."""
    plain = {wide: own for own, wide in WIDE.items()}
    for module in model.modules():
        if type(module) in plain and next(module.parameters()).device.type != "cpu":
            module.__class__ = plain[type(module)]


def _free_memory() -> list[int]:
    """Bytes that are free on each CUDA device."""
    return [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]


def _weight_bytes(facts: Facts, dtype: torch.dtype) -> int:
    """Bytes that the weights will take, from the sizes of the files, which may hold another dtype."""
    files = safetensors_of(required_location(facts))
    return dtype.itemsize * sum(math.prod(shape) for file in files for shape in tensor_shapes(file).values())


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
