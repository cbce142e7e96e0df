"""Known answers of the local half of T-7: toy layers whose response is written down, and tiny decoders."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lab.errors import UserError
from lab.experiments.layers.measuring.local_linearity import _consistency
from lab.residual.executor import Executor
from lab.residual.local_linearity import (
    LocalReadings,
    Tokens,
    gap,
    log_log_fit,
    power_iteration_gain,
    rounded_gaps,
    spectral_norm,
)
from lab.residual.replay import LayerReplay
from lab.statistics.jackknife import pair_mean_pseudovalues
from lab.statistics.spectrum_size import effective_rank, participation_ratio
from lab.subjects.calls import Captured
from lab.subjects.tiny import loaded, tiny

pytestmark = pytest.mark.calibration

D, TOKENS = 48, 40
EPS = (0.005, 0.02, 0.05)
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3_text")


class Toy(nn.Module):
    """A decoder layer x + g(x) without attention or branches."""

    def __init__(self, update):
        super().__init__()
        self.update = update
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, hidden):
        return hidden + self.update(hidden)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=seeded(seed))


def replay_of(update, states, dtype=torch.float32):
    return LayerReplay(Toy(update).to(dtype), 0, Captured(states, (((), {}),)), dtype)


def every_token(states):
    rows, positions = torch.meshgrid(*map(torch.arange, states.shape[:2]), indexing="ij")
    return Tokens(states, rows.reshape(-1), positions.reshape(-1))


def readings_of(update, states=None, directions=4, seed=2):
    states = normal(2, TOKENS, D) if states is None else states
    tokens = every_token(states)
    units = {
        "independent": tokens.random(directions, seeded(seed)),
        "shared": tokens.random(directions, seeded(seed + 1), shared=True),
    }
    return LocalReadings(replay_of(update, states), tokens, units)


def gaps_of(readings, eps=EPS):
    return np.array([float(readings.gaps("independent", size)["update"].mean()) for size in eps])


# ---- gaps


def test_a_linear_layer_has_no_gap():
    matrix = normal(D, D)
    readings = readings_of(lambda x: x @ matrix.T, directions=32)
    assert gaps_of(readings).max() <= 1e-4
    assert gaps_of(readings, [0.05])[0] <= 1e-5
    assert float(readings.even_gap(0.05).max()) <= 1e-4
    expected = float(matrix.norm()) / D**0.5
    assert float(readings.gains()["mean_amplification"].mean()) == pytest.approx(expected, rel=0.03)
    # E |u + J u|^2 = 1 + |J|^2 / d + 2 tr J / d
    squared = 1 + expected**2 + 2 * float(matrix.trace()) / D
    assert float(readings.gains()["layer_gain_squared"].mean()) == pytest.approx(squared, rel=0.03)
    assert float(readings.sizes()["homogeneity_gap"].max()) <= 1e-4
    assert float(readings.sizes()["scale_response"].mean()) == pytest.approx(1, abs=1e-4)


def test_the_gap_of_a_quadratic_layer_is_its_quadratic_term():
    a, b = 0.7, 0.3
    readings = readings_of(lambda x: a * x + b * x**2)
    tokens = readings.tokens
    moves = tokens.at(0.05 * tokens.moves(readings.units["independent"]))
    response = (a + 2 * b * tokens.chosen) * moves + b * moves**2
    expected = (b * moves**2).norm(dim=-1) / response.norm(dim=-1)
    assert torch.allclose(readings.gaps("independent", 0.05)["update"], expected.mean(0), rtol=1e-3)
    assert torch.allclose(readings.even_gap(0.05), expected.mean(0), rtol=1e-3)
    by_eps = gaps_of(readings)
    assert np.ptp(by_eps / EPS) <= 0.03 * (by_eps / EPS).mean()
    order, quality = log_log_fit(EPS, by_eps)
    assert order == pytest.approx(2, abs=0.02)
    assert quality > 0.999


def test_an_odd_layer_has_no_even_part_but_a_gap_of_third_order():
    states = normal(1, TOKENS, D)
    readings = readings_of(lambda x: 0.5 * (x - states) + 2 * (x - states) ** 3, states)
    assert float(readings.even_gap(0.05).max()) <= 1e-4
    by_eps = gaps_of(readings, (0.02, 0.05, 0.1))
    assert by_eps[1] > 1e-3
    assert log_log_fit((0.02, 0.05, 0.1), by_eps)[0] == pytest.approx(3, abs=0.1)


def test_rounding_makes_gaps_that_grow_as_the_move_shrinks():
    """gap^2 = 1.5 s^2 / (eps^2 + 2 s^2) for a linear layer with noise s relative to the response, up to 0.866."""
    matrix = normal(D, D) / D**0.5 / 4
    states = normal(2, TOKENS, D).to(torch.bfloat16)
    tokens, eps = every_token(states), (0.002, 0.005, 0.02, 0.05)
    replay = replay_of(lambda x: (x.float() @ matrix.T).to(x.dtype), states, torch.bfloat16)
    found = rounded_gaps(replay, tokens, eps, tokens.random(8, seeded(3)))["update"].mean(1).numpy()
    exact = states.float() @ matrix.T
    noise = float((replay(states).update.float() - exact).square().sum(-1).mean() ** 0.5)
    s = noise / float((matrix.norm() / D**0.5) * states.float().norm(dim=-1).mean())
    expected = np.sqrt(1.5 * s**2 / (np.array(eps) ** 2 + 2 * s**2))
    assert found == pytest.approx(expected, rel=0.2)
    assert found[0] > 0.75
    assert 0 < log_log_fit(eps[1:], found[1:])[0] < 1
    assert found[1] > 0.3 * found[3]
    in_float32 = rounded_gaps(
        replay_of(lambda x: x @ matrix.T, states.float()), every_token(states.float()), eps, tokens.random(8, seeded(3))
    )
    assert float(in_float32["update"].max()) < 1e-3


def test_a_layer_that_ignores_the_scale_of_its_input():
    matrix = normal(D, D)

    def update(x):
        return (x @ matrix.T) / x.norm(dim=-1, keepdim=True)

    states = normal(1, TOKENS, D)
    readings = readings_of(update, states)
    assert float(readings.sizes()["scale_response"].max()) <= 1e-4
    assert float(readings.sizes()["homogeneity_gap"].mean()) == pytest.approx(1, abs=1e-4)
    scaled = readings_of(update, 7 * states)
    assert gaps_of(scaled) == pytest.approx(gaps_of(readings), rel=1e-3)


def test_gaps_do_not_depend_on_the_basis():
    basis = torch.linalg.qr(normal(D, D, seed=5))[0]
    matrix, states = normal(D, D) / D**0.5, normal(1, TOKENS, D)

    def update(x):
        return torch.tanh(x @ matrix.T)

    tokens, turned = every_token(states), every_token(states @ basis)
    units = tokens.random(4, seeded(6))
    plain = LocalReadings(replay_of(update, states), tokens, {"independent": units})
    other = LocalReadings(
        replay_of(lambda x: update(x @ basis.T) @ basis, states @ basis), turned, {"independent": units @ basis}
    )
    assert gaps_of(other) == pytest.approx(gaps_of(plain), rel=1e-3)


def test_a_response_of_nothing_has_a_finite_gap():
    assert float(gap(torch.zeros(1, 3), torch.zeros(1, 3))) == 0


def test_order_and_quality_of_power_laws():
    gaps = np.array([[0.1, 0.2], [0.2, 0.2], [0.4, 0.2]])
    order, quality = log_log_fit((0.01, 0.02, 0.04), gaps)
    assert order == pytest.approx([2, 1])
    assert quality[0] == pytest.approx(1)
    assert np.isnan(quality[1])


# ---- gains


def gain_and_norm(matrix, steps=10):
    d = len(matrix)
    states = normal(3, 2, d, seed=7)
    tokens = Tokens(states, torch.arange(3), torch.tensor([0, 1, 1]))
    replay = replay_of(lambda x: x @ matrix.T, states)
    gain = power_iteration_gain(replay, tokens, tokens.random(1, seeded(8)), 5)
    norm = spectral_norm(replay.blocks(states, tokens.position), normal(3, d, seed=9), steps)
    return gain, norm


def test_the_nilpotent_block_has_a_norm_but_no_gain():
    gain, norm = gain_and_norm(torch.tensor([[0.0, 3.0], [0.0, 0.0]]))
    assert float(gain.abs().max()) <= 1e-6
    assert norm.numpy() == pytest.approx(3, rel=1e-5)


def test_random_matrices_have_twice_the_norm_of_their_spectral_radius():
    d = 300
    gain, norm = gain_and_norm(normal(d, d) / d**0.5)
    assert norm.numpy() == pytest.approx(2, rel=0.05)
    assert float(gain.max()) < 1.3


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), d=st.sampled_from([2, 5, 16]), decay=st.floats(0, 3))
def test_the_norm_is_never_below_gain_or_amplification(seed, d, decay):
    matrix = normal(d, d, seed=seed) * torch.arange(1, d + 1) ** -decay
    gain, norm = gain_and_norm(matrix, steps=d)
    largest = float(torch.linalg.matrix_norm(matrix, 2))
    assert norm.numpy() == pytest.approx(largest, rel=0.01)
    assert float(gain.max()) <= largest * (1 + 1e-4)
    assert float(matrix.norm()) / d**0.5 <= largest * (1 + 1e-5)


# ---- consistency


def sums_of(slopes):
    """Sums [k, d, prompts] over tokens of slopes [prompt][k, m, d]."""
    raw = torch.stack([slope.sum(1) for slope in slopes], -1)
    unit = torch.stack([(slope / slope.norm(dim=-1, keepdim=True)).sum(1) for slope in slopes], -1)
    return unit.double().numpy(), raw.double().numpy(), np.array([slope.shape[1] for slope in slopes])


def test_consistency_of_jacobians_at_a_known_angle():
    first, second = torch.zeros(1, 2, D), torch.zeros(1, 3, D)
    first[..., 0], second[..., 0], second[..., 1] = 2.0, 1.0, 3**0.5
    found = _consistency(*sums_of([first, second, first]))
    # pairs: 60, 60 and 0 degrees
    for name in ("consistency", "consistency_token"):
        assert found[name].mean() == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert found["consistency_within"] == pytest.approx(1)


@pytest.mark.parametrize("tokens", [2, 50])
def test_only_the_averaged_form_rises_with_the_number_of_tokens(tokens):
    shared = nn.functional.normalize(normal(4, 1, D), dim=-1) * D**0.5
    slopes = [shared + 2 * normal(4, tokens, D, seed=20 + prompt) for prompt in range(12)]
    found = _consistency(*sums_of(slopes))
    # signal 1 against noise 4 per token, and 4 / n in a mean of n
    assert found["consistency_token"].mean() == pytest.approx(0.2, abs=0.04)
    assert found["consistency_within"].mean() == pytest.approx(0.2, abs=0.06)
    assert found["consistency"].mean() == pytest.approx(1 / (1 + 4 / tokens), abs=0.04)


def test_pseudo_values_average_to_the_mean_over_pairs_and_vary_as_the_jackknife_says():
    points = normal(9, 3, seed=30).numpy()
    similarity = points @ points.T
    values = pair_mean_pseudovalues(similarity)
    pairs = similarity[np.triu_indices(9, 1)]
    assert values.mean() == pytest.approx(pairs.mean())
    without = [np.delete(np.delete(similarity, i, 0), i, 1)[np.triu_indices(8, 1)].mean() for i in range(9)]
    assert values.std() / 8**0.5 == pytest.approx(np.std(without) * 8**0.5)
    with pytest.raises(ValueError, match="at least three"):
        pair_mean_pseudovalues(similarity[:2, :2])


def test_pseudo_values_of_many_matrices_are_those_of_each():
    points = normal(12, 9, 3, seed=31).numpy().reshape(2, 6, 9, 3)
    similarity = points @ points.swapaxes(-1, -2)
    values = pair_mean_pseudovalues(similarity)
    assert values.shape == (2, 6, 9)
    for place in np.ndindex(2, 6):
        assert values[place] == pytest.approx(pair_mean_pseudovalues(similarity[place]))


# ---- spectra


def test_ranks_of_flat_and_of_single_spectra():
    flat = np.ones(100)
    assert effective_rank(flat) == 95
    assert effective_rank(flat, leading=20) in (19, 20)
    assert participation_ratio(flat) == pytest.approx(100)
    assert effective_rank(np.eye(1, 100)[0]) == 1
    assert participation_ratio(np.eye(1, 100)[0]) == pytest.approx(1)


def test_ranks_of_a_falling_spectrum_in_any_order():
    """Of 8, 1, 1 the first holds 0.8 of the sum, two 0.9, and of the leading two the first 0.89."""
    values = np.array([1.0, 8, 1])
    assert [effective_rank(values, share) for share in (0.79, 0.81, 0.91)] == [1, 2, 3]
    assert [effective_rank(values, share, leading=2) for share in (0.88, 0.9)] == [1, 2]
    assert participation_ratio(values) == pytest.approx(100 / 66)


# ---- real layers


@pytest.fixture(scope="module", params=ARCHITECTURES)
def real(request):
    """Decoder, captured call and states before every layer, of texts longer than Gemma's sliding window."""
    decoder = loaded(tiny(request.param, seed=3)).decoder
    ids = torch.randint(3, 80, (3, 9), generator=seeded(40))
    captured = decoder.capture(ids)
    states = [captured.entry]
    for layer, (args, kwargs) in zip(decoder.layers, captured.calls, strict=True):
        output = layer(states[-1], *args, **kwargs)
        states.append(output[0] if isinstance(output, tuple) else output)
    return decoder, captured, states


def test_a_replayed_layer_gives_the_layers_own_update(real):
    decoder, captured, states = real
    for index, layer in enumerate(decoder.layers):
        response = LayerReplay(layer, index, captured)(states[index])
        assert torch.allclose(response.update, states[index + 1] - states[index], atol=1e-4)
        assert torch.allclose(response.attention + response.mlp, response.update, atol=1e-4)


def test_derivatives_are_the_limits_of_differences(real):
    decoder, captured, states = real
    for index, layer in enumerate(decoder.layers):
        replay = LayerReplay(layer, index, captured)
        directions = normal(3, *states[index].shape, seed=50 + index)
        slopes = replay.jvp(states[index], directions).parts()
        ahead, behind = (replay(states[index] + sign * 2e-3 * directions) for sign in (1, -1))
        for name, slope in slopes.items():
            difference = (ahead - behind).parts()[name] / 4e-3
            assert torch.allclose(slope, difference, atol=5e-3 * float(difference.abs().max()))


def test_directions_together_give_what_they_give_one_by_one(real):
    decoder, captured, states = real
    replay = LayerReplay(decoder.layers[1], 1, captured)
    directions = normal(11, *states[1].shape, seed=60)
    together = replay.jvp(states[1], directions).update
    alone = torch.cat([replay.jvp(states[1], direction[None]).update for direction in directions])
    assert torch.allclose(together, alone, atol=1e-4 * float(alone.abs().max()))
    stacked = replay(states[1] + directions).update
    single = torch.stack([replay(states[1] + direction).update for direction in directions])
    assert torch.allclose(stacked, single, atol=1e-4 * float(single.abs().max()))


def test_blocks_hold_the_derivative_by_the_own_token_only(real):
    decoder, captured, states = real
    replay, positions = LayerReplay(decoder.layers[2], 2, captured), torch.tensor([4, 6, 8])
    blocks = replay.blocks(states[2], positions)
    units = torch.eye(decoder.width).repeat(3, 1, 1).transpose(0, 1)
    dense = torch.stack([blocks.product(unit) for unit in units], -1)
    transposed = torch.stack([blocks.transposed_product(unit) for unit in units], -1)
    assert torch.allclose(transposed, dense.transpose(1, 2), atol=1e-4 * float(dense.abs().max()))
    norms = torch.linalg.matrix_norm(dense, 2)
    assert spectral_norm(blocks, normal(3, decoder.width), 12).numpy() == pytest.approx(norms.numpy(), rel=0.01)
    other = normal(3, 9, decoder.width, seed=70)
    other[torch.arange(3), positions] = 0
    moved = replay.blocks(states[2] + 0 * other, positions).product(units[0])
    assert torch.allclose(moved, dense[..., 0], atol=1e-5)


def test_layers_with_parallel_branches_have_no_branch_gaps():
    decoder = loaded(tiny("cohere")).decoder
    captured = decoder.capture(torch.arange(3, 12)[None])
    replay = LayerReplay(decoder.layers[0], 0, captured)
    assert set(replay(captured.entry).parts()) == {"update"}
    decoder = loaded(tiny("falcon_h1")).decoder  # attention and state space side by side, then an MLP
    captured = decoder.capture(torch.arange(3, 12)[None])
    replay = LayerReplay(decoder.layers[0], 0, captured)
    assert set(replay(captured.entry).parts()) == {"update"}
    assert set(replay.jvp(captured.entry, normal(2, *captured.entry.shape)).parts()) == {"update"}


def test_layers_without_a_forward_derivative_are_refused_in_one_line():
    decoder = loaded(tiny("qwen3_next")).decoder
    captured = decoder.capture(torch.arange(3, 12)[None])
    replay = LayerReplay(decoder.layers[2], 2, captured)
    with pytest.raises(UserError, match="cannot differentiate a Qwen3NextDecoderLayer forwards"):
        replay.jvp(captured.entry, torch.ones(1, *captured.entry.shape))


def test_the_executor_and_the_replay_see_the_same_states():
    decoder = loaded(tiny("llama")).decoder
    from lab.corpora.batches import TokenText, token_batches

    (batch,) = token_batches([TokenText(tuple(range(3, 12)), (4, 5))], 64)
    states = [state for _, state in Executor(decoder).trace(batch)]
    replay = LayerReplay(decoder.layers[3], 3, decoder.capture(batch.ids))
    assert torch.allclose(replay(states[3]).update, states[4] - states[3], atol=1e-4)
