"""A common beginning of texts that runs once, apart from them, changes no reading."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from findings.calibration.executor_cases import CLOSE, KNOCKOUTS, N, final_states
from lab.corpora.batches import TokenText, positions, prefix_apart, token_batches
from lab.residual.executor import Executor, Variant
from lab.residual.programs import edit_before, identity, loop_last, order, repeat, replace, skip, swap
from lab.residual.sweeps import ProgramLosses, Sample
from lab.store import Sweep
from lab.subjects import token_prefix
from lab.subjects.anatomy import Decoder
from lab.subjects.tiny import ARCHITECTURES, LAYERS, VOCABULARY, tiny

pytestmark = pytest.mark.calibration

#: those whose layers remember more than keys and values: state spaces, linear attention
WITH_OTHER_MEMORY = {"falcon_h1", "qwen3_next"}
TAKING = sorted(ARCHITECTURES.keys() - WITH_OTHER_MEMORY)
#: longer than the sliding window of the tiny Gemma
PREFIX = 6
PROGRAMS = [*KNOCKOUTS, swap(N, 0, 3), order(reversed(range(N))), repeat(N, 2, 3), loop_last(N, 2, 2)]


def texts_with_prefix(*lengths: int, prefix: int = PREFIX) -> list[TokenText]:
    """Random texts that begin alike and then differ at once; the second half of the rest is scored."""
    generator = torch.Generator().manual_seed(sum(lengths))
    shared = torch.randint(1, VOCABULARY, (prefix,), generator=generator).tolist()
    found = []
    for index, length in enumerate(lengths):
        own = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        own[0] = index  # no two rows alike here
        found.append(TokenText((*shared, *own), tuple(range(prefix + 1 + length // 2, prefix + length))))
    return found


@pytest.fixture(scope="module")
def texts():
    return texts_with_prefix(7, 9, 12)


@pytest.fixture(scope="module")
def batch(texts):
    (only,) = token_batches(texts, 1000)
    return only


@pytest.mark.parametrize("architecture", TAKING)
def test_programs_reach_the_same_states(architecture, batch):
    decoder, apart = Decoder(tiny(architecture)), prefix_apart(batch)
    assert decoder.can_split_prefix
    assert len(apart.prefix) == PREFIX
    whole = final_states(Executor(decoder), batch, PROGRAMS)
    found = final_states(Executor(decoder), apart, PROGRAMS)
    for row, length in enumerate(apart.lengths):
        torch.testing.assert_close(found[:, row, :length], whole[:, row, PREFIX : PREFIX + length], **CLOSE)


@pytest.mark.parametrize("states", [1, 2, 5])
def test_a_small_memory_budget_does_not_matter(batch, states):
    decoder, apart = Decoder(tiny("gemma3_text")), prefix_apart(batch)
    budget = states * (PREFIX + apart.ids.numel()) * decoder.width * 4 * 4 // 3
    found = final_states(Executor(decoder, budget_bytes=budget), apart, PROGRAMS)
    torch.testing.assert_close(found, final_states(Executor(decoder), apart, PROGRAMS), **CLOSE)


def test_trace_gives_the_states_after_the_prefix(batch):
    executor, apart = Executor(Decoder(tiny("gemma3_text"))), prefix_apart(batch)
    whole, found = (dict(executor.trace(each)) for each in (batch, apart))
    assert list(found) == list(whole) == list(range(N + 1))
    for depth in found:
        torch.testing.assert_close(found[depth], whole[depth][:, PREFIX:], **CLOSE)


@pytest.mark.parametrize("user_words", [False, True])
def test_losses_are_the_same(texts, user_words):
    """Loss, distance to the intact model and the loss on the user's words, of which all texts share the first."""
    decoder = Decoder(tiny("qwen2"))
    own_words = tuple(tuple(range(PREFIX - 1, text.targets[0])) for text in texts)
    sample = Sample(("a", "b", "c"), tuple(texts), own_words)
    programs = {str(index): program for index, program in enumerate(PROGRAMS)}
    executors = Executor(decoder), Executor(decoder)
    (apart,) = ProgramLosses(executors[0], Sweep(), 1000, "float32").batches(sample, programs, user_words)
    assert len(apart.prefix) == (PREFIX - 2 if user_words else PREFIX)
    executors[1].splits_prefix = lambda programs: False
    found, whole = (
        ProgramLosses(executor, Sweep(), 1000, "float32")("x", sample, programs, compare=True, user_words=user_words)
        for executor in executors
    )
    assert found.keys() == whole.keys()
    for name in found:
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-3, atol=1e-4, err_msg=name)
    assert np.ptp(found["loss"], axis=0).min() > 0.1, "programs must differ"
    np.testing.assert_allclose(found["kl"][0], 0, atol=1e-6)  # the intact model is its own reference


def test_the_prefix_runs_once_for_all_rows(batch):
    """Every layer sees P + B * T tokens per program instead of B * (P + T)."""
    decoder, apart = Decoder(tiny("llama")), prefix_apart(batch)
    seen = []
    hook = decoder.layers[1].register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:2].numel()))
    final_states(Executor(decoder), apart, [identity(N)])
    hook.remove()
    assert seen == [PREFIX, 3 * 12]


# ---- who takes no prefix


@pytest.mark.parametrize("architecture", sorted(WITH_OTHER_MEMORY))
def test_layers_with_another_memory_take_none(architecture):
    assert not Decoder(tiny(architecture)).can_split_prefix


class WithMeanOfEarlier(nn.Module):
    """A causal layer that also adds the mean of all tokens so far, which no cache tells it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden, *args, **kwargs):
        counts = torch.arange(1, hidden.shape[1] + 1)[:, None]
        return self.layer(hidden, *args, **kwargs) + 0.1 * hidden.cumsum(1) / counts


def test_a_layer_that_remembers_in_its_own_way_is_found_out():
    """Also where it has taken another's place since."""
    model = tiny("llama")
    model.model.layers[3] = WithMeanOfEarlier(model.model.layers[3])
    assert not Decoder(model).can_split_prefix
    decoder = Decoder(tiny("llama"))
    assert decoder.can_split_prefix
    decoder.layers[2] = WithMeanOfEarlier(decoder.layers[2])
    assert not decoder.can_split_prefix


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_depend_on_the_length_take_none(kind):
    model = tiny("llama")
    assert Decoder(model).can_split_prefix
    model.config.rope_parameters = {"rope_type": kind, "factor": 2.0, "rope_theta": 10_000.0}
    assert not Decoder(model).can_split_prefix
    own = {"rope_type": "default", "rope_theta": 10_000.0}
    model.config.rope_parameters = {"full_attention": own, "sliding_attention": own}
    assert token_prefix.is_attention_alone(model.config)
    model.config.rope_parameters["sliding_attention"] = own | {"rope_type": kind}
    assert not token_prefix.is_attention_alone(model.config)


def test_chunks_longer_than_what_is_tried_take_none():
    model = tiny("llama")
    model.config.layer_types = ["chunked_attention"] * LAYERS
    assert not Decoder(model).can_split_prefix


def test_a_model_that_fails_with_a_prefix_runs_without(monkeypatch, caplog):
    decoder = Decoder(tiny("llama"))

    def refuse(*args, **kwargs):
        raise NotImplementedError("no cache here")

    monkeypatch.setattr(decoder, "model", refuse)
    with caplog.at_level(logging.INFO, logger="lab.subjects.token_prefix"):
        assert not decoder.can_split_prefix
    assert "no cache here" in caplog.text


def test_programs_of_other_modules_and_edits_take_none():
    decoder = Decoder(tiny("llama"))
    executor = Executor(
        decoder, variants={"own": Variant(decoder.layers[0], 0)}, edits={"same": lambda states, batch: states}
    )
    assert executor.splits_prefix([identity(N), skip(N, [1])])
    assert not executor.splits_prefix([identity(N), replace(N, 0, "own")])
    assert not executor.splits_prefix([identity(N), edit_before(N, 1, "same")])
    assert not Executor(decoder, compiler="eager").splits_prefix([identity(N)])


class WithRounding(nn.Module):
    """A layer that rounds otherwise where its input is as long as the prefix that is tried, as kernels may."""

    def __init__(self, layer, deviation):
        super().__init__()
        self.layer, self.deviation = layer, deviation

    def forward(self, hidden, *args, **kwargs):
        output = self.layer(hidden, *args, **kwargs)
        return (
            output * (1 + self.deviation) if hidden.shape[1] in (token_prefix.TILE, token_prefix.PROBE[1]) else output
        )


def _splitting(model):
    decoder = Decoder(model)
    if not decoder.can_split_prefix:
        pytest.skip(f"kernels of this processor round {decoder.dtype} otherwise where a prefix is apart")
    return decoder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_take_a_prefix_where_no_bit_differs(dtype):
    """What is rounded in a prefix reaches all texts alike, so rounding is enough to take none there."""
    decoder = _splitting(tiny("llama").to(dtype))
    assert Executor(decoder).splits_prefix([identity(N)])
    decoder.layers[2] = WithRounding(decoder.layers[2], torch.finfo(dtype).eps)
    assert not Executor(decoder).splits_prefix([identity(N)])


@pytest.mark.parametrize(("deviation", "splits"), [(1e-6, True), (1e-4, False)])
def test_float32_takes_a_prefix_where_roundings_differ(deviation, splits):
    decoder = Decoder(tiny("llama"))
    decoder.layers[2] = WithRounding(decoder.layers[2], deviation)
    assert Executor(decoder).splits_prefix([identity(N)]) == splits


@pytest.mark.parametrize("architecture", TAKING)
def test_in_bfloat16_a_prefix_moves_no_bit(architecture):
    """It is filled up to a tile there, with tokens that nothing sees."""
    decoder = _splitting(tiny(architecture).bfloat16())
    (batch,) = token_batches(texts_with_prefix(17, 37, prefix=27), 1000)
    apart = prefix_apart(batch)
    assert len(apart.prefix) == 27
    packed = Executor(decoder).capture(apart)
    assert packed.entry.shape[1] == token_prefix.TILE + apart.ids.numel()
    whole, found = (final_states(Executor(decoder), each, PROGRAMS) for each in (batch, apart))
    for row, length in enumerate(apart.lengths):
        assert torch.equal(found[:, row, :length], whole[:, row, 27 : 27 + length])


@pytest.mark.parametrize("length", [1, 31, 32, 33])
def test_a_prefix_fills_whole_tiles_in_narrow_dtypes_alone(length):
    prefix = torch.arange(1, 1 + length)
    for dtype, filled in ((torch.float32, length), (torch.bfloat16, -(-length // 32) * 32)):
        captured = token_prefix.capture(Decoder(tiny("llama").to(dtype)), torch.ones(2, 3, dtype=torch.int64), prefix)
        assert captured.length == length
        assert captured.prefix.entry.shape[1] == filled


def test_variants_and_edits_are_refused_where_a_prefix_is_apart(batch):
    executor = Executor(Decoder(tiny("llama")), edits={"same": lambda states, batch: states})
    with pytest.raises(ValueError, match="prefix of these texts is put apart"):
        final_states(executor, prefix_apart(batch), [identity(N), edit_before(N, 1, "same")])


def test_the_same_texts_after_another_prefix_are_captured_anew(batch):
    executor, apart = Executor(Decoder(tiny("llama"))), prefix_apart(batch)
    other = dataclasses.replace(apart, prefix=apart.prefix.flip(0))
    first, second = (final_states(executor, each, [identity(N)]) for each in (apart, other))
    assert not torch.allclose(first, second, atol=1e-2)


# ---- what is put apart


def test_nothing_that_is_read_lies_in_the_prefix(texts):
    """A target is predicted from the position before it: that one must stay, of the scored ones and of others."""
    (batch,) = token_batches([TokenText(text.ids, (4, *text.targets)) for text in texts], 1000)
    assert len(prefix_apart(batch).prefix) == 3
    (batch,) = token_batches(texts, 1000)
    assert len(prefix_apart(batch, positions(batch, [[5]] * 3)).prefix) == 4
    with pytest.raises(ValueError, match="before the batch's first position"):
        positions(prefix_apart(batch), [[PREFIX]] * 3)
    assert len(prefix_apart(batch, positions(batch, [[]] * 3)).prefix) == PREFIX


def test_every_row_keeps_a_token():
    """Also where nothing is read: here the first row is the common beginning and one token more."""
    texts = [TokenText(text.ids, ()) for text in texts_with_prefix(1, 4, 4)]
    (batch,) = token_batches(texts, 1000)
    apart = prefix_apart(batch)
    assert len(apart.prefix) == PREFIX
    assert apart.lengths.tolist() == [1, 4, 4]
    (batch,) = token_batches(
        [TokenText(text.ids[:length], ()) for text, length in zip(texts, (6, 10, 10), strict=True)], 1000
    )
    assert len(prefix_apart(batch).prefix) == PREFIX - 1


def test_what_saves_little_stays():
    """One text has nothing to share, and a prefix of 2 tokens in 3 rows of 42 saves 4 tokens of 126."""
    for texts in (texts_with_prefix(9), texts_with_prefix(40, 40, 40, prefix=2)):
        (batch,) = token_batches(texts, 1000)
        assert prefix_apart(batch) is batch
    (batch,) = token_batches(texts_with_prefix(8, 8, prefix=2), 1000)
    assert len(prefix_apart(batch).prefix) == 2, "a tenth is enough"


@given(st.lists(st.integers(2, 9), min_size=2, max_size=6), st.integers(0, 8))
def test_the_texts_stay_what_they_were(lengths, prefix):
    texts = texts_with_prefix(*lengths, prefix=prefix)
    (batch,) = token_batches(texts, 1000)
    apart = prefix_apart(batch)
    assert len(apart.prefix) <= prefix
    shared = apart.prefix.tolist()
    others = [list(range(len(shared) + 1, len(text.ids))) for text in texts]
    for found, targets in ((apart.scored, [text.targets for text in texts]), (positions(apart, others), others)):
        expected = [(row, t - 1, texts[i].ids[t]) for row, i in enumerate(batch.texts) for t in targets[i]]
        places = zip(found.row.tolist(), found.position.tolist(), found.target.tolist(), strict=True)
        assert [(row, place + len(shared), target) for row, place, target in places] == expected
    for row, index in enumerate(apart.texts):
        length = int(apart.lengths[row])
        assert (*shared, *apart.ids[row, :length].tolist()) == texts[index].ids
