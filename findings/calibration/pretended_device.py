"""A CUDA device that is not there: CPU tensors under which code fails where it would fail on an accelerator.

Inside `pretended_device()` every storage has a place, the processor or the accelerator. `.to("cuda")`, `.cuda()` and
factories with `device="cuda"` make accelerator tensors (which the CPU computes); `.device` and `.is_cuda` answer
accordingly; and what CUDA refuses is refused: operations between the two places, NumPy views of accelerator tensors,
generators of the other place. What comes from where the mode cannot see (the autograd engine) has no place and goes
with either.

It also notes in `waits` what would make the processor wait for all that is queued: copies between the two places, and
looks at an accelerator's values, unless they are done on another stream than the queue.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, resolve_name

from lab.residual.streams import side_stream

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
FREE_BYTES = 2**28

#: handed a second tensor of another place, these copy from it or read no more than its form
_TAKES_ANY = {
    "copy_",
    "__set__",
    "expand_as",
    "view_as",
    "reshape_as",
    "broadcast_tensors",
    "result_type",
    "_has_compatible_shallow_copy_type",
}
#: self, then indices, which may lie on the processor
_INDEXED = {"__getitem__", "__setitem__", "index_put", "index_put_"}
_MOVES = {"to", "cuda", "cpu"}
#: of an accelerator tensor's values
_LOOKS = {"item", "tolist", "nonzero", "equal", "allclose", "__bool__", "__int__", "__float__", "__index__"}


class PretendedDevice(TorchFunctionMode):
    """Follows the place of every storage, and refuses what CUDA would."""

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[int, tuple[StorageWeakRef, torch.device]] = {}
        self.queue = self.stream = Stream()
        self.waits: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.__name__
        if name == "__get__" and args and isinstance(args[0], Tensor):
            answer = self._attribute(func, args[0])
            if answer is not None:
                return answer
        if name in ("numpy", "__array__") and self.place(args[0]) == CUDA:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if name in _MOVES and isinstance(args[0], Tensor):
            return self._moved(func, args, kwargs)
        self._note_wait(name, args, kwargs)
        here = self._agreed(name, args, kwargs)
        asked = kwargs.get("device")
        if asked is not None:
            here = _place(asked)
            kwargs["device"] = CPU if here == CUDA else asked
        if name == "type_as":
            here = self.place(args[1])
        elif here is None and not list(_tensors((args, kwargs))):
            here = CPU  # a factory without a device
        self._require_generator(kwargs.get("generator"), here)
        result = func(*args, **kwargs)
        if here is not None:
            for tensor in _tensors(result):
                self.put(tensor, here)
        return result

    def place(self, tensor: Tensor) -> torch.device | None:
        """Where a tensor lies; None if that is not known."""
        storage = _storage(tensor)
        known = None if storage is None else self._places.get(storage._cdata)
        return known[1] if known else None

    def put(self, tensor: Tensor, place: torch.device) -> Tensor:
        """Note where a tensor lies."""
        storage = _storage(tensor)
        if storage is not None and self.place(tensor) is None:
            # The weak reference keeps the storage's address from being given to another one.
            self._places[storage._cdata] = (StorageWeakRef(storage), place)
            if len(self._places) % 4096 == 0:
                self._places = {key: value for key, value in self._places.items() if not value[0].expired()}
        return tensor

    def _attribute(self, func: Any, tensor: Tensor) -> Any:
        attribute = resolve_name(func) or ""
        on_cuda = self.place(tensor) == CUDA
        answers = {"device": CUDA if on_cuda else None, "is_cuda": on_cuda, "is_cpu": not on_cuda}
        return next((value for key, value in answers.items() if attribute.endswith(f".{key}.__get__")), None)

    def _moved(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        tensor = args[0]
        given = (*args[1:], kwargs.get("device"), kwargs.get("other"))
        places = [_place(value) for value in given if isinstance(value, (str, torch.device))]
        places += [self.place(value) for value in given if isinstance(value, Tensor)]
        places += {"cuda": [CUDA], "cpu": [CPU]}.get(func.__name__, [])
        before = self.place(tensor)
        goal = places[0] if places else before
        rest = [CPU if isinstance(value, (str, torch.device)) else value for value in args[1:]]
        kwargs = {name: CPU if name == "device" else value for name, value in kwargs.items()}
        moved: Tensor = tensor if func.__name__ in ("cuda", "cpu") else tensor.to(*rest, **kwargs)
        if goal is not None and before is not None and goal != before:
            self._wait(func.__name__)
        if goal != before and _storage(moved) is not None and self.place(moved) is not None:
            moved = moved.clone() if moved.requires_grad or tensor.requires_grad else moved.detach().clone()
        return moved if goal is None else self.put(moved, goal)

    def _note_wait(self, name: str, args: Any, kwargs: Any) -> None:
        """Note what looks at values on the accelerator, or copies to or from there."""
        made_there = name in ("tensor", "as_tensor") and _place(kwargs.get("device") or CPU) == CUDA
        if made_there or not (args and isinstance(args[0], Tensor)):
            if made_there:
                self._wait(name)
            return
        there = self.place(args[0]) == CUDA
        others = [self.place(other) for other in _tensors(args[1:]) if other.dim()]
        listed = name in _INDEXED and any(isinstance(part, list) for part in _parts(args[1]))
        masked = name in _INDEXED and any(part.dtype == torch.bool for part in _tensors(args[1:2]))
        copied = name in _INDEXED | {"copy_"} and (CPU if there else CUDA) in others
        if (there and (name in _LOOKS or listed or masked)) or copied:
            self._wait(name)

    def _wait(self, name: str) -> None:
        if self.stream is self.queue:
            self.waits.append(name)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """What is done here is put on another stream."""
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def _agreed(self, name: str, args: Any, kwargs: Any) -> torch.device | None:
        """The place of an operation's results; raises where CUDA would."""
        tensors = list(_tensors((args, kwargs)))
        first = self.place(args[0]) if args and isinstance(args[0], Tensor) else None
        if name in _TAKES_ANY:
            return first
        if name in _INDEXED:
            self._require_indices(name, first, args)
            return first
        places = {self.place(tensor) for tensor in tensors}
        if CUDA in places and any(self.place(tensor) == CPU and tensor.dim() for tensor in tensors):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} found at least two, cuda:0 and cpu!"
            )
        if CUDA in places:
            return CUDA
        return CPU if places == {CPU} else None

    def _require_indices(self, name: str, place: torch.device | None, args: Any) -> None:
        indices = list(_tensors(args[1]))
        if place == CPU and any(self.place(index) == CUDA for index in indices):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        values = args[2:3] if indices and name != "__getitem__" else ()
        for value in _tensors(values):
            if value.dim() and place is not None and self.place(value) not in (None, place):
                raise RuntimeError(f"Expected all tensors to be on the same device, but got value elsewhere ({name})")

    def _require_generator(self, generator: Any, place: torch.device | None) -> None:
        if generator is None:
            return
        kind = getattr(generator, "place", CPU)
        if kind != (place or CPU):
            raise RuntimeError(f"Expected a '{(place or CPU).type}' device type for generator but found '{kind.type}'")


class _Generator(torch.Generator):
    """A generator of random numbers, of the processor or of the accelerator that is not there."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls, "cpu")
        made.place = _place(device)
        return made


class Stream:
    """A stream of the accelerator that is not there: whatever it is told to do is done by then."""

    def __init__(self, device: Any = None):
        self.device = device

    def record_event(self) -> object:
        """A mark in this stream."""
        return object()

    def wait_event(self, event: object) -> None:
        """Nothing is under way."""

    def wait_stream(self, stream: Stream) -> None:
        """Nothing is under way."""


@contextmanager
def pretended_device() -> Iterator[PretendedDevice]:
    """PyTorch with a CUDA device, as far as `lab` asks it about one."""
    mode, from_numpy = PretendedDevice(), torch.from_numpy
    answers: dict[str, Any] = {
        "torch.Generator": _Generator,
        "torch.from_numpy": lambda array: mode.put(from_numpy(array), CPU),
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.mem_get_info": lambda device=None: (FREE_BYTES, 2 * FREE_BYTES),
        "torch.cuda.memory_reserved": lambda device=None: 0,
        "torch.cuda.memory_allocated": lambda device=None: 0,
        "torch.cuda.synchronize": mock.Mock(),
        "torch.cuda.Stream": Stream,
        "torch.cuda.stream": mode.on,
        "torch.cuda.current_stream": lambda device=None: mode.stream,
    }
    with ExitStack() as stack:
        side_stream.cache_clear()  # a real device's stream is not this one's, nor the other way round
        stack.callback(side_stream.cache_clear)
        stack.callback(_forget_accelerator)
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, answer))
        yield stack.enter_context(mode)


def _place(device: Any) -> torch.device:
    return CUDA if torch.device(device).type == "cuda" else CPU


def _forget_accelerator() -> None:
    """Let neural-compressor look again which device there is: it remembers the first answer, and PEFT asks it."""
    known = sys.modules.get("neural_compressor.torch.utils.auto_accelerator")
    if known is not None:
        known.auto_detect_accelerator.cache_clear()


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """What a tensor lies in, under all wrappers of `torch.func`; None if it has no storage."""
    with torch._C.DisableTorchFunction():
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        try:
            return tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return None


def _parts(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
