"""Sweeps over a local Ray cluster: the same records to the last bit, also when a worker is killed."""

import os
import random
import re
import signal
import threading
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lab.cluster.address import require_reachable
from lab.cluster.agreement import disagreement
from lab.corpora.byte_tokenizer import byte_tokenizer
from lab.errors import UserError
from lab.experiments.layers import layer_knockout, logit_lens, weight_spectra
from lab.store import Sweep
from lab.subjects.loading import load
from lab.subjects.tiny import random_corpus, tiny
from lab.subjects.uncatalogued import named_model

pytestmark = pytest.mark.calibration

needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray is not installed; pip install 'dl-findings[ray]' has sweeps spread in tests"
)
CORPUS = random_corpus(((7, 5), (4, 9), (9, 3), (12, 8), (20, 10), (30, 5)))
KNOCKOUT = layer_knockout.Budget(None, None, None, None, None, head_dtype="float32", batch_tokens=40)
EXPERIMENTS = {
    # layer programs, whose shards are known ahead; greedy steps wait for those before
    "layer_knockout": partial(layer_knockout.measure, budget=KNOCKOUT),
    # a loop that looks into each shard before it asks for the next
    "logit_lens": partial(logit_lens.measure, budget=logit_lens.Budget(None, None, stride=2, batch_tokens=40)),
    # shards that are collected first and asked for by several threads
    "weight_spectra": partial(weight_spectra.measure, budget=weight_spectra.EXPERIMENT.budgets["quick"]),
}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "toy-llama"
    tiny("llama", num_hidden_layers=8, vocab_size=300).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return load(named_model(str(folder)), "float32", "cpu")


@pytest.fixture(scope="module")
def cluster():
    from lab.cluster.crew import Cluster

    joined = Cluster("local", 2, torch.get_num_threads())
    yield joined
    joined.close()


def briefing(subject, experiment="layer_knockout"):
    from lab import experiments
    from lab.cluster.worker import Briefing

    return Briefing(subject.facts, "float32", "cpu", experiments.modules()[experiment], ())


def spread(subject, crew, kept):
    from lab.cluster.parcels import Packer
    from lab.cluster.spread import SpreadSweep

    return SpreadSweep(kept, Packer(subject), crew)


def measured(name, subject, sweep):
    return EXPERIMENTS[name](subject, CORPUS, sweep=sweep)


# ---- the same records


@needs_ray
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_spread_sweep_gives_the_same_record_to_the_last_bit(subject, cluster, tmp_path, name):
    crew = cluster.crew(subject, briefing(subject, name))
    sweep = spread(subject, crew, Sweep(tmp_path))
    record = measured(name, subject, sweep)
    assert len(sweep._sent) > 3
    assert record.identical(measured(name, subject, Sweep()))
    assert len(list(tmp_path.glob("*.npz"))) >= len(sweep._sent)  # a killed run resumes, spread or not
    resumed = measured(name, subject, Sweep(tmp_path))
    assert resumed.identical(record)


class Killing:
    """A crew one of whose workers is stopped once it is dealt a shard, and killed after so many other shards."""

    def __init__(self, crew, rng: random.Random):
        self._crew, self._rng = crew, rng
        self._until = rng.randint(0, 3)
        self.victim: int | None = None
        self.killed = False

    def submit(self, name, parcel):
        if self.victim is None and len(self._crew._idle) == 2:
            self.victim = self._rng.choice(self._crew.processes())
            os.kill(self.victim, signal.SIGSTOP)
        self._crew.submit(name, parcel)

    def next(self):
        if self.victim is not None and not self.killed and self._until == 0:
            busy = [member.process for member in self._crew._running.values() if member.task is not None]
            assert self.victim in busy
            os.kill(self.victim, signal.SIGKILL)
            self.killed = True
        self._until -= 1
        return self._crew.next()

    def forget(self):
        self._crew.forget()


@needs_ray
@pytest.mark.parametrize("seed", [1, 2])
def test_the_shard_of_a_killed_worker_is_done_again_by_others(subject, cluster, seed):
    crew = cluster.crew(subject, briefing(subject))
    crew.wait_for_workers()
    killing = Killing(crew, random.Random(seed))
    record = measured("layer_knockout", subject, spread(subject, killing, Sweep()))
    assert killing.killed
    assert record.identical(measured("layer_knockout", subject, Sweep()))
    cluster.crew(subject, briefing(subject)).wait_for_workers()
    assert killing.victim not in crew.processes()


# ---- what goes wrong


def work_on(subject, action):
    """Work that touches the model; a function inside of a function is sent as a whole."""

    def work():
        subject.decoder.n_layers  # noqa: B018
        return action()

    return work


@needs_ray
def test_an_error_in_a_worker_is_what_it_would_be_here(subject, cluster):
    def refuse():
        raise UserError("the loss is NaN")

    def divide():
        return {"one": 1 / np.zeros((), dtype=int).tolist()}

    sweep = spread(subject, cluster.crew(subject, briefing(subject)), Sweep())
    good = sweep.shard("good", work_on(subject, lambda: {"one": np.ones(2)}))
    bad = sweep.shard("bad", work_on(subject, refuse))
    assert good["one"].tolist() == [1, 1]
    with pytest.raises(UserError, match=r"^the loss is NaN$"):
        bad.keys()
    with pytest.raises(ZeroDivisionError) as caught:
        sweep.shard("worse", work_on(subject, divide)).keys()
    assert "in divide" in caught.value.__notes__[0]  # where it happened, in the worker


@needs_ray
def test_a_shard_that_kills_every_worker_is_named(subject, cluster, monkeypatch):
    monkeypatch.setattr("lab.cluster.crew.TRIES", 2)

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    crew = cluster.crew(subject, briefing(subject))
    sweep = spread(subject, crew, Sweep())
    doomed = sweep.shard("doomed", work_on(subject, die))
    with pytest.raises(UserError, match=r"^doomed: 2 workers were lost over it; the last: .+"):
        doomed.keys()
    crew.forget()
    again = spread(subject, cluster.crew(subject, briefing(subject)), Sweep())
    assert again.shard("good", work_on(subject, lambda: {"one": np.ones(1)}))["one"] == 1


@needs_ray
def test_a_worker_that_would_measure_something_else_is_refused(subject, cluster, monkeypatch):
    from lab.cluster import agreement, crew

    own = agreement.conditions
    monkeypatch.setattr(crew, "conditions", lambda *about: own(*about) | {"torch": "1.0"})
    with pytest.raises(UserError, match=r"would measure something else: torch: \S+ there, 1.0 here; install the same"):
        cluster.crew(subject, briefing(subject)).wait_for_workers()


@needs_ray
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError(
                "Version mismatch: The cluster was started with:\n    Ray: 2.9.0\nThis process:\n    Ray: 2.60.0\n"
            ),
            "Version mismatch: The cluster was started with: Ray: 2.9.0 This process: Ray: 2.60.0",
        ),
        (ConnectionError("Could not find any running Ray instance."), "Could not find any running Ray instance."),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_one_line(monkeypatch, error, said):
    from lab.cluster import crew

    def init(**_):
        raise error

    with pytest.raises(UserError) as caught:
        crew._connect(SimpleNamespace(init=init), "auto", 1)
    assert str(caught.value) == f"cannot join the Ray cluster auto: {said}"


@needs_ray
def test_more_workers_than_there_is_room_for_are_refused(subject, cluster, monkeypatch):
    monkeypatch.setattr(cluster, "_wanted", 64)
    with pytest.raises(UserError, match=r"has room for \d+ workers of 1 threads, not for 64"):
        cluster._count(gpus=0)
    with pytest.raises(UserError, match="has room for 0 GPUs, not for 64"):
        cluster._count(gpus=1)


def test_what_differs_is_said():
    here = {"torch": "2.13.0", "processor": "AVX2"}
    assert disagreement(here, here | {"process": "7"}) is None
    assert disagreement(here, here | {"processor": "AVX512"}) == "processor: AVX512 there, AVX2 here"
    assert disagreement(here, {"torch": "2.13.0"}) == "processor: none there, AVX2 here"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1 (Connection refused); start one there with ray start"),
        ("ray://127.0.0.1:1", "no Ray cluster answers at ray://127.0.0.1:1 (Connection refused)"),
        ("nowhere", "'nowhere' is no address of a Ray cluster; give HOST:PORT, ray://HOST:PORT, auto or local"),
        ("", "'' is no address of a Ray cluster; give HOST:PORT"),
        ("host:99999", "'host:99999' is no address of a Ray cluster"),
    ],
)
def test_an_address_that_leads_nowhere_is_refused_in_one_line(monkeypatch, suite, address, said):
    monkeypatch.setattr("lab.cluster.address.find_spec", lambda name: SimpleNamespace())
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        require_reachable(address)
    result = suite.run("--ray", address)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert said in str(result.stderr)


def test_without_ray_one_line_says_how_to_get_it(monkeypatch, suite):
    monkeypatch.setattr("lab.cluster.address.find_spec", lambda name: None)
    result = suite.run("--ray", "local")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--ray needs Ray, which is not installed; install it with pip install 'dl-findings[ray]'" in str(
        result.stderr
    )


@needs_ray
def test_ray_and_processes_of_xdist_exclude_each_other(suite):
    result = suite.run("--ray", "local", "-n", "2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--ray and -n exclude each other; say how many workers with --workers" in str(result.stderr)


# ---- what is sent


@needs_ray
def test_work_is_sent_without_the_model_and_only_if_it_needs_it(subject):
    from lab.cluster.parcels import Packer, unpack

    packer = Packer(subject)
    layer = subject.decoder.layers[3]
    weight = layer.mlp.down_proj.weight
    other = replace(subject, model=tiny("llama", num_hidden_layers=8, vocab_size=300, seed=1))

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


@needs_ray
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


@needs_ray
def test_all_batches_of_layer_programs_are_known_ahead(subject):
    from lab.cluster.spread import siblings

    asked: dict[str, list] = {}

    class Noting(Sweep):
        def shard(self, name, compute):
            asked[name] = sorted(siblings(name, compute))
            return super().shard(name, compute)

    measured("layer_knockout", subject, Noting())
    together = asked["single layers 0"]
    assert len(together) > 2
    assert together == sorted(name for name in asked if name.startswith("single layers "))
    assert all(asked[name] == together for name in together)


@needs_ray
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
