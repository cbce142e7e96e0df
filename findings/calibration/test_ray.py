"""Sweeps over a local Ray cluster: the same records to the last bit, also when a worker is killed."""

import os
import random
import re
import signal
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from findings.calibration.small_budgets import small_budget, small_corpus
from findings.calibration.word_tokenizer import word_tokenizer
from lab.adapters import lora
from lab.cluster.address import require_reachable
from lab.cluster.agreement import disagreement
from lab.errors import UserError
from lab.experiments import experiment, modules
from lab.experiments.surgery import spectral_peft
from lab.store import Sweep
from lab.subjects.loading import load
from lab.subjects.tiny import tiny
from lab.subjects.uncatalogued import named_model
from lab.training import making, recipes, specimens

pytestmark = pytest.mark.calibration

needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray is not installed; pip install 'dl-findings[ray]' has sweeps spread in tests"
)
#: T-18 needs adapters, and has a test of its own
EXPERIMENTS = [name for name in modules() if experiment(name).budgets and name != "spectral_peft"]
ADAPTERS = spectral_peft.Budget(
    ("A",), ("H",), (0,), sweep=False, problems=3, text_tokens=20, specimens="spectral-peft"
)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """A decoder with norms of heads, in files, with the name that the recipes of the workshop have."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "tiny", word_tokenizer()
    size = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": len(tokenizer)}
    tiny("qwen3", **size).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return subject_in(named_model(str(folder)))


def subject_in(facts):
    return load(facts, "bfloat16", "cpu")


@pytest.fixture(scope="module")
def cluster():
    from lab.cluster.crew import Cluster

    joined = Cluster("local", 2, torch.get_num_threads())
    yield joined
    joined.close()


def briefing(subject, name="layer_knockout"):
    from lab.cluster.worker import Briefing

    return Briefing(subject.facts, "bfloat16", "cpu", modules()[name], experiment(name).libraries)


def spread(subject, crew, kept):
    from lab.cluster.parcels import Packer
    from lab.cluster.spread import SpreadSweep

    return SpreadSweep(kept, Packer(subject), crew)


def measured(name, subject, sweep):
    """The record of small batches, so that there are many shards, without what was timed."""
    budget = ADAPTERS if name == "spectral_peft" else small_budget(name)
    if hasattr(budget, "batch_tokens"):
        budget = replace(budget, batch_tokens=40)
    record = experiment(name).measure(subject, small_corpus(name), budget, sweep)
    return record.drop_vars([label for label, values in record.data_vars.items() if values.attrs["unit"] == "s"])


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


@needs_ray
@pytest.mark.skipif(not lora.is_available(), reason=lora.NEED)
def test_adapters_on_a_changed_model_are_read_here(subject, cluster, workshop):
    """The model has been made competent in memory; what workers have loaded is not."""
    planned = spectral_peft.runs(ADAPTERS, recipes.rates())
    for name in (recipes.family()["base"], *(run.name for run in planned)):
        with specimens.building(recipes.recipe(name)) as folder:
            making.trained(subject_in(subject.facts), recipes.recipe(name), folder)
    here = measured("spectral_peft", subject, Sweep())
    sweep = spread(subject, cluster.crew(subject, briefing(subject, "spectral_peft")), Sweep())
    assert measured("spectral_peft", subject, sweep).identical(here)
    assert not sweep._sent


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
    assert good["one"].flags.writeable
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
def test_a_model_that_was_changed_here_is_no_workers_model(subject, cluster):
    changed = subject_in(subject.facts)
    changed.decoder.layers[0].mlp.down_proj.weight.data.mul_(2)
    with pytest.raises(UserError, match=r"would measure something else: weights in memory: [0-9a-f]{12} there, "):
        cluster.crew(changed, briefing(changed)).wait_for_workers()
    cluster.crew(subject, briefing(subject)).wait_for_workers()


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
