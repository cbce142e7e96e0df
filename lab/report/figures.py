"""The figures of the experiments: each owns a module `lab/experiments/<group>/figures/<name>.py`.

def figure(records: Sequence[TheRecord]) -> Figure
    Draw the records of several subjects: published, measured, or read from snapshots without their samples. All
    panels have labelled axes, with units.

def describe(records: Sequence[TheRecord]) -> str
    What is drawn and what one sees, in one or two sentences, told from the numbers: the alternative text.

Experiments do not import their figures: a stored record's key holds the sources that its experiment imports, and a
change to a drawing must not make anything be measured again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import matplotlib
from matplotlib.figure import Figure

from lab import experiments
from lab.records import Record
from lab.report import output
from lab.report.style import SETTINGS


@dataclass(frozen=True)
class ExperimentFigure:
    """What an experiment draws of its records."""

    name: str
    module: ModuleType

    def draw(self, records: Sequence[Record]) -> Figure:
        """The figure of these records, in the house style."""
        with matplotlib.rc_context(SETTINGS):  # type: ignore[arg-type]
            drawn: Figure = self.module.figure(records)
        return drawn

    def describe(self, records: Sequence[Record]) -> str:
        """The figure in words."""
        return str(self.module.describe(records))

    @property
    def title(self) -> str:
        """Id and title of the experiment."""
        experiment = experiments.experiment(self.name)
        return f"{experiment.id} {experiment.title}"

    def svg(self, records: Sequence[Record]) -> str:
        """The figure as an SVG element, see `output.svg`."""
        drawn = self.draw(records)
        return output.svg(drawn, title=self.title, description=self.describe(records), prefix=self.name)

    def save(self, records: Sequence[Record], path: Path) -> None:
        """Write the figure to a file, see `output.save`."""
        output.save(self.draw(records), path, title=self.title, description=self.describe(records))


@cache
def modules() -> Mapping[str, str]:
    """Experiment name -> dotted name of its figure's module, found in the tree without importing anything."""
    found = sorted(Path(experiments.__file__).parent.glob("*/figures/*.py"))
    return {
        path.stem: f"lab.experiments.{path.parts[-3]}.figures.{path.stem}" for path in found if path.stem != "__init__"
    }


def figure_of(name: str) -> ExperimentFigure | None:
    """The figure of the experiment of this name; None if it draws none."""
    module = modules().get(name)
    return ExperimentFigure(name, import_module(module)) if module else None
