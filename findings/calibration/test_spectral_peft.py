"""The record of T-18 on planted numbers: derived quantities are what they were made of, and claims are quick."""

import json
import re
import time
from contextlib import suppress
from importlib import import_module

import numpy as np
import pytest
import xarray as xr

from fixtures.assertions import Predicate
from fixtures.claims import claim_of
from fixtures.support import support
from lab import published
from lab.adapters.allocations import MATRICES
from lab.errors import NotApplicable
from lab.experiments.surgery.spectral_peft import AGGRESSIVE, EXPERIMENT, GENTLE, RATES, SpectralPeft
from lab.records import variable
from lab.statistics.proportions import fisher_p_value, mcnemar_p_value

pytestmark = pytest.mark.calibration

CONFIGURATIONS = ("A", "B_matched", "F", "H")
PROBLEMS, TEXTS, LAYERS = 40, 12, 4
#: planted rise of the loss over the model before training, by rate and configuration: id, ood, text
RISES = {
    GENTLE: {"A": (-0.5, 0.01, 0.01), "B_matched": (-0.6, 0.0, 0.005), "F": (-0.4, 0.02, 0.01), "H": (-0.3, 0.0, 0.0)},
    AGGRESSIVE: {"A": (-0.2, 0.8, 0.3), "H": (-0.1, 0.2, 0.01)},
}
SWEEP = {5e-5: 0.001, 1e-4: 0.01, 2e-4: 0.03, 4e-4: 0.1}


def planted(noise=0.0, seeds=(0, 1, 2), rises=RISES):
    """A record with these rises, and noise of that size in every problem, text and run."""
    generator = np.random.default_rng(0)
    sizes = {"id": PROBLEMS, "ood": PROBLEMS, "text": TEXTS}
    variables = {
        "text_tokens": variable("text", np.arange(1, TEXTS + 1), "token", "tokens"),
        "full_text_tokens": variable("text", np.arange(1, TEXTS + 1)[::-1], "token", "tokens"),
    }
    for column, (name, dimension) in enumerate((("id_nll", "id"), ("ood_nll", "ood"), ("text_loss", "text"))):
        before = generator.uniform(0.5, 2, sizes[dimension])
        grid = np.full((2, len(CONFIGURATIONS), len(seeds), len(before)), np.nan)
        for rate, runs in rises.items():
            for configuration, one in runs.items():
                for seed in seeds if rate == GENTLE else seeds[:1]:
                    place = RATES.index(rate), CONFIGURATIONS.index(configuration), seeds.index(seed)
                    grid[place] = before + one[column] + noise * generator.standard_normal(len(before))
        along = "text" if dimension == "text" else f"{dimension}_problem"
        names = (name, "full_text_loss") if dimension == "text" else (name,)
        for each in names:
            weights = {"weights": "full_text_tokens"} if each == "full_text_loss" else {}
            variables[each] = variable(("rate", "configuration", "seed", along), grid, "nat/token", each, **weights)
            variables[f"base_{each}"] = variable(along, before, "nat/token", each, **weights)
            if dimension == "text":
                swept = [before + rise for rise in SWEEP.values()]
                variables[f"sweep_{each}"] = variable(("learning_rate", along), swept, "nat/token", each, **weights)
    for split in ("id", "ood"):
        right = np.zeros((2, len(CONFIGURATIONS), len(seeds), PROBLEMS))
        right[..., : PROBLEMS // 2] = 1
        right[0, 0, :, : PROBLEMS // 2 + 10] = 1  # A at the gentle rate solves ten more
        right[np.isnan(variables["id_nll"].values)] = np.nan
        before = (np.arange(PROBLEMS) < PROBLEMS // 2).astype(float)
        variables[f"{split}_accuracy"] = variable(
            ("rate", "configuration", "seed", f"{split}_problem"), right, "1", "right"
        )
        variables[f"base_{split}_accuracy"] = variable(f"{split}_problem", before, "1", "right")
    trained = ~np.isnan(variables["id_nll"].values[..., 0])
    sizes = np.array([100, 100, 70, 30])
    loss = np.where(trained, (2 - sizes / 100)[None, :, None], np.nan)
    variables["train_loss"] = variable(("rate", "configuration", "seed"), loss, "nat/token", "loss")
    variables["train_seconds"] = variable(("rate", "configuration", "seed"), np.where(trained, 10, np.nan), "s", "time")
    variables["trainable_parameters"] = variable("configuration", sizes, "1", "parameters")
    ratio = np.linspace(0.1, 0.7, LAYERS * 7).reshape(LAYERS, 7)
    ranks = np.broadcast_to(np.arange(1, 8), (4, LAYERS, 7))
    variables["effective_rank_ratio_before"] = variable(("layer", "matrix"), ratio, "1", "ratio")
    variables["rank"] = variable(("configuration", "layer", "matrix"), ranks, "1", "rank")
    coords = {"rate": list(RATES), "configuration": list(CONFIGURATIONS), "seed": list(seeds), "matrix": list(MATRICES)}
    coords |= {"layer": np.arange(LAYERS), "learning_rate": list(SWEEP)}
    settings = {"rates": {"gentle": 1e-4}, "rank_scale": 0.25, "prefix_kept": False}
    attributes = {"subject": "tiny", "source": "measured", "condition": "quick"}
    return SpectralPeft(xr.Dataset(variables, coords, attributes | {"provenance": json.dumps({"settings": settings})}))


def test_rises_are_read_back_weighted_as_they_should_be():
    record = planted()
    for rate, runs in RISES.items():
        for name, (learned, kept, text) in runs.items():
            assert record.delta_nll("id", name, rate=rate) == pytest.approx(learned)
            assert record.delta_nll("ood", name, rate=rate) == pytest.approx(kept)
            assert record.text_rise(name, rate) == pytest.approx(text)
            assert np.log(record.perplexity(name, rate) / record.perplexity()) == pytest.approx(text)
    assert record.delta_nll("id", "B_matched", "A") == pytest.approx(-0.1)
    assert record.trained() == ["A", "F", "H"]
    assert record.both_rates == ["A", "H"]
    full = record.variable("base_full_text_loss")
    expected = float((full * record.variable("full_text_tokens")).sum() / record.variable("full_text_tokens").sum())
    assert np.log(record.perplexity()) == pytest.approx(expected)


def test_accuracies_are_compared_by_their_pairs():
    record = planted()
    assert record.gain("id", "A") == 25
    assert record.p_value("id", "A") == mcnemar_p_value(10, 0)
    assert record.p_value("id", "H") == 1
    assert record.right("id", "A") == 30
    assert record.id_gains.to_dict()["data"] == [25, 0, 0, 0]
    assert record.rate_effect("A") == 25


def test_counts_alone_are_compared_by_fishers_test():
    record = SpectralPeft(published.dataset("spectral_peft"))
    assert record.p_value("id", "F") == fisher_p_value(186, 179, 200)
    assert record.right("ood", "H", AGGRESSIVE) == 147
    assert record.problems("ood") == 200


def test_the_two_way_table_is_taken_apart():
    """Rates and configurations that add up leave nothing; the shares are those of their squares."""
    rises = {GENTLE: {"A": (0, 0.0, 0), "H": (0, 0.1, 0)}, AGGRESSIVE: {"A": (0, 0.3, 0), "H": (0, 0.4, 0)}}
    shares = planted(rises=rises).variance_shares
    assert shares["rate"] == pytest.approx(0.9)
    assert shares["configuration"] == pytest.approx(0.1)


def test_sweeps_and_repetitions():
    record = planted(noise=0.1)
    assert record.sweep_text_rises == pytest.approx(list(SWEEP.values()))
    values = record.mean("full_text_loss").sel(rate=GENTLE, configuration="A").values
    assert record.spread_of_repetitions == pytest.approx(values.std(ddof=1))
    with pytest.raises(NotApplicable, match="1 of the three seeds"):
        _ = planted(seeds=(0,)).spread_of_repetitions
    exact = planted()
    assert exact.smallest_contrast() == pytest.approx(0)  # A and F raise the loss of text alike
    assert exact.smallest_contrast(AGGRESSIVE) == pytest.approx(0.29)  # A and H alone: 0.3 and 0.01
    assert record.rate_of_repetitions == GENTLE


def test_published_repetitions_are_set_against_contrasts_of_their_own_rate():
    record = SpectralPeft(published.dataset("spectral_peft"))
    assert record.rate_of_repetitions == AGGRESSIVE
    assert record.spread_of_repetitions == pytest.approx(np.log(5.13 / 4.85), abs=1e-6)
    assert record.smallest_contrast(AGGRESSIVE) == pytest.approx(np.log(5.13 / 4.89))


def answered(before, after, split="ood"):
    """A planted record with so many problems of a split right before training and in every run."""
    record = planted()
    data, right = record.data, np.arange(PROBLEMS)
    name, grid = f"{split}_accuracy", record.variable(f"{split}_accuracy")
    runs = xr.where(np.isnan(grid), np.nan, xr.DataArray((right < after).astype(float), dims=f"{split}_problem"))
    base = data[f"base_{name}"].copy(data=(right < before).astype(float))
    return SpectralPeft(data.assign({name: runs.transpose(*grid.dims), f"base_{name}": base}))


@pytest.mark.parametrize(
    ("split", "before", "after", "applies"),
    [
        ("ood", 20, 19, True),  # all lost one alike: that they keep the rest is a finding
        ("ood", 20, 2, True),
        ("ood", 20, 1, False),
        ("ood", 1, 0, True),  # nothing to lose
        ("id", 1, 30, True),
        ("id", 0, 30, False),
        ("id", 20, 0, True),  # in distribution the style is what is trained
    ],
)
def test_accuracy_that_tells_of_style_is_not_judged(split, before, after, applies):
    record = answered(before, after, split)
    if applies:
        record.require_accuracy_of_skill(split)
        return
    with pytest.raises(NotApplicable, match="accuracy would tell of style"):
        record.require_accuracy_of_skill(split)


def test_published_answers_are_judged_by_their_number():
    record = SpectralPeft(published.dataset("spectral_peft"))
    for split in ("id", "ood"):
        record.require_accuracy_of_skill(split)


def test_seconds_of_every_seed():
    record = planted()
    grid = record.data["train_seconds"].copy()
    grid.loc[{"rate": GENTLE, "configuration": "A"}] = [30, 20, 10]
    timed = SpectralPeft(record.data.assign(train_seconds=grid))
    assert timed.train_seconds_by_seed("A").tolist() == [30, 20, 10]
    assert timed.train_seconds("A") == 20
    assert timed.train_seconds_by_seed("H").tolist() == [10, 10, 10]
    with pytest.raises(NotApplicable, match="has no B"):
        timed.train_seconds_by_seed("B")
    source = SpectralPeft(published.dataset("spectral_peft"))
    assert source.train_seconds_by_seed("A").tolist() == [source.train_seconds("A")]


def test_ranks_and_ratios_by_region():
    record = planted()
    assert record.late.tolist() == [False, False, True, True]
    assert record.region_rank.sel(matrix="up_proj").values.tolist() == [6, 6]
    ratio = record.effective_rank_ratio
    assert float(record.region_effective_rank.sel(matrix="q_proj", region="late")) == pytest.approx(
        float(ratio[2:, 0].mean())
    )
    assert record.rank_agreement(["plateau"]) == pytest.approx(1)


def test_what_was_not_trained_is_named():
    record = planted()
    with pytest.raises(NotApplicable, match="F was not trained at the aggressive rate"):
        record.delta_nll("ood", "F", rate=AGGRESSIVE)
    with pytest.raises(NotApplicable, match="has no B at the gentle rate"):
        record.gain("ood", "B")


def test_the_published_schedule_allows_what_the_formula_says():
    record = SpectralPeft(published.dataset("spectral_peft"))
    norms = xr.ones_like(record.effective_rank_ratio)
    (update, weight), *_ = record.largest_updates(norms, GENTLE)
    assert weight == pytest.approx((4096 * 2560) ** -0.5)
    assert update == pytest.approx(2 * 3.15e-4 * (8 / (3 * 2560)) ** 0.5, rel=0.01)
    assert record.largest_updates(norms, AGGRESSIVE)[0][0] == pytest.approx(40 * update)


def shift(spectral_peft):
    """The loss out of distribution rises with A."""
    assert spectral_peft.delta_nll("ood", "A") > 0


@pytest.mark.parametrize(("rise", "least", "most"), [(0.3, 0.95, 1), (-0.3, 0, 0.05)])
def test_support_settles_a_planted_difference(rise, least, most):
    record = planted(0.3, (0,), {GENTLE: {"A": (0, rise, 0), "H": (0, 0, 0)}})
    assert least <= support(Predicate(shift), {"spectral_peft": record}) <= most


def test_every_claim_is_quick_on_a_measured_record():
    """Claims are evaluated on 500 resamples: 2 ms each at most, in the median of what applies."""
    record, times = planted(0.1), []
    for module in ("test_spectral_peft", "test_spectral_peft_rates"):
        claims = vars(import_module(f"findings.surgery.{module}")).values()
        for one in filter(None, map(claim_of, claims)):
            if list(one.function.__code__.co_varnames[: one.function.__code__.co_argcount]) == ["spectral_peft"]:
                for resample in record.resamples[:2]:  # the first evaluation compiles the claim
                    started = time.process_time()
                    with suppress(AssertionError, NotApplicable):
                        one.predicate({"spectral_peft": resample})
                times.append(time.process_time() - started)
    assert len(times) > 40
    assert np.median(times) < 0.002


def test_variables_have_tolerances_of_their_own_or_the_default():
    names = set(planted().data.data_vars) | {"merge_loss", "update_relative_norm", "rows", "columns"}
    own = {name for name in EXPERIMENT.tolerances if name}
    known = names | {"subspace_overlap_left", "subspace_overlap_right", "merge_unchanged_fraction"}
    assert own <= known | {"effective_rank_ratio_change"}
    assert not [name for name in own if re.search("base|sweep", name)]
