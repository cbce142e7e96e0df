"""A batch is queued while the one before it runs; what was found before is found, and a failure loses none of it."""

from __future__ import annotations

import gc
import pickle
import weakref
from functools import partial

import numpy as np
import pytest
import torch

from findings.calibration.executor_cases import KNOCKOUTS, N, final_states, texts
from findings.calibration.pretended_device import pretended_device
from lab.corpora.batches import token_batches
from lab.errors import UserError
from lab.residual import executor as executor_module
from lab.residual import results as results_module
from lab.residual import streams, sweeps
from lab.residual.ahead import in_order
from lab.residual.executor import Executor
from lab.residual.programs import identity, skip, swap
from lab.residual.results import Results, Started
from lab.residual.sweeps import ProgramLosses, Sample
from lab.residual.tree import Node
from lab.store import Sweep
from lab.subjects.anatomy import Decoder
from lab.subjects.tiny import tiny

pytestmark = pytest.mark.calibration

PROGRAMS = {"intact": identity(N), "without 1": skip(N, [1]), "swap": swap(N, 0, 3), "again": identity(N)}
LENGTHS = (5, 6, 9, 11, 12)


@pytest.fixture(scope="module")
def decoder():
    return Decoder(tiny("qwen3"))


@pytest.fixture
def ahead(monkeypatch):
    """Looks ahead on the CPU too, where work is done when it is begun."""
    monkeypatch.setitem(sweeps.AHEAD, "cpu", 1)


def sample():
    chosen = tuple(texts(*LENGTHS))
    users = tuple(tuple(range(1, len(text.ids) // 2)) for text in chosen)
    return Sample(tuple(f"p{index}" for index in range(len(chosen))), chosen, users)


def losses(decoder, sweep=None, compare=True, **settings):
    runner = ProgramLosses(Executor(decoder, **settings), sweep or Sweep(), 12, "float32")
    return runner("sweep", sample(), PROGRAMS, compare=compare, user_words=True)


def batches():
    return token_batches(sample().texts, 12)


# ---- the order of work


@pytest.mark.parametrize(
    ("depth", "expected"), [(0, "b0 w0 b1 w1 b2 w2"), (1, "b0 b1 w0 b2 w1 w2"), (5, "b0 b1 b2 w0 w1 w2")]
)
def test_work_is_begun_before_what_is_before_it_is_waited_for(depth, expected):
    log = []

    def begin(piece):
        log.append(f"b{piece}")
        return lambda: log.append(f"w{piece}") or piece

    assert list(in_order((partial(begin, piece) for piece in range(3)), depth)) == [0, 1, 2]
    assert " ".join(log) == expected


@pytest.mark.parametrize("depth", [0, 1])
def test_what_cannot_be_begun_fails_in_its_turn(depth):
    def begin(piece):
        if piece == 2:
            raise ValueError("no memory")
        return lambda: piece

    found = in_order((partial(begin, piece) for piece in range(9)), depth)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="no memory"):
        next(found)


def noted(monkeypatch):
    """Every start of a batch and every wait for one, as they happen."""
    log, start, results = [], Executor.start, Started.results
    monkeypatch.setattr(Executor, "start", lambda *about: log.append("start") or start(*about))
    monkeypatch.setattr(Started, "results", lambda started: log.append("wait") or results(started))
    return log


def test_a_cpu_finishes_a_batch_before_the_next(decoder, monkeypatch):
    log = noted(monkeypatch)
    losses(decoder)
    assert log == ["start", "wait"] * len(batches())
    assert len(batches()) > 2


def test_looking_ahead_changes_nothing_but_the_order(decoder, monkeypatch, tmp_path):
    plain, log = losses(decoder), noted(monkeypatch)
    monkeypatch.setitem(sweeps.AHEAD, "cpu", 1)
    found = losses(decoder, Sweep(tmp_path))
    assert log == ["start", *["start", "wait"] * (len(batches()) - 1), "wait"]
    assert all(np.array_equal(found[name], plain[name]) for name in plain)
    log.clear()
    read = losses(decoder, Sweep(tmp_path))
    assert not log, "what is saved is not begun"
    assert all(np.array_equal(read[name], plain[name]) for name in plain)


# ---- failures


def failing(decoder, monkeypatch, rows):
    """A batch of this shape cannot be begun."""
    start = Executor.start

    def refuse(executor, batch, *about):
        if tuple(batch.ids.shape) == rows:
            raise UserError("out of memory with a single state")
        return start(executor, batch, *about)

    monkeypatch.setattr(Executor, "start", refuse)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_batch_that_fails_does_not_take_the_one_before_it_along(decoder, monkeypatch, tmp_path, depth):
    monkeypatch.setitem(sweeps.AHEAD, "cpu", depth)
    seen = []
    sweep = Sweep(tmp_path, lambda done, total, what: seen.append(done))
    with monkeypatch.context() as patch:
        failing(decoder, patch, tuple(batches()[1].ids.shape))
        with pytest.raises(UserError, match="single state"):
            losses(decoder, sweep)
    assert len(list(tmp_path.iterdir())) == len(seen) == 1
    log = noted(monkeypatch)
    found = losses(decoder, sweep)
    assert log.count("start") == len(batches()) - 1
    assert all(np.array_equal(found[name], values) for name, values in losses(decoder).items())


def test_a_loss_that_is_no_number_is_named_though_the_next_batch_is_begun(ahead):
    model = tiny("llama")
    ids = {token for text in sample().texts[1:] for token in text.ids}
    (bad,) = [token for token in sample().texts[0].ids if token not in ids][:1]
    model.model.embed_tokens.weight[bad] = torch.nan
    with pytest.raises(UserError, match="the loss of intact on prompt p0 is nan"):
        losses(Decoder(model))


# ---- on a device


def test_no_batch_waits_for_the_queue(monkeypatch):
    """Neither its copies, nor Gemma's masks, nor the results of the batch before it."""
    plain = losses(Decoder(tiny("gemma3_text").bfloat16()))
    with pretended_device() as device:
        there = Decoder(tiny("gemma3_text").bfloat16().to("cuda"))
        ProgramLosses(Executor(there), Sweep(), 12, "float32")("first", sample(), PROGRAMS)
        executor, log = Executor(there), noted(monkeypatch)
        device.waits.clear()
        found = ProgramLosses(executor, Sweep(), 12, "float32")(
            "sweep", sample(), PROGRAMS, compare=True, user_words=True
        )
        assert device.waits == []
        assert log == ["start", *["start", "wait"] * (len(batches()) - 1), "wait"]
        assert all(np.array_equal(found[name], values) for name, values in plain.items())
        executor.run(batches()[0], KNOCKOUTS, lambda states: {"first": states[:, 0, 0]})
        assert device.waits, "a run by itself copies its batch on the queue"


def test_work_beside_the_queue_waits_for_its_mark_and_is_waited_for(monkeypatch):
    log = []
    with pretended_device() as device:
        side = streams.side_stream(torch.device("cuda", 0))
        assert side is streams.side_stream(torch.device("cuda", 0)) is not device.queue
        monkeypatch.setattr(device.queue, "record_event", lambda: log.append("mark") or "end", raising=False)
        monkeypatch.setattr(side, "wait_event", lambda event: log.append(f"side waits for {event}"), raising=False)
        monkeypatch.setattr(
            device.queue, "wait_stream", lambda stream: log.append("queue waits") or stream is side or 1 / 0
        )
        end = streams.mark(torch.device("cuda", 0))
        with streams.beside(torch.device("cuda", 0), end):
            log.append("work")
            assert device.stream is side
        assert device.stream is device.queue
    assert log == ["mark", "side waits for end", "work", "queue waits"]
    assert streams.mark(torch.device("cpu")) is None
    with streams.beside(torch.device("cpu"), None):
        pass


def test_what_a_batch_reads_is_held_until_its_results_are_here(decoder):
    """Another batch may be captured meanwhile, whose memory may be the same once this one's is let go."""
    one, other = batches()[:2]
    executor = Executor(decoder)
    started = executor.start(one, KNOCKOUTS, lambda states: {"first": states[:, 0, 0]})
    entry = weakref.ref(executor.capture(one).entry)
    executor.capture(other)
    gc.collect()
    assert entry() is not None
    started.results()
    gc.collect()
    assert entry() is None


# ---- results


def nodes(*programs):
    return [Node(programs=list(indices)) for indices in programs]


@pytest.mark.parametrize("limit", [2**26, 0])
def test_results_find_their_programs(limit, monkeypatch):
    """Several nodes and names, programs in any order, fetched at once or at the end."""
    monkeypatch.setattr(results_module, "WAITING_BYTES", limit)
    with pretended_device() as device:
        values = torch.arange(8.0, device="cuda").reshape(4, 2)
        found = Results(5)
        device.waits.clear()
        found.add(nodes([3], [0, 2]), {"a": values[:2], "b": values[:2, 0]})
        found.add(nodes([4]), {"a": values[2:3], "b": values[2:3, 0]})
        found.add(nodes([1]), {"a": values[3:], "b": values[3:, 0]})
        assert len(device.waits) == (0 if limit else 6)
        fetched = found.fetch()
        assert len(device.waits) == (2 if limit else 6)
    expected = torch.tensor([1, 3, 1, 0, 2])
    assert torch.equal(fetched["a"], torch.arange(8.0).reshape(4, 2)[expected])
    assert torch.equal(fetched["b"], torch.arange(8.0).reshape(4, 2)[expected, 0])


def test_two_parts_are_both_there():
    with pretended_device():
        values, found = torch.tensor([5.0, 7.0], device="cuda"), Results(2)
        found.add(nodes([1]), {"a": values[:1]})
        found.add(nodes([0]), {"a": values[1:]})
        fetched = found.fetch()["a"]
    assert fetched.tolist() == [7, 5]


def test_a_wrong_number_of_results_is_refused():
    with pytest.raises(ValueError, match="zip"):
        Results(2).add(nodes([0], [1]), {"a": torch.zeros(3)})


# ---- what is kept from batch to batch


def test_a_sweep_plans_once_and_captures_every_batch_once(decoder, monkeypatch):
    assert decoder.can_split_prefix  # which is tried once, on a batch of its own
    plans, captures = [], []
    planned, capture = executor_module.planned, Decoder.capture
    monkeypatch.setattr(executor_module, "planned", lambda programs, **how: plans.append(1) or planned(programs, **how))
    monkeypatch.setattr(Decoder, "capture", lambda *about: captures.append(1) or capture(*about))
    losses(decoder)
    assert (len(plans), len(captures)) == (1, len(batches()))


@pytest.mark.parametrize("shared", [True, False])
def test_other_programs_are_planned_anew(decoder, shared):
    """Also fewer, in another order, and programs that are equal without being the same."""
    (batch, other, *_), executor = batches(), Executor(decoder, share_prefixes=shared)
    for programs in (KNOCKOUTS, KNOCKOUTS[::-1], KNOCKOUTS[:2], [skip(N, [2])], list(map(tuple, KNOCKOUTS[:2]))):
        for each in (batch, other, batch):
            fresh = final_states(Executor(decoder, share_prefixes=shared), each, programs)
            assert torch.equal(final_states(executor, each, programs), fresh)


def test_a_plan_that_is_kept_is_checked_against_the_edits_of_the_day(decoder):
    executor = Executor(decoder, edits={"halve": lambda states, batch: states.mul_(0.5)})
    program = [(executor_module.Step(None, edit="halve"), *identity(N))]
    final_states(executor, batches()[0], program)
    executor.edits = {}
    with pytest.raises(UserError, match="names the edit 'halve'; the executor knows none"):
        final_states(executor, batches()[0], program)


def test_an_executor_is_sent_without_what_it_keeps(decoder):
    executor = Executor(decoder)
    final_states(executor, batches()[0], KNOCKOUTS)
    assert executor._captured
    copy = pickle.loads(pickle.dumps(executor.__getstate__() | {"decoder": None, "_layers": None}))
    assert copy["_captured"] is copy["_plan"] is None
