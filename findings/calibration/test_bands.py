"""Bootstrap intervals of a record's profiles, and how snapshots keep them."""

import numpy as np
import pytest
import xarray as xr

from lab import experiments
from lab.experiments import Experiment, Tolerance
from lab.records import Record, variable
from lab.snapshots import numbers

pytestmark = pytest.mark.calibration


class Sampled(Record):
    profiles = ("layer_loss",)

    @property
    def layer_loss(self):
        return self.mean("layer_loss")


def sampled(rows=40):
    values = np.random.default_rng(1).normal([[1.0], [3.0]], 1.0, size=(2, rows))
    data = xr.Dataset(
        {
            "scored_tokens": variable("prompt", np.ones(rows), "token", "scored tokens"),
            "layer_loss": variable(("layer", "prompt"), values, "nat/token", "loss per layer"),
        },
        {"layer": [0, 1]},
        {"experiment": "toy", "subject": "tiny", "source": "measured", "condition": "quick-bfloat16"},
    )
    return Sampled(data)


def test_a_band_is_the_bootstrap_interval_of_the_mean():
    """Of 40 draws with standard deviation 1 the interval is about 2 * 1.96 / sqrt(40) = 0.62 wide."""
    found = sampled()
    band = found.band("layer_loss")
    assert (band.sel(bound="low") < found.layer_loss).all()
    assert (found.layer_loss < band.sel(bound="high")).all()
    width = band.sel(bound="high") - band.sel(bound="low")
    np.testing.assert_allclose(width, 2 * 1.96 / np.sqrt(40), rtol=0.35)


def test_a_snapshot_gives_back_numbers_and_bands(monkeypatch):
    toy = Experiment("X-1", "Toy", "?", Sampled, None, {}, {"": Tolerance(0.01, 0, "exact")})
    monkeypatch.setattr(experiments, "experiment", lambda name: toy)
    monkeypatch.setattr(experiments, "modules", lambda: {"toy": "toy"})
    found = sampled()
    again = numbers.to_record(numbers.parse(numbers.dump(numbers.of_record(found))))
    assert (again.subject, again.source, again.condition) == ("tiny", "measured", "quick-bfloat16")
    np.testing.assert_allclose(again.layer_loss, found.layer_loss, rtol=1e-5)
    np.testing.assert_allclose(again.band("layer_loss"), found.band("layer_loss"), rtol=1e-5)
    assert again.resamples == []
    kept = numbers.of_record(found)["bands"]["layer_loss"]
    np.testing.assert_allclose(kept["values"], found.band("layer_loss").values.ravel(), rtol=1e-5)
    assert numbers.of_record(again)["bands"] == {"layer_loss": kept}


def test_a_record_without_samples_has_no_band():
    assert Sampled(sampled().data.mean("prompt")).band("layer_loss") is None
