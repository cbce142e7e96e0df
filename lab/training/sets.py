"""Sets of specimens, by name: what `python -m lab train` makes, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lab.experiments.surgery.spectral_peft import EXPERIMENT, Run, runs
from lab.training import recipes, specimens
from lab.training.recipes import Recipe, recipe

SWEEP = f"{recipes.FAMILY}-rates"


def members(name: str) -> list[Recipe]:
    """The recipes of a set, or the one of a single specimen.

    `spectral-peft` are the adapters that T-18's quick budget evaluates, `spectral-peft-full` those of the full one;
    `spectral-peft-rates` is A over the sweep of rates, from which the gentle one is chosen.

    Raises:
        UserError: there is no such set or specimen.
    """
    rates = recipes.rates()
    sets = {budget.specimens: list(runs(budget, rates)) for budget in EXPERIMENT.budgets.values()}
    sets[SWEEP] = [Run("A", rate, 0) for rate in rates.sweep]
    return [recipe(run.name) for run in sets[name]] if name in sets else [recipe(name)]


def train(names: Sequence[str], device: str, report: Callable[[str], None], *, again: bool = False) -> list[Path]:
    """Train what is not here yet, bases first; returns the folders of all that was asked for.

    Args:
        names: of specimens or sets.
        device: where they are trained.
        report: told in words how far it is, and after the sweep of rates which of them is gentle.
        again: train those that are here, too; their bases only if they are wanting.

    Raises:
        UserError: an unknown name, said before anything is trained; or see `lab.training.making.make`.
    """
    wanted = list(dict.fromkeys(one for name in names for one in members(name)))
    bases = [recipe(one.base) for one in wanted if one.base is not None]
    needed = [one for one in dict.fromkeys([*bases, *wanted]) if _is_needed(one, again=again and one in wanted)]
    report(f"{len(wanted)} specimens, of which {len(wanted) - sum(one in needed for one in wanted)} are here")
    for number, one in enumerate(needed, 1):
        from lab.training import making

        report(f"[{number}/{len(needed)}] {one.name}")
        making.make(one, device, report)
    if SWEEP in names:
        from lab.training import rates

        report(rates.verdict(rates.text_rises(device, report)))
    return [specimens.folder(one.name) for one in wanted]


def _is_needed(one: Recipe, *, again: bool) -> bool:
    return again or specimens.problem(one) is not None
