"""The executor runs layer programs as the plain loop would, whatever it shares, stacks or splits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from findings.calibration.executor_cases import ALL_PAIRS, CLOSE, KNOCKOUTS, N, final_states, pairs_cost, texts
from lab.corpora.batches import token_batches
from lab.errors import UserError
from lab.residual.executor import Executor, Variant
from lab.residual.programs import Step, edit_before, identity, loop_last, order, repeat, replace, skip, swap
from lab.subjects.anatomy import Decoder
from lab.subjects.tiny import ARCHITECTURES, tiny

pytestmark = pytest.mark.calibration


@pytest.fixture(scope="module")
def batch():
    """Three texts of 6, 9 and 11 tokens: longer than the sliding window, and padded."""
    (only,) = token_batches(texts(9, 6, 11), 1000)
    return only


@pytest.fixture(scope="module", params=ARCHITECTURES)
def decoder(request):
    return Decoder(tiny(request.param))


@pytest.fixture(scope="module")
def llama():
    return Decoder(tiny("llama"))


@pytest.fixture(scope="module")
def gemma():
    """Sliding and global attention mixed: layers differ in mask and rotary base."""
    return Decoder(tiny("gemma3_text"))


def naive(decoder: Decoder, batch, program, variants=None, edits=None):
    """The plain loop: one program, one layer after the other."""
    captured = decoder.capture(batch.ids)
    hidden = captured.entry
    for step in program:
        if step.edit is not None:
            hidden = edits[step.edit](hidden[None].clone(), batch)[0]
        if step.layer is not None:
            variant = (variants or {}).get(step.variant) or Variant(decoder.layers[step.layer], step.layer)
            source = captured if variant.calls is None else variant.calls(batch.ids)
            args, kwargs = source.calls[variant.layer]
            output = variant.module(hidden, *args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
    return hidden


# ---- programs against the model itself


def test_identity_program_is_the_models_own_forward(decoder, batch):
    """The intact program's logits are bitwise those of the model in the same batch."""
    states = final_states(Executor(decoder), batch, [identity(N)])[0]
    own = decoder.model(input_ids=batch.ids, use_cache=False).logits
    torch.testing.assert_close(decoder.norm_and_head(states), own, rtol=0, atol=0)


OUTPUT_PROJECTIONS = ("o_proj", "down_proj")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_skipping_is_zeroing_the_output_projections(architecture, batch):
    """Without biases a layer whose o_proj and down_proj are zero leaves the residual stream as it was.

    In Gemma 3 a norm follows each projection; the norm of zero is zero.
    """
    skipped = final_states(Executor(Decoder(tiny(architecture))), batch, KNOCKOUTS[1:])
    for layer in range(N):
        model = tiny(architecture)
        for name, module in model.model.layers[layer].named_modules():
            if name.endswith(OUTPUT_PROJECTIONS):
                nn.init.zeros_(module.weight)
        zeroed = final_states(Executor(Decoder(model)), batch, [identity(N)])[0]
        torch.testing.assert_close(skipped[layer], zeroed, **CLOSE)


@pytest.mark.parametrize("layer", range(N))
def test_omitting_a_layer_leaves_the_arguments_of_all_others_unchanged(gemma, batch, layer):
    """Every layer sees the mask and the rotary embedding of the intact run, not its neighbour's (spy)."""
    intact, without = (spied_arguments(gemma, batch, program) for program in (identity(N), skip(N, [layer])))
    assert sorted(without) == [other for other in range(N) if other != layer]
    for other, arguments in without.items():
        torch.testing.assert_close(arguments, intact[other], rtol=0, atol=0)
    masks = {None if mask is None else str(mask.tolist()) for mask, _ in intact.values()}
    assert len(masks) == 2, "the specimen must mix two masks for this test to mean anything"


def spied_arguments(decoder, batch, program):
    """Mask (None: plain causal) and rotary embedding of each layer's call while the executor runs a program."""
    seen = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, index=index: seen.update(
                {index: (kwargs["attention_mask"], kwargs["position_embeddings"])}
            ),
            with_kwargs=True,
        )
        for index, layer in enumerate(decoder.layers)
    ]
    final_states(Executor(decoder), batch, [program])
    for hook in hooks:
        hook.remove()
    return seen


# ---- programs against the plain loop


def test_named_programs_equal_the_plain_loop(decoder, batch):
    """Skips, swaps, repeats, loops and orders, all in one tree, equal one loop each, in every architecture."""
    programs = [
        *KNOCKOUTS,
        swap(N, 0, 3),
        repeat(N, 2, 3),
        repeat(N, 1, 0),
        loop_last(N, 2, 3),
        order([4, 3, 2, 1, 0]),
        skip(N, range(N)),
    ]
    states = final_states(Executor(decoder), batch, programs)
    for program, state in zip(programs, states, strict=True):
        torch.testing.assert_close(state, naive(decoder, batch, program), **CLOSE)


def halve(states, batch):
    return states.mul_(0.5)


def add_first_token(states, batch):
    return states + states[:, :, :1]


class Halved(nn.Module):
    """A stand-in for a layer: half its update."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden, *args, **kwargs):
        return hidden + 0.5 * (self.layer(hidden, *args, **kwargs) - hidden)


EDITS = {"halve": halve, "add": add_first_token}
BATCH = token_batches(texts(8, 5), 1000)[0]
VARIANTS = ("halved", "donor")
STEPS = st.builds(
    Step, st.integers(0, N - 1), st.sampled_from([None, None, None, *VARIANTS]), st.sampled_from([None, None, *EDITS])
)
EMPTY = st.builds(Step, st.none(), st.none(), st.sampled_from([None, *EDITS]))
PROGRAMS = st.lists(st.lists(STEPS | EMPTY, max_size=7).map(tuple), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def variants(gemma):
    donor = Decoder(tiny("gemma3_text", seed=1, sliding_window=2, rope_theta=100.0))
    return {"halved": Variant(Halved(gemma.layers[2]), 2), "donor": Variant(donor.layers[3], 3, donor.capture)}


@settings(max_examples=40, deadline=None)
@given(programs=PROGRAMS, budget=st.sampled_from([1, 3 * BATCH.ids.numel() * 128, 2**30]), shared=st.booleans())
def test_random_programs_equal_the_plain_loop(gemma, variants, programs, budget, shared):
    """Any programs, with variants, donors and edits, within any budget, shared or alone."""
    runner = Executor(gemma, variants=variants, edits=EDITS, budget_bytes=budget, share_prefixes=shared)
    states = final_states(runner, BATCH, programs)
    for program, state in zip(programs, states, strict=True):
        torch.testing.assert_close(state, naive(gemma, BATCH, program, variants, EDITS), **CLOSE)


@given(i=st.integers(0, 8), j=st.integers(0, 8))
def test_swapping_twice_is_the_identity(i, j):
    """swap(i, i) is the intact model, and a swap applied to its own order restores it."""
    assert swap(9, i, i) == identity(9)
    once = [step.layer for step in swap(9, i, j)]
    assert [once[layer] for layer in once] == list(range(9))


# ---- what must not matter


def test_batch_composition_and_padding_do_not_matter(gemma):
    """A text's states are the same alone and beside longer ones."""
    corpus = texts(5, 12, 8)
    together = token_batches(corpus, 1000)[0]
    states = final_states(Executor(gemma), together, KNOCKOUTS)
    for row, text in enumerate(together.texts):
        alone = token_batches([corpus[text]], 1000)[0]
        length = len(corpus[text].ids)
        torch.testing.assert_close(
            states[:, row, :length], final_states(Executor(gemma), alone, KNOCKOUTS)[:, 0], **CLOSE
        )


def test_shared_prefixes_do_not_matter(decoder, batch):
    """Programs run together or each alone from the first layer give the same states."""
    programs = [*KNOCKOUTS, swap(N, 1, 3), loop_last(N, 2, 2)]
    alone = final_states(Executor(decoder, share_prefixes=False), batch, programs)
    torch.testing.assert_close(final_states(Executor(decoder), batch, programs), alone, **CLOSE)


# ---- what is shared


class Counting(nn.Module):
    """Counts calls and states of a layer."""

    def __init__(self, layer, rows):
        super().__init__()
        self.layer, self.rows, self.calls, self.states = layer, rows, 0, 0

    def forward(self, hidden, *args, **kwargs):
        self.calls += 1
        self.states += len(hidden) // self.rows
        return self.layer(hidden, *args, **kwargs)


def counted(programs, batch):
    """Layer calls and layer applications that the executor makes for these programs."""
    model = tiny("llama")
    model.model.layers = nn.ModuleList(Counting(layer, len(batch.ids)) for layer in model.model.layers)
    decoder = Decoder(model)
    for layer in decoder.layers:
        layer.calls = layer.states = 0  # the decoder has looked at the model once
    final_states(Executor(decoder), batch, programs)
    return sum(layer.calls for layer in decoder.layers), sum(layer.states for layer in decoder.layers)


def test_knockout_sweep_costs_half_of_the_plain_loop(batch):
    """L(L-1)/2 applications beside the L of the intact run, and one call per layer for all states together."""
    calls, applications = counted(KNOCKOUTS, batch)
    assert applications == N + N * (N - 1) // 2
    assert calls == N


def test_all_pairs_share_their_single_knockouts(batch):
    """C(L,3) applications beyond the singles; still one call per layer."""
    calls, applications = counted(ALL_PAIRS, batch)
    assert applications == pairs_cost(N)
    assert calls == N


def test_equal_programs_run_once(batch):
    """The same layers in differently written programs are one path of the tree."""
    calls, applications = counted(
        [identity(N), identity(N), swap(N, 1, 1), repeat(N, 2, 1), (*identity(N), Step(None))], batch
    )
    assert calls == applications == N


def test_swaps_need_at_most_three_sweeps(batch):
    """All swaps together need at most three calls per layer."""
    calls, _ = counted([swap(N, i, j) for i in range(N) for j in range(i)], batch)
    assert calls <= 3 * N


# ---- variants, donors, edits


def test_a_variant_takes_the_layers_place(llama, batch):
    """A layer replaced by itself changes nothing; by half its update, what the loop says."""
    variants = {"self": Variant(llama.layers[1], 1), "halved": Variant(Halved(llama.layers[1]), 1)}
    programs = [identity(N), replace(N, 1, "self"), replace(N, 1, "halved")]
    states = final_states(Executor(llama, variants=variants), batch, programs)
    torch.testing.assert_close(states[1], states[0], **CLOSE)
    torch.testing.assert_close(states[2], naive(llama, batch, programs[2], variants), **CLOSE)
    assert (states[2] - states[0]).abs().max() > 0.1


def test_a_donors_layer_brings_its_own_arguments(gemma, batch):
    """A sibling's sliding layer keeps the sibling's window and rotary base in the host."""
    donor = Decoder(tiny("gemma3_text", sliding_window=2))  # the same weights, a narrower window
    program = [replace(N, 2, "donor")]
    with_own = final_states(
        Executor(gemma, variants={"donor": Variant(donor.layers[2], 2, donor.capture)}), batch, program
    )
    with_hosts = final_states(Executor(gemma, variants={"donor": Variant(donor.layers[2], 2)}), batch, program)
    torch.testing.assert_close(with_hosts, final_states(Executor(gemma), batch, [identity(N)]), **CLOSE)
    assert (with_own - with_hosts).abs().max() > 0.01


def test_edits_see_their_own_copy(llama, batch):
    """An edit in place changes its program and no other; before the first layer, between two, and at the end."""
    programs = [identity(N), *(edit_before(N, layer, "halve") for layer in (0, 2, N))]
    states = final_states(Executor(llama, edits=EDITS), batch, programs)
    for program, state in zip(programs, states, strict=True):
        torch.testing.assert_close(state, naive(llama, batch, program, edits=EDITS), **CLOSE)
    torch.testing.assert_close(states[3], states[0] / 2, **CLOSE)


def test_trace_gives_the_state_at_every_depth(decoder, batch):
    """Depth z of the trace is the final state of the first z layers, and depth L the intact model's."""
    executor = Executor(decoder)
    depths, states = zip(*executor.trace(batch), strict=True)
    assert depths == tuple(range(N + 1))
    expected = final_states(executor, batch, [order(range(z)) for z in range(N + 1)])
    torch.testing.assert_close(torch.stack(states), expected, **CLOSE)
    torch.testing.assert_close(executor.intact(batch), states[-1], rtol=0, atol=0)


def test_who_writes_to_a_trace_changes_nothing(llama, batch):
    executor = Executor(llama)
    before = executor.intact(batch)
    for _, state in executor.trace(batch):
        written = state
        break
    written.zero_()
    torch.testing.assert_close(executor.intact(batch), before, rtol=0, atol=0)


# ---- mistakes


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (order([0, 7]), "names layer 7; the model has layers 0 to 4"),
        (order([0, N]), "names layer 5; the model has layers 0 to 4"),
        (order([0, -1]), "names layer -1; the model has layers 0 to 4"),
        (replace(N, 1, "quantised"), "names the variant 'quantised'; the executor knows none"),
        (edit_before(N, 1, "noise"), "names the edit 'noise'; the executor knows none"),
    ],
)
def test_unknown_names_are_refused(llama, batch, program, message):
    """Before anything is run, in one line that names what is missing."""
    with pytest.raises(UserError, match=message):
        final_states(Executor(llama), batch, [program])


def test_a_variant_of_another_width_is_refused(llama, batch):
    """A replacement must return what it was given: [batch, token, width]."""
    narrow = {"narrow": Variant(lambda hidden, *args, **kwargs: hidden[..., :3], 1)}
    with pytest.raises(UserError, match="variant 'narrow' returned a tensor of shape"):
        final_states(Executor(llama, variants=narrow), batch, [replace(N, 1, "narrow")])
