"""Records and published figures: averages, resamples, and files that are not what they should be."""

import json

import numpy as np
import pytest
import xarray as xr

from lab import experiments, paths, published
from lab.architectures import checkpoints
from lab.errors import NotApplicable, UserError
from lab.records import RESAMPLES, Record, variable
from lab.subjects.catalog import catalog

pytestmark = pytest.mark.calibration

LOSS = np.array([[1.0, 2.0, 4.0], [0.5, 0.25, 8.0]])
TOKENS = np.array([10, 30, 60])


@pytest.fixture
def record():
    data = xr.Dataset(
        {
            "scored_tokens": variable("prompt", TOKENS, "token", "tokens"),
            "text_tokens": variable("prompt", [1, 1, 2], "token", "tokens of the text"),
            "loss": variable(("layer", "prompt"), LOSS, "nat/token", "loss"),
            "text_loss": variable("prompt", LOSS[0], "nat/token", "loss", weights="text_tokens"),
            "norm": variable("layer", [3.0, 4.0], "1", "norm"),
        },
        {"layer": [0, 1]},
        {"subject": "tiny", "source": "measured", "condition": "quick-bfloat16", "provenance": '{"dtype": "bfloat16"}'},
    )
    return Record(data)


def test_means_are_over_tokens(record):
    np.testing.assert_allclose(record.mean("loss"), (LOSS * TOKENS).sum(1) / TOKENS.sum())
    assert float(record.mean("text_loss")) == pytest.approx((1 + 2 + 2 * 4) / 4)
    np.testing.assert_array_equal(record.mean("norm"), [3, 4])


def test_a_mean_is_what_xarray_makes_of_it_labels_included(record):
    loss, tokens = record.data["loss"].assign_coords(text=("prompt", list("abc"))), record.data["scored_tokens"]
    found = Record(record.data.assign(loss=loss)).mean("loss")
    xr.testing.assert_identical(found, xr.dot(loss, tokens, dim="prompt") / float(tokens.sum()))


def test_a_mean_is_taken_once_and_a_summary_leaves_it_alone(record):
    """Five hundred resamples are asked for the same few means by dozens of claims."""
    record.sampling = {"prompt": None}
    with xr.set_options(keep_attrs=False):
        mean = record.mean("loss")
        assert record.summary()["loss"].attrs["unit"] == "nat/token"
    assert record.mean("loss") is mean
    assert mean.attrs == {}


def test_what_the_record_lacks_is_not_applicable(record):
    with pytest.raises(NotApplicable, match="the measured record of tiny holds no knockout_loss"):
        record.variable("knockout_loss")


def test_the_summary_has_no_sampling_dimension(record):
    summary = record.summary()
    assert set(summary.dims) == {"layer"}
    assert "scored_tokens" not in summary
    assert summary.loss.attrs == {"unit": "nat/token", "description": "loss"}


def test_a_resample_draws_whole_prompts(record):
    assert len(record.resamples) == RESAMPLES
    columns = {tuple(column) for column in LOSS.T}
    for resample in record.resamples[:20]:
        assert {tuple(column) for column in resample.data.loss.values.T} <= columns
        tokens = dict(zip(map(tuple, LOSS.T), TOKENS, strict=True))
        drawn = zip(map(tuple, resample.data.loss.values.T), resample.data.scored_tokens.values, strict=True)
        assert all(tokens[column] == count for column, count in drawn)


def test_resamples_are_the_same_every_time_and_in_every_record(record):
    other = Record(record.data.rename(layer="head"))
    for one, two in zip(record.resamples, other.resamples, strict=True):
        np.testing.assert_array_equal(one.data.scored_tokens, two.data.scored_tokens)
    assert any((one.data.scored_tokens != record.data.scored_tokens).any() for one in record.resamples)


def test_the_spread_of_resampled_means_is_the_standard_error():
    values = np.random.default_rng(1).normal(size=200)
    data = {"scored_tokens": ("prompt", np.ones(200)), "x": ("prompt", values)}
    means = [float(resample.mean("x")) for resample in Record(xr.Dataset(data)).resamples]
    assert np.std(means) == pytest.approx(values.std() / np.sqrt(200), rel=0.1)


# ---- published figures


@pytest.fixture
def document(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    published._document.cache_clear()
    (tmp_path / "published").mkdir()
    layers = {"unit": "nat/token", "description": "loss", "dims": ["layer"], "coords": {"layer": [0, 1]}}
    content = {
        "subject": "famous",
        "source": {"commit": "abc"},
        "settings": {"vocabulary": 7},
        "quantities": {
            "loss": {"unit": "nat/token", "description": "loss", "dims": [], "coords": {}, "value": 0.5},
            "layer_loss": layers | {"value": [1.0, None]},
            "first": layers | {"value": [3, 4]},
        },
    }
    yield content
    published._document.cache_clear()


def read(document):
    published.path("toy").write_text(document if isinstance(document, str) else json.dumps(document))
    return published.dataset("toy")


def test_published_figures_are_a_record_like_any_other(document):
    record = Record(read(document))
    assert (record.subject, record.source, record.condition) == ("famous", "published", "published")
    assert record.provenance["settings"] == {"vocabulary": 7}
    np.testing.assert_array_equal(record.mean("layer_loss"), [1, np.nan])
    assert record.data["first"].dtype.kind == "i"
    assert record.resamples == []
    assert published.subject("toy") == "famous"
    assert published.subject("nothing") is None


def change(document, name, **parts):
    document["quantities"][name] |= parts
    return document


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda document: "", "is empty"),
        (lambda document: json.dumps(document)[:80], "is not whole JSON"),
        (lambda document: "[]", "are no JSON object"),
        (lambda document: document | {"subject": None}, "have no 'subject' that is a str"),
        (lambda document: document | {"quantities": []}, "have no 'quantities' that is a dict"),
        (
            lambda document: change(document, "layer_loss", value=[1.0]),
            r"of shape \(1,\), its labels say \(2,\)",
        ),
        (lambda document: change(document, "layer_loss", value=["a", None]), "'layer_loss' without proper"),
        (lambda document: change(document, "layer_loss", coords={}), "'layer_loss' without proper 'layer'"),
        (lambda document: change(document, "first", coords={"layer": [1, 2]}), "label 'layer' of 'first' otherwise"),
        (lambda document: document | {"quantities": {"loss": 1}}, "'loss' without proper"),
    ],
)
def test_damaged_figures_are_one_line(document, damage, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        read(damage(document))
    assert "\n" not in str(caught.value)
    assert "toy.json" in str(caught.value)


@pytest.mark.parametrize("name", sorted(path.stem for path in (paths.DATA / "published").glob("*.json")))
def test_committed_figures_are_whole(name):
    assert name in experiments.modules()
    data = published.dataset(name)
    assert data.attrs["subject"] in {*catalog(), *checkpoints.subjects()}
    assert all(array.attrs["unit"] and array.attrs["description"] for array in data.data_vars.values())
    experiments.experiment(name).record(data).summary()
