"""What is sent to workers: work without the model, if it needs the model and the model is as it was loaded."""

import threading
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from findings.calibration.small_budgets import small_budget, small_corpus
from lab.corpora.batches import TokenText, token_batches
from lab.experiments import experiment
from lab.residual import sweeps
from lab.residual.executor import Executor
from lab.residual.programs import identity, skip
from lab.residual.sweeps import ProgramLosses, sample
from lab.store import Sweep
from lab.subjects.tiny import loaded, tiny

pytestmark = pytest.mark.calibration

if find_spec("ray") is None:
    pytest.skip("Ray is not installed; pip install 'dl-findings[ray]'", allow_module_level=True)


@pytest.fixture(scope="module")
def subject():
    return loaded(tiny("llama", num_hidden_layers=8))


def work_on(subject, action):
    """Work that touches the model; a function inside of a function is sent as a whole."""

    def work():
        subject.decoder.n_layers  # noqa: B018
        return action()

    return work


def test_work_is_sent_without_the_model_and_only_if_it_needs_it(subject):
    from lab.cluster.parcels import Packer, unpack

    packer = Packer(subject)
    layer = subject.decoder.layers[3]
    weight = layer.mlp.down_proj.weight
    other = replace(subject, model=tiny("llama", num_hidden_layers=8, seed=1))

    def work():
        return {"sum": weight.sum().numpy(), "same": np.array(layer.mlp.down_proj.weight is weight)}

    parcel = packer.pack(work)
    assert len(parcel.content) < 3_000 < weight.numel() * 4
    assert parcel.threads == torch.get_num_threads()
    found = unpack(parcel, other)()
    assert found["same"]
    assert found["sum"] == other.model.model.layers[3].mlp.down_proj.weight.sum().numpy()
    assert packer.pack(lambda: {"one": np.ones(1)}) is None
    lock = threading.Lock()
    assert packer.pack(work_on(subject, lambda: {"one": np.array(lock.locked())})) is None


def test_work_on_a_changed_model_stays_here(subject):
    from lab.cluster.parcels import Packer

    packer = Packer(subject)
    work = work_on(subject, dict)
    layer = subject.decoder.layers[0]
    assert packer.pack(work) is not None
    hook = layer.register_forward_hook(lambda *about: None)
    assert packer.pack(work) is None
    hook.remove()
    assert packer.pack(work) is not None
    own, layer.mlp = layer.mlp, torch.nn.Identity()
    assert packer.pack(work) is None
    layer.mlp = own
    assert packer.pack(work) is not None
    weight = layer.input_layernorm.weight
    before = weight.detach().clone()
    weight.data[3] += 1e-6  # which PyTorch does not count as a change
    assert packer.pack(work) is None
    weight.data.copy_(before)
    assert packer.pack(work) is not None


@pytest.mark.parametrize("compiler", [None, "eager"])
def test_layer_programs_are_sent_whether_or_not_layers_are_compiled(subject, compiler):
    from lab.cluster.parcels import Packer, unpack

    texts = sample(small_corpus("layer_knockout"), None, None)
    (batch, *_), programs = token_batches(texts.texts, 40), {"intact": identity(8), "without layer 1": skip(8, [1])}
    losses = ProgramLosses(Executor(subject.decoder, compiler=compiler), Sweep(), 40, "float32")
    work = partial(losses._sums, batch, texts, programs, True, False)
    found, here = unpack(Packer(subject).pack(work), subject)(), work()
    assert all(np.array_equal(found[name], here[name]) for name in here)
    assert (here["loss"][0] != here["loss"][1]).any()


def test_all_batches_of_layer_programs_are_known_ahead(subject):
    from lab.cluster.spread import siblings

    asked: dict[str, list] = {}

    class Noting(Sweep):
        def shard(self, name, compute):
            asked[name] = sorted(siblings(name, compute))
            return super().shard(name, compute)

    experiment("layer_knockout").measure(
        subject, small_corpus("layer_knockout"), small_budget("layer_knockout", batch_tokens=40), Noting()
    )
    together = asked["single layers 0"]
    assert len(together) > 2
    assert together == sorted(name for name in asked if name.startswith("single layers "))
    assert all(asked[name] == together for name in together)


def test_what_texts_begin_with_is_put_apart_in_work_that_is_sent_too(subject):
    from lab.cluster.parcels import Packer, unpack
    from lab.cluster.spread import siblings

    texts = sample(small_corpus("layer_knockout"), None, None)
    shared = tuple(range(1, 21))
    texts = replace(
        texts,
        texts=tuple(TokenText((*shared, *text.ids), tuple(20 + t for t in text.targets)) for text in texts.texts),
        user_targets=((18, 19, 20),) * len(texts.texts),  # within what is shared: the prefix ends before them
    )
    programs = {"intact": identity(8), "without layer 1": skip(8, [1])}
    losses = ProgramLosses(Executor(subject.decoder), Sweep(), 200, "float32")
    own = losses.batches(texts, programs, True)
    assert len(own) > 1
    assert all(len(batch.prefix) == 17 for batch in own if len(batch.ids) > 1)
    assert any(len(batch.prefix) for batch in own)
    work = siblings("part 0", partial(losses._sums, own[0], texts, programs, True, True))
    assert len(work) == len(own)
    for name, batch in zip(work, own, strict=True):
        assert torch.equal(work[name].args[0].prefix, batch.prefix)
        found, here = unpack(Packer(subject).pack(work[name]), subject)(), work[name]()
        assert all(np.array_equal(found[key], here[key]) for key in here)


class Alone:
    """A crew of one who begins when the first result is asked for."""

    def __init__(self, subject):
        self.subject, self.queue, self.log = subject, [], []

    def submit(self, name, parcel):
        self.log.append("sent")
        self.queue.append((name, parcel))

    def next(self):
        from lab.cluster.parcels import unpack

        self.log.append("done")
        name, parcel = self.queue.pop(0)
        return name, unpack(parcel, self.subject)()


def test_a_sweep_that_looks_ahead_leaves_all_of_it_to_workers(subject, monkeypatch, tmp_path):
    from lab.cluster.parcels import Packer
    from lab.cluster.spread import SpreadSweep

    texts, programs = sample(small_corpus("layer_knockout"), None, None), {"intact": identity(8), "less": skip(8, [1])}

    def losses(sweep):
        found = ProgramLosses(Executor(subject.decoder), sweep, 40, "float32")("all", texts, programs, compare=True)
        return {name: values.tobytes() for name, values in found.items()}

    here, batches = losses(Sweep()), len(token_batches(texts.texts, 40))
    monkeypatch.setitem(sweeps.AHEAD, "cpu", 1)
    crew, begun = Alone(subject), []
    start = ProgramLosses._start
    monkeypatch.setattr(ProgramLosses, "_start", lambda *about: begun.append(len(crew.queue)) or start(*about))
    assert losses(SpreadSweep(Sweep(tmp_path), Packer(subject), crew)) == here
    assert crew.log == ["sent"] * batches + ["done"] * batches
    assert len(begun) == batches > 2, "each is begun once, by the worker"


def test_pending_arrays_are_a_dict_that_waits():
    from lab.cluster.spread import Pending

    waits = []

    def pending():
        return Pending(lambda: waits.append(1) or {"a": 1, "b": 2})

    whole = {"a": 1, "b": 2}
    late = pending()
    assert waits == []
    assert late["a"] == 1
    assert len(waits) == 1
    assert late.get("c", 3) == 3
    assert len(late) == 2
    assert "b" in late
    assert len(waits) == 1
    for taken in (dict(pending()), {**pending()}, pending() | {}, {} | pending(), pending().copy()):
        assert taken == whole
    merged: dict = {}
    merged |= pending()
    assert merged == whole
    merged = {}
    merged.update(pending())
    assert merged == whole
    assert list(pending()) == ["a", "b"] == list(pending().keys())
    assert list(pending().items()) == [("a", 1), ("b", 2)]
    assert list(pending().values()) == [1, 2]
    assert (lambda **given: given)(**pending()) == whole
