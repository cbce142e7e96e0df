"""The executor within its memory: blocks, states that are held, and what it does when memory runs short."""

from __future__ import annotations

import pytest
import torch

from findings.calibration.executor_cases import ALL_PAIRS, CLOSE, KNOCKOUTS, N, final_states, pairs_cost, texts
from lab.corpora.batches import token_batches
from lab.errors import UserError
from lab.residual import executor as executor_module
from lab.residual.executor import Executor
from lab.residual.programs import edit_before, identity, swap
from lab.subjects.anatomy import Decoder
from lab.subjects.tiny import tiny

pytestmark = pytest.mark.calibration


@pytest.fixture(scope="module")
def batch():
    """Three texts of 6, 9 and 11 tokens: longer than the sliding window, and padded."""
    (only,) = token_batches(texts(9, 6, 11), 1000)
    return only


@pytest.fixture(scope="module")
def llama():
    return Decoder(tiny("llama"))


@pytest.mark.parametrize(
    ("device", "programs", "expected"), [("cuda", 10, True), ("cuda", 11, False), ("cpu", 1, False)]
)
def test_a_cuda_device_with_memory_for_eight_states_a_program_is_roomy(device, programs, expected):
    assert executor_module._is_roomy(torch.device(device), programs, capacity=80) is expected


def test_states_that_stay_views_do_not_matter(llama, batch, monkeypatch):
    """An edit, or a layer of another program, must not write into a neighbour's state."""
    programs = [*KNOCKOUTS, *(swap(N, 0, other) for other in range(1, N)), edit_before(N, 2, "double"), identity(N)[:2]]
    executor = Executor(llama, edits={"double": lambda states, batch: states.mul_(2)})
    copied = final_states(executor, batch, programs)
    monkeypatch.setattr(executor_module, "_is_roomy", lambda *about: True)
    assert torch.equal(final_states(executor, batch, programs), copied)


@pytest.mark.parametrize("states_in_budget", [0, 1, 2, 3, 5, 8])
def test_memory_budget_does_not_matter(llama, batch, states_in_budget):
    """From less than one state to all at once: same results, same number of layer applications."""
    state_bytes = batch.ids.numel() * llama.width * 4
    counts = []
    runner = Executor(llama, budget_bytes=states_in_budget * state_bytes * 4 // 3 + 1)
    small = runner.run(
        batch, ALL_PAIRS, lambda states: {"final": states}, lambda done, total, what: counts.append((done, total))
    )
    torch.testing.assert_close(small["final"], final_states(Executor(llama), batch, ALL_PAIRS), **CLOSE)
    assert counts[-1][0] == counts[-1][1] == pairs_cost(N)


@pytest.mark.parametrize("states_in_budget", [1, 4, 10])
def test_states_held_stay_within_the_budget(llama, batch, states_in_budget, monkeypatch):
    """No more distinct states than the budget has room for, plus one per level of the tree."""
    held = []
    exceeds = executor_module._Walk._exceeds

    def spy(walk, frontier, group, waiting):
        states = {id(edge.state) for other in (*waiting, frontier) for edge in other.edges}
        held.append(len(states | {id(state) for _, state in walk.finished}))
        return exceeds(walk, frontier, group, waiting)

    monkeypatch.setattr(executor_module._Walk, "_exceeds", spy)
    state_bytes = batch.ids.numel() * llama.width * 4
    final_states(Executor(llama, budget_bytes=states_in_budget * state_bytes * 4 // 3 + 1), batch, ALL_PAIRS)
    assert max(held) <= states_in_budget + N + 1
    held.clear()
    final_states(Executor(llama), batch, ALL_PAIRS)
    assert max(held) > 10, "without a budget the tree must be wider than the budgets tested"


def test_a_cuda_device_gives_half_of_its_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 14 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 << 30)
    assert executor_module.memory_budget(torch.device("cuda:1")) == 35 << 30, "what PyTorch keeps unused is free too"
    assert executor_module.memory_budget(torch.device("cpu")) == 1 << 30


SHORTAGES = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]


def short_of_memory(rows, error=SHORTAGES[0]):
    """A decoder of which one layer runs out of memory when more than `rows` rows come at once."""
    decoder = Decoder(tiny("llama"))

    def refuse(module, args):
        if len(args[0]) > rows:
            raise error

    decoder.layers[3].register_forward_pre_hook(refuse)
    return decoder


@pytest.mark.parametrize("fitting", [2, 1])
@pytest.mark.parametrize("error", SHORTAGES, ids=["accelerator", "cpu"])
def test_out_of_memory_goes_on_with_smaller_blocks(llama, batch, error, fitting):
    """Blocks are halved until they fit, with a warning; the results do not change."""
    decoder = short_of_memory(fitting * len(batch.ids), error)
    with pytest.warns(RuntimeWarning, match="out of memory; going on with") as warned:
        states = final_states(Executor(decoder), batch, KNOCKOUTS)
    assert f"going on with {fitting} states at a time" in str(warned[-1].message)
    torch.testing.assert_close(states, final_states(Executor(llama), batch, KNOCKOUTS), **CLOSE)


def test_other_errors_are_not_taken_for_a_shortage(batch):
    """A layer's own failure comes through as it is."""
    with pytest.raises(RuntimeError, match="shapes do not match"):
        final_states(Executor(short_of_memory(0, RuntimeError("shapes do not match"))), batch, [identity(N)])


def test_out_of_memory_with_one_state_is_reported(batch):
    """When a single state does not fit there is nothing left to halve."""
    decoder = short_of_memory(0)
    with pytest.raises(UserError, match="out of memory with a single state"):
        final_states(Executor(decoder), batch, [identity(N)])
