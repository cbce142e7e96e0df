"""The drawing kit on records whose numbers are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex

from lab.errors import UserError
from lab.records import BOUNDS, Record
from lab.report import drawing, output, style
from lab.report.recorded import comparable
from lab.report.svg import tidy

pytestmark = pytest.mark.calibration


class Toy(Record):
    """A profile over layers, one over slots, and a matrix."""

    @property
    def profile(self) -> xr.DataArray:
        return self.mean("profile")

    @property
    def readings(self) -> xr.DataArray:
        return self.mean("readings")


def toy(subject: str = "smollm2-135m-instruct", source: str = "measured", values: tuple[float, ...] = (4, 2, 1)) -> Toy:
    n = len(values)
    condition = "published" if source == "published" else "quick-bfloat16"
    layers = xr.DataArray(np.array(values, float), dims="layer", coords={"layer": range(n)})
    slots = xr.DataArray(np.arange(n + 1.0), dims="slot", coords={"slot": range(-1, n)})
    band = xr.concat([layers - 0.5, layers + 0.5], BOUNDS)
    attributes = {"subject": subject, "source": source, "condition": condition, "provenance": json.dumps({})}
    return Toy(xr.Dataset({"profile": layers, "readings": slots}, attrs=attributes | {"bands": {"profile": band}}))


def lines(axes) -> list[np.ndarray]:
    return [line.get_xydata() for line in axes.lines]


def test_relative_depth_of_layers_and_slots() -> None:
    record = toy(values=(4, 2, 1, 3))
    np.testing.assert_allclose(drawing.relative_depth(record, record.profile), [0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(drawing.relative_depth(record, record.readings), [0, 0.25, 0.5, 0.75, 1])
    part = record.profile.isel(layer=slice(2, None))
    record.__dict__["n_layers"] = 4
    np.testing.assert_allclose(drawing.relative_depth(record, part), [0.5, 0.75])
    with pytest.raises(TypeError, match="no depth"):
        drawing.relative_depth(record, record.profile.rename(layer="step"))


def test_profiles_are_drawn_with_their_bands() -> None:
    _, (axes,) = drawing.panels()
    assert drawing.depth_profiles(axes, [toy()], "profile", label="x [1]")
    np.testing.assert_allclose(lines(axes)[0], [[0, 4], [1 / 3, 2], [2 / 3, 1]])
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (0.5, 4.5)


def test_records_without_the_quantity_are_left_out_and_an_empty_panel_says_so() -> None:
    _, (axes,) = drawing.panels()
    assert drawing.depth_profiles(axes, [toy()], lambda record: record.mean("nothing"), label="x [1]") == []
    assert [text.get_text() for text in axes.texts] == ["not in these records"]


def test_a_subject_looks_the_same_in_every_figure() -> None:
    records = [toy("gemma-3-270m"), toy("qwen3-4b-instruct-2507"), toy("my-model"), toy()]
    together = {look.label: look for look in style.looks(records)}
    for record in records[:2]:
        (alone,) = style.looks([record])
        assert alone == together[record.subject]


def test_records_are_told_apart_without_colour() -> None:
    records = [toy(name) for name in (*style.catalog(), "one", "two")] + [toy(source="published")]
    looks = style.looks(records)
    kinds = {(look.marker, look.published) for look in looks}
    assert len(kinds) == len(records)
    measured, published = looks[0], looks[-1]
    assert measured.line()["linestyle"] != published.line()["linestyle"]
    assert measured.line()["markerfacecolor"] != published.line()["markerfacecolor"]


def test_labels_name_the_condition_only_where_it_takes_that() -> None:
    full = toy()
    full.data.attrs["condition"] = "full-bfloat16"
    assert [look.label for look in style.looks([toy(), toy(source="published")])] == [
        "smollm2-135m-instruct",
        "smollm2-135m-instruct, published",
    ]
    first, second = style.looks([toy(), full])
    assert second.label == "smollm2-135m-instruct (full-bfloat16)"
    assert first.line()["linestyle"] != second.line()["linestyle"], "the subject's colour is the same"


def test_a_figure_of_all_shows_every_subject_once_under_the_commonest_condition() -> None:
    full, published = toy(), toy(source="published")
    full.data.attrs["condition"] = "full-bfloat16"
    other, only = toy("gemma-3-270m"), toy("my-model")
    only.data.attrs["condition"] = "full-bfloat16-cuda"
    assert comparable([published, full, toy(), other, only])[2:] == [other, only]
    assert comparable([published, full, toy(), other, only])[1].condition == other.condition
    assert comparable([published, full])[0] is published


@pytest.mark.parametrize(("values", "scale"), [((4, 2, 1), "log"), ((4, 0, 1), "symlog"), ((-4, 2, 1), "symlog")])
def test_an_axis_is_logarithmic_as_far_as_it_can_be(values, scale) -> None:
    _, (axes,) = drawing.panels()
    drawing.depth_profiles(axes, [toy(values=values)], lambda record: record.profile, label="x [1]", scale="symlog")
    assert axes.get_yscale() == scale


def test_bars_stand_beside_each_other_in_groups() -> None:
    _, (axes,) = drawing.panels()
    drawing.bars(axes, [toy(), toy("gemma-3-270m")], "profile", x_label="layer", label="x [1]")
    heights = [patch.get_height() for patch in axes.patches]
    assert heights == [4, 2, 1, 4, 2, 1]
    first, second = axes.patches[0], axes.patches[3]
    assert first.get_x() + first.get_width() == pytest.approx(second.get_x())
    assert first.get_hatch() != second.get_hatch()


def test_a_diverging_matrix_is_white_at_zero() -> None:
    _, (axes,) = drawing.panels()
    drawing.heatmap(axes, np.array([[0.0, 5.0], [-1.0, np.nan]]), title="t", label="x [1]", scale="diverging")
    (image,) = axes.images
    assert min(image.to_rgba(np.array([0.0]))[0][:3]) > 0.95
    assert image.norm.vmin == -image.norm.vmax


def test_a_logarithmic_matrix_leaves_zero_empty() -> None:
    _, (axes,) = drawing.panels()
    drawing.heatmap(axes, np.array([[0.0, 5.0], [1.0, 10.0]]), title="t", label="x [1]", scale="log")
    assert np.ma.getmaskarray(axes.images[0].get_array()).tolist() == [[True, False], [False, False]]


def test_a_tree_has_its_leaves_and_its_cut() -> None:
    linkage = np.array([[0, 1, 1.0, 2], [2, 3, 4.0, 3]])
    _, (axes,) = drawing.panels()
    drawing.dendrogram(axes, linkage, title="t", label="height [1]", names=["a", "b", "c"], cut=2.0)
    assert sorted(label.get_text() for label in axes.get_xticklabels()) == ["a", "b", "c"]
    assert max(data[:, 1].max() for data in lines(axes)) == 4
    assert any(set(data[:, 1]) == {2.0} for data in lines(axes))


def test_the_okabe_ito_colours_can_be_themed() -> None:
    figure, (axes,) = drawing.panels()
    drawing.depth_profiles(axes, [toy()], "profile", label="x [1]")
    text = style.themed(output.svg(figure, title="t", description="d"))
    assert f"var(--figure-series-1, {to_hex(style.SERIES[0])})" in text
    assert f": {style.SERIES[0]}" not in text


def test_markup_in_titles_is_escaped() -> None:
    figure, _ = drawing.panels()
    text = output.svg(figure, title="<script>", description='a "b" & c')
    assert "<script>" not in text
    assert "a &quot;b&quot; &amp; c" in text


def test_tidy_keeps_what_is_referred_to_and_shares_styles() -> None:
    use = '<use xlink:href="#abc" x="1.23456" style="fill: #111111"/>'
    text = (
        f'<?xml?><svg width="1"><metadata>m</metadata><g id="axes"><path id="abc" d="M 0.123456 1"/>{use * 4}</g></svg>'
    )
    tidied = tidy(text, "p")
    assert "metadata" not in tidied
    assert 'id="axes"' not in tidied
    assert 'id="p-0"' in tidied
    assert tidied.count('href="#p-0"') == 4
    assert tidied.count("fill: #111111") == 1
    assert 'd="M 0.12 1"' in tidied
    assert 'x="1.23"' in tidied


def test_a_file_is_written_in_the_format_of_its_ending(tmp_path) -> None:
    figure, _ = drawing.panels()
    for ending, start in (("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")):
        output.save(figure, tmp_path / f"f.{ending}", title="t", description="d")
        assert (tmp_path / f"f.{ending}").read_bytes().startswith(start)
    with pytest.raises(UserError, match="its ending must be one of"):
        output.save(figure, tmp_path / "f.jpeg", title="t", description="d")
    assert not (tmp_path / "f.jpeg").exists()
