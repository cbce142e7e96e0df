"""Layers on several devices: simulated on a CPU, offloaded to disk, and for real where there are CUDA devices."""

import copy
from dataclasses import replace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader, offload_state_dict
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lab.corpora.batches import token_batches
from lab.corpora.byte_tokenizer import byte_tokenizer
from lab.corpora.corpus import token_text
from lab.errors import UserError
from lab.residual.executor import Executor
from lab.residual.lens_readings import LensReader
from lab.residual.programs import repeat, skip, swap
from lab.residual.readouts import CompletionLoss
from lab.subjects import several_devices
from lab.subjects.loading import load
from lab.subjects.several_devices import placement, spread
from lab.subjects.tiny import LAYERS, loaded, random_corpus, tiny
from lab.subjects.uncatalogued import named_model

pytestmark = pytest.mark.calibration

STREAM, ELSEWHERE = torch.device("cpu"), torch.device("cpu", 0)  # PyTorch tells them apart, and both are the CPU
PROGRAMS = [
    skip(LAYERS, ()),
    skip(LAYERS, (2,)),
    skip(LAYERS, (0, 3)),
    swap(LAYERS, 1, 4),
    repeat(LAYERS, 1, 3),
]


def readings(subject):
    """Losses of some layer programs and the logit lens on two batches."""
    texts = [token_text(text) for text in random_corpus().texts]
    found = []
    for batch in token_batches(texts, 24):
        batch = batch.to(subject.device)
        loss = CompletionLoss(subject.decoder, batch, head_dtype=torch.float32, reference=None)
        found += Executor(subject.decoder).run(batch, PROGRAMS, loss).values()
        found += map(torch.as_tensor, LensReader(subject.decoder)(batch).values())
    return [values.cpu() for values in found]


def require_same(these, those):
    """To the last bit; a reading that is not a number must not be one in the other either."""
    assert len(these) == len(those) > 0
    for one, other in zip(these, those, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


# ---- where layers go


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(0, 100),
    st.lists(st.integers(1, 400), min_size=1, max_size=5),
)
def test_layers_fit_where_they_are_put_and_lie_together(layers, rest, capacities):
    places = placement(layers, rest, capacities)
    if places is None:  # so it is too large, but for what packing whole layers wastes
        waste = max(layers) * len(capacities)
        assert rest > capacities[0] or sum(layers) + rest + waste > sum(capacities)
        return
    assert len(places) == len(layers)
    assert places == sorted(places)
    for device, capacity in enumerate(capacities):
        own = sum(size for size, place in zip(layers, places, strict=True) if place == device)
        assert own == 0 or own + rest * (device == 0) <= capacity


def test_devices_are_filled_alike():
    assert placement([1] * 12, 0, [100, 100, 100]) == [0] * 4 + [1] * 4 + [2] * 4
    assert placement([1] * 12, 0, [200, 100, 100]) == [0] * 6 + [1] * 3 + [2] * 3
    assert placement([1] * 12, 90, [100, 100]).count(0) == 1
    assert placement([10] * 4, 0, [19, 19]) is None


# ---- devices that are simulated: the CPU, and the CPU under another name


class Mixed(RuntimeError):
    """An operation was given tensors of two devices."""


class Devices(TorchDispatchMode):
    """Keeps book of the device that each tensor would be on, and refuses operations on two of them."""

    def __init__(self):
        super().__init__()
        self.places = WeakTensorKeyDictionary()
        self.moves = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        places = {self.places[tensor] for tensor in given if tensor in self.places and tensor.dim()}
        if len(places) > 1:
            raise Mixed(f"{function} on {places}")
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and places:
                self.places[leaf] = next(iter(places))
        return result

    def move(self, given, device, skip_keys=None, **_):
        """In the place of `accelerate`'s `send_to_device`."""
        if isinstance(given, torch.Tensor):
            moved = given.clone() if given.dim() == 0 else given.detach().view(given.shape)
            if self.places.get(given, device) != device:
                self.moves += 1
            self.places[moved] = device
            return moved
        if isinstance(given, (tuple, list)):
            return type(given)(self.move(each, device) for each in given)
        if isinstance(given, dict):
            return {key: self.move(each, device) for key, each in given.items()}
        return given

    def find(self, given):
        """In the place of `accelerate`'s `find_device`."""
        tensors = (leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor))
        return next((self.places.get(tensor, STREAM) for tensor in tensors), None)


def test_nothing_meets_on_two_devices_when_layers_lie_on_both(monkeypatch):
    whole = loaded(tiny("gemma3_text"))
    expected = readings(whole)
    apart = loaded(copy.deepcopy(whole.model))
    devices = Devices()

    def under_the_mode():
        with devices:
            return readings(apart)

    places = [ELSEWHERE if layer % 2 else STREAM for layer in range(LAYERS)]
    for layer, place in zip(apart.decoder.layers, places, strict=True):
        for tensor in (*layer.parameters(), *layer.buffers()):
            devices.places[tensor] = place
    for name, tensor in apart.model.named_parameters():
        if ".layers." not in name:
            devices.places[tensor] = STREAM
    with pytest.raises(Mixed):  # as they are, layers do not go where the stream is
        under_the_mode()
    monkeypatch.setattr("accelerate.hooks.send_to_device", lambda given, device, **rest: move_unseen(given, device))
    monkeypatch.setattr("accelerate.hooks.find_device", devices.find)

    def move_unseen(given, device):
        with torch.utils._python_dispatch._disable_current_modes():
            return devices.move(given, device)

    apart = spread(apart, places, STREAM)
    for layer, place in zip(apart.decoder.layers, places, strict=True):
        for tensor in (*layer.parameters(), *layer.buffers()):
            devices.places[tensor] = place
    found = under_the_mode()
    assert devices.moves > 0
    require_same(found, expected)


# ---- layers that lie on disk, under the same hooks


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3"])
def test_layers_that_are_read_from_disk_whenever_they_run_measure_the_same(tmp_path, architecture):
    whole = loaded(tiny(architecture))
    expected = readings(whole)
    for index, layer in enumerate(whole.decoder.layers[1:4]):
        offload_state_dict(tmp_path / str(index), layer.state_dict())
        weights = OffloadedWeightsLoader(save_folder=str(tmp_path / str(index)))
        hook = AlignDevicesHook("cpu", offload=True, io_same_device=True, weights_map=weights, place_submodules=True)
        add_hook_to_module(layer, hook)
        assert all(parameter.is_meta for parameter in layer.parameters())
    require_same(readings(replace(whole, decoder=type(whole.decoder)(whole.model))), expected)
    for layer in whole.decoder.layers:
        remove_hook_from_module(layer, recurse=True)


# ---- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_layers_on_another_device_measure_the_same(other):
    if torch.device(other).index == 1 and torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device here; layers on two need two")
    main = torch.device("cuda", 0)
    together = loaded(tiny("llama").to(main))
    expected = readings(together)
    places = [torch.device(other) if layer in (1, 3) else main for layer in range(LAYERS)]
    apart = spread(loaded(tiny("llama")), places, main)
    assert {parameter.device for parameter in apart.decoder.layers[1].parameters()} == {torch.device(other)}
    for ours, own in zip(readings(apart), expected, strict=True):
        exact = other != "cpu"  # a CPU rounds otherwise
        torch.testing.assert_close(ours, own, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-4)


# ---- when


@pytest.fixture
def facts(tmp_path):
    folder = tmp_path / "toy-llama"
    tiny("llama", vocab_size=300).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return named_model(str(folder))


@pytest.fixture
def asked(monkeypatch):
    """What `load` asks for, in the place of CUDA devices."""
    seen = []
    monkeypatch.setattr(several_devices, "spread", lambda *about: seen.append(about))
    monkeypatch.setattr(several_devices.loading, "load", lambda *about: seen.append(about) or load(*about[:2], "cpu"))
    return seen


@pytest.mark.parametrize(
    ("free", "device", "several"),
    [([10**9], "cuda", False), ([10**9, 10**9], "cuda", False), ([10**5, 10**5], "cuda:1", False), ([], "cpu", False),
     ([3 * 10**5] * 3, "cuda", True)],
)  # fmt: skip
def test_several_devices_are_used_where_one_is_too_small(monkeypatch, facts, asked, free, device, several):
    monkeypatch.setattr(several_devices, "_free_memory", lambda: free)
    several_devices.load(facts, "float32", device)
    assert asked[0][2] == ("cpu" if several else device)
    assert len(asked) == 1 + several
    if several:
        _, places, stream = asked[1]
        assert stream == torch.device("cuda", 0)
        assert len(places) == LAYERS
        assert places[-1] == torch.device("cuda", 2)


def test_a_model_that_is_too_large_for_all_devices_is_refused(monkeypatch, facts, asked):
    monkeypatch.setattr(several_devices, "_free_memory", lambda: [10**5, 10**5])
    with pytest.raises(UserError, match="toy-llama does not fit into 2 CUDA devices: its weights take"):
        several_devices.load(facts, "float32", "cuda")
