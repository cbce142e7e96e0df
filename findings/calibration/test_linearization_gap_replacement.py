"""Known answers of the global half of T-7: regressions, planted layers that are matrices, and planted outliers."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from lab.errors import NotApplicable, UserError
from lab.experiments.layers.linearization_gap import EXPERIMENT, LinearizationGap, measure
from lab.experiments.layers.measuring import linear_replacement
from lab.residual.executor import Executor, Variant
from lab.residual.linear_maps import LinearMap, MappedLayer, Regression, squared_error
from lab.residual.programs import identity, skip
from lab.residual.programs import replace as replaced
from lab.residual.sweeps import ProgramLosses, sample
from lab.store import Sweep
from lab.subjects.tiny import loaded, random_corpus, tiny

pytestmark = pytest.mark.calibration

BUDGET = replace(
    EXPERIMENT.budgets["quick"], layer_stride=1, ranks=(4, 16), head_dtype="float32", local_tokens=6, batch_tokens=128
)
PLANTED = 2


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def corpus_of(texts=40):
    return random_corpus([(5 + index % 4, 9 + index % 5) for index in range(texts)])


def record_of(model, corpus=None, budget=BUDGET):
    data = measure(loaded(model), corpus or corpus_of(), budget, Sweep())
    return LinearizationGap(data.assign_attrs(subject="tiny", source="measured", condition="quick-float32"))


class Planted(nn.Module):
    """A decoder layer of a known update."""

    def __init__(self, update):
        super().__init__()
        self.update = update
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states + self.update(hidden_states)


@pytest.fixture(scope="module")
def model():
    return tiny("llama", seed=3)


def planted(model, update):
    changed = copy.deepcopy(model)
    changed.model.layers[PLANTED] = Planted(update)
    return changed


@pytest.fixture(scope="module")
def linear(model):
    """The record of a model one of whose layers is a matrix, and the matrix."""
    matrix = (normal(32, 32) / 32**0.5).float()
    return record_of(planted(model, lambda x: x @ matrix.T)), matrix


# ---- a layer that is a matrix


def test_a_linear_layer_is_recovered_whole(linear):
    record, _ = linear
    assert float(record.knockout_delta.sel(layer=PLANTED)) > 0.01
    for name in ("residual", "all_tokens"):
        assert float(record._recovery(name).sel(layer=PLANTED)) == pytest.approx(1, abs=0.01)
        squares = [record.mean(f"{name}_{kind}_squares").sel(layer=PLANTED) for kind in ("error", "deviation")]
        assert float(squares[0] / squares[1]) < 1e-6


def test_a_linear_layer_has_no_gap_and_equal_jacobians(linear):
    record, matrix = linear
    here = {"layer": PLANTED}
    assert float(record.gap_by_eps.sel(eps=0.05, **here)) < 1e-4
    assert float(record.consistency.sel(**here)) == pytest.approx(1, abs=1e-4)
    assert float(record.consistency_token.sel(**here)) == pytest.approx(1, abs=1e-4)
    norm = float(torch.linalg.matrix_norm(matrix, 2))
    assert float(record.mean("spectral_norm").sel(**here)) == pytest.approx(norm, rel=0.01)
    assert float(record.mean("mean_amplification").sel(**here)) == pytest.approx(
        float(matrix.norm()) / 32**0.5, rel=0.1
    )


def test_an_affine_layer_with_a_small_quadratic_term_is_nearly_recovered(model):
    matrix, bias = (normal(32, 32) / 32**0.5).float(), normal(32, seed=2).float()
    record = record_of(planted(model, lambda x: x @ matrix.T + bias + 0.002 * x**2))
    # random texts are not what a random model expects: a small error may raise their loss or lower it
    assert float(record._recovery("residual").sel(layer=PLANTED)) == pytest.approx(1, abs=0.05)


def test_what_is_not_replaced_is_nan(linear):
    assert linear_replacement.replaced_layers(np.array([1.0, 1, 1, 1, 9, 1, 1, 1]), 3) == [0, 1, 3, 4, 6, 7]
    record = record_of(tiny("gemma3_text"), budget=replace(BUDGET, layer_stride=5))
    without = np.flatnonzero(np.isnan(record.knockout_delta.values))
    assert len(without)
    assert not {0, 4} & set(without.tolist())
    assert np.isnan(record.mean("spectral_norm").values[without]).all()
    assert np.isfinite(record.gap.values).all()


def test_few_replaced_layers_do_not_speak_for_all(linear):
    record, _ = linear
    layers = xr.DataArray(np.arange(8.0), coords={"layer": np.arange(8)})
    assert record.of_enough(layers) is layers
    assert record.correlation(layers, -layers) == pytest.approx(-1)
    for few in (layers[:7], layers[:0]):
        with pytest.raises(NotApplicable, match=rf"{len(few)} layers were replaced .* 8 are needed"):
            record.of_enough(few)
        with pytest.raises(NotApplicable, match="8 are needed"):
            record.correlation(layers, few)


@pytest.mark.parametrize(("share", "is_smooth"), [(0.29, True), (0.31, False)])
def test_noise_that_does_not_shrink_with_the_move_bars_the_gap(share, is_smooth):
    """A curved layer's gap at a tenth of the move is a tenth; noise keeps it up. One such layer is enough."""
    gaps = np.array([[0.1, 0.01], [0.1, 0.1 * share], [0.2, 0.02]])
    coords = {"layer": np.arange(3), "eps": [0.05, 0.005]}
    record = LinearizationGap(xr.Dataset({"perturbation_gap_by_eps": (("layer", "eps"), gaps)}, coords))
    if is_smooth:
        assert record.gap.values.tolist() == [0.1, 0.1, 0.2]
        return
    with pytest.raises(NotApplicable, match=r"noise rules the float32 gap of layers \[1\]"):
        _ = record.gap
    assert record.ungated_gap.values.tolist() == [0.1, 0.1, 0.2]


# ---- the executor's side


def losses_of(model, variants, programs):
    decoder = loaded(model).decoder
    runner = Executor(decoder, variants={name: Variant(make(decoder), PLANTED) for name, make in variants.items()})
    return ProgramLosses(runner, Sweep(), 128, "float32")("known", sample(corpus_of(), None, None), programs)["loss"]


def test_exact_outputs_restore_the_loss_and_a_map_of_nothing_is_a_knockout(model):
    nothing = LinearMap(torch.zeros(32, 32), torch.zeros(32))
    variants = {
        "exact": lambda decoder: MappedLayer(decoder.layers[PLANTED], nothing, exact_first=1000),
        "nothing": lambda decoder: MappedLayer(decoder.layers[PLANTED], nothing, exact_first=0),
    }
    n = 5
    programs = {"intact": identity(n), "skipped": skip(n, (PLANTED,))}
    programs |= {name: replaced(n, PLANTED, name) for name in variants}
    intact, skipped, exact, without = losses_of(model, variants, programs)
    # Programs that run in one batch and in another are summed in another order by two threads.
    np.testing.assert_allclose(exact, intact, rtol=1e-6)
    np.testing.assert_allclose(without, skipped, rtol=1e-6)
    assert not np.allclose(intact, skipped)


def test_only_the_first_positions_are_exact(model):
    decoder = loaded(model).decoder
    captured = decoder.capture(torch.arange(3, 11)[None].repeat(2, 1))
    linear = LinearMap(normal(32, 32).float(), normal(32).float())
    args, kwargs = captured.call(PLANTED, 1)
    own = decoder.layers[PLANTED](captured.entry, *args, **kwargs)
    found = MappedLayer(decoder.layers[PLANTED], linear, exact_first=2)(captured.entry, *args, **kwargs)
    assert torch.equal(found[:, :2], own[:, :2])
    assert torch.allclose(found[:, 2:], (captured.entry + linear(captured.entry))[:, 2:])


def test_recoveries_do_not_depend_on_batches(model):
    corpus = corpus_of(20)
    records = [record_of(model, corpus, replace(BUDGET, batch_tokens=tokens)) for tokens in (64, 1000)]
    assert np.allclose(records[0].mean("residual_loss"), records[1].mean("residual_loss"), atol=2e-3)
    assert np.allclose(records[0].update_ratio, records[1].update_ratio, rtol=1e-4)


def test_too_few_texts_are_refused_in_one_line(model):
    with pytest.raises(UserError, match="five at least are needed"):
        record_of(model, corpus_of(4))


# ---- regressions


def test_full_output_and_residual_maps_differ_by_shrinkage_only():
    """W_full - W_res = I - lambda (G + lambda I)^-1, so that the two are one map as lambda vanishes."""
    x = normal(200, 12)
    update = torch.tanh(x @ normal(12, 12, seed=2))
    rho = 0.03
    full, rest = (Regression(x, y, intercept=False).weight(rho) for y in (x + update, update))
    second = x.T @ x
    penalty = rho * second.trace() / 12
    expected = torch.eye(12) - penalty * torch.linalg.inv(second + penalty * torch.eye(12))
    assert torch.allclose(full - rest, expected, atol=1e-10)


def test_an_intercept_takes_what_a_shift_adds():
    x, shift = normal(300, 8), 5 * normal(8, seed=3)
    y = x @ normal(8, 8, seed=2) + shift
    linear, _ = Regression(x, y).best(x, y)
    assert squared_error(linear, x, y) < 1e-6 * float(y.square().sum())
    assert torch.allclose(linear.bias.double(), shift, atol=1e-3)


def test_the_penalty_is_chosen_on_held_out_samples():
    truth = normal(40, 5, seed=2)
    x, y, held, answer = normal(45, 40), None, normal(500, 40, seed=4), None
    y, answer = (inputs @ truth + 6 * normal(len(inputs), 5, seed=len(inputs)) for inputs in (x, held))
    regression = Regression(x, y)
    linear, rho = regression.best(held, answer, (1e-6, 1e-2, 1.0, 10.0))
    assert rho in (1.0, 10.0)
    free = regression.map(regression.weight(1e-6))
    assert squared_error(linear, held, answer) < squared_error(free, held, answer)
    # as many samples as inputs: a free fit looks perfect where it was fitted, and is useless elsewhere
    assert squared_error(free, x, y) < 0.2 * squared_error(free, held, answer) * len(x) / len(held)


def test_errors_do_not_depend_on_the_basis():
    x, basis = normal(120, 10), torch.linalg.qr(normal(10, 10, seed=9))[0]
    y = torch.tanh(x @ normal(10, 10, seed=2))
    plain, turned = Regression(x, y), Regression(x @ basis, y @ basis)
    errors = [
        squared_error(one.map(one.weight(1e-3)), *samples)
        for one, samples in ((plain, (x, y)), (turned, (x @ basis, y @ basis)))
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


def test_reduced_rank_regression_is_the_better_cut():
    """Inputs of very unequal variance: the leading weights may belong to inputs that hardly vary."""
    x = normal(500, 12) * torch.logspace(1, -2, 12, dtype=torch.float64)
    y = x @ normal(12, 12, seed=2)
    regression = Regression(x, y)
    for rank in (1, 3, 6):
        by_predictions, by_weights = (
            squared_error(regression.low_rank(1e-6, rank, by=by), x, y) for by in ("predictions", "weights")
        )
        assert by_predictions < by_weights
        weight = regression.low_rank(1e-6, rank).weight.double()
        assert int(torch.linalg.matrix_rank(weight, atol=1e-4)) == rank
    whole, cut = regression.map(regression.weight(1e-6)), regression.low_rank(1e-6, 12)
    assert torch.allclose(whole.weight, cut.weight, atol=1e-5)
    with pytest.raises(ValueError, match="by predictions or by weights"):
        regression.low_rank(1e-6, 3, by="size")


# ---- outliers


def test_one_enormous_update_carries_the_variance():
    """The first position's update is 100 times the rest, which is noise: R^2 is near 1 with it, and nothing without."""
    texts, length, d = 40, 12, 16
    x, update = normal(texts, length, d), normal(texts, length, d, seed=2)
    x[:, 0], update[:, 0] = 30 * normal(d, seed=3), 100 * normal(d, seed=4)
    flat = [values.reshape(-1, d).float() for values in (x, x + update)]
    text = torch.arange(texts).repeat_interleave(length)
    position = torch.arange(length).repeat(texts)
    states = linear_replacement.States(flat, text, position, position >= 3)
    assert linear_replacement.energy_factors(states)[0] > 10
    scored = [index for index in range(texts) if index % 5 == 4]
    fitted = linear_replacement._fit(states, 0, None, scored, BUDGET)
    r2 = {
        name: 1 - fitted.scores[f"{name}_error"].sum() / fitted.scores[f"{name}_deviation"].sum()
        for name in ("all_tokens", "residual")
    }
    assert r2["all_tokens"] > 0.99
    assert r2["residual"] <= 0.02
    ordinary = replace(states, depths=[flat[0], flat[0] + normal(texts * length, d, seed=5).float()])
    assert linear_replacement.energy_factors(ordinary)[0] == pytest.approx(1, abs=0.1)


def test_fit_choice_and_score_never_share_a_text(model):
    states = linear_replacement.collect(Executor(loaded(model).decoder), corpus_of(), BUDGET, Sweep())
    parts = [states.part(which) for which in (linear_replacement.FIT, linear_replacement.CHOOSE)]
    scored = torch.isin(states.text, torch.tensor(linear_replacement._scored_texts(corpus_of())))
    assert (sum(part.int() for part in (*parts, scored)) == 1).all()
    assert int(states.completion.sum()) == sum(len(text.completion_ids) for text in corpus_of().texts)
