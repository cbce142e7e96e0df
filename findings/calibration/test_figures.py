"""Every experiment's figure, on what is committed: labelled axes with units, alternative text, the same bytes twice."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from lab import experiments
from lab.records import Record
from lab.report import figures
from lab.snapshots.addresses import all_addresses, load
from lab.snapshots.numbers import to_record

pytestmark = pytest.mark.calibration

#: axes whose label names no quantity but an order of things
ORDERS = ("layer", "head", "matrix", "class", "family", "category", "share", "number", "component", "part", "stream")


def recorded(name: str) -> list[Record]:
    return [to_record(load(address.path)) for address in all_addresses() if address.experiment == name]


DRAWN = [name for name in figures.modules() if name in {address.experiment for address in all_addresses()}]


@pytest.fixture(params=DRAWN)
def drawn(request: pytest.FixtureRequest) -> tuple[figures.ExperimentFigure, list[Record]]:
    found = figures.figure_of(request.param)
    assert found is not None
    return found, recorded(request.param)


@cache
def svg_of(name: str) -> str:
    found = figures.figure_of(name)
    assert found is not None
    return found.svg(recorded(name))


def test_axes_are_labelled_with_units(drawn):
    figure, records = drawn
    made = figure.draw(records)
    assert isinstance(made, Figure)
    panels = [axes for axes in made.axes if axes.axison]
    assert panels
    for axes in panels:
        labels = [axes.get_ylabel()] if axes.get_label() == "<colorbar>" else [axes.get_xlabel(), axes.get_ylabel()]
        for label in labels:
            assert label, f"an axis of {figure.name} has no label"
            assert re.search(r"\[.+\]", label) or any(word in label for word in ORDERS), f"{label!r} names no unit"


def test_every_record_can_be_drawn_alone(drawn):
    figure, records = drawn
    for record in records:
        assert figure.draw([record]).axes
        assert record.subject in figure.describe([record])


def test_the_description_is_a_sentence_from_the_numbers(drawn):
    figure, records = drawn
    text = figure.describe(records)
    assert text[0].isupper()
    assert text.endswith(".")
    assert re.search(r"\d", text), "a description tells numbers"
    assert "nan" not in text.lower().split()


def test_drawings_are_the_same_byte_for_byte(drawn):
    figure, records = drawn
    assert figure.svg(records) == svg_of(figure.name)


def test_drawings_are_well_formed_and_say_what_they_show(drawn):
    figure, records = drawn
    element = ElementTree.fromstring(svg_of(figure.name))
    names = {child.tag.rpartition("}")[2]: child for child in element}
    assert element.get("role") == "img"
    assert element.get("aria-labelledby").split() == [names["title"].get("id"), names["desc"].get("id")]
    assert names["desc"].text == figure.describe(records)
    ids = [node.get("id") for node in element.iter() if node.get("id")]
    assert len(ids) == len(set(ids))
    links = [value for node in element.iter() for name, value in node.attrib.items() if name.endswith("href")]
    assert all(link.startswith("data:") or link.removeprefix("#") in ids for link in links)


def test_figure_modules_belong_to_experiments():
    assert set(figures.modules()) <= set(experiments.modules())


def test_experiments_do_not_import_their_figures():
    # A stored record's key holds the sources that its experiment imports: drawings must not be among them.
    code = "import sys; from lab import experiments as e; [e.experiment(n) for n in e.modules()]\n"
    code += "sys.exit(any(m == 'matplotlib' or 'lab.report' in m for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_figures_need_no_torch():
    code = "import sys; from lab.report import figures as f; [f.figure_of(n) for n in f.modules()]\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
