"""T-18 spectral-guided PEFT: do weight spectra say where a low-rank adapter's parameters are spent best?

Adapters that differ only in their rank allocation (`lab.adapters.allocations`) are trained on one narrow task and
compared on it (`id`), on related tasks that they were not trained on (`ood`), and on unrelated text. The published run
adapts to GSM8K and tests on MATH-500; measured ones adapt a model that can do six families of arithmetic problems to
two of them in a foreign style (`lab.corpora.arithmetic`, regime `competent`). Two learning rates: `gentle`, and
`aggressive` at 40 times that.

Accuracy is the share of problems solved; measured, of solutions whose every token is the model's first choice, which
is what greedy decoding would write. That asks for the style of the solution, too: `id` is annotated, which a model may
not know before training, and `ood` plain, which it may give up by training. Claims about accuracy do not apply where
that decides (`require_accuracy_of_skill`). `nll` is the loss on digits of results alone, the measure with the least
noise.

Adapters are specimens: trained once, by a recipe, with `python -m lab train NAME`; nothing is trained when claims are
judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import xarray as xr

from lab import paths
from lab.adapters.adapted_weights import AGGRESSIVE, GENTLE, AdaptedWeights
from lab.errors import NotApplicable
from lab.experiments import Experiment, Tolerance
from lab.statistics.proportions import fisher_p_value, paired_p_value
from lab.training.recipes import Rates, run_name

if TYPE_CHECKING:
    from lab.corpora.corpus import Corpus
    from lab.store import Sweep
    from lab.subjects.loading import LoadedSubject

SplitName = Literal["id", "ood"]
BASE = "base"
PUBLISHED = ("A", "B", "F", "H")
RATES = (GENTLE, AGGRESSIVE)
MANIFEST = paths.DATA / "specimens" / "manifest.json"
RECIPES = paths.DATA / "specimens" / "recipes.toml"


class SpectralPeft(AdaptedWeights):
    """What adapters of several rank allocations learned and forgot, and what they did to the weights.

    Dimensions: `configuration`, `rate` (gentle, aggressive), `seed`, `layer`, `matrix`, `learning_rate` (the sweep of
    A), sampled over `id_problem`, `ood_problem` and `text`. Combinations that were not trained are NaN.
    """

    sampling: ClassVar = {"id_problem": None, "ood_problem": None, "text": "text_tokens"}
    profiles: ClassVar = ("id_gains", "ood_gains", "aggressive_ood_gains")

    # ---- which runs there are

    def trained(self, rate: str = GENTLE) -> list[str]:
        """The source's configurations A, B, F, H, as far as they were trained at a rate."""
        found = [name for name in PUBLISHED if name in self.configurations and self._is_trained(name, rate)]
        if len(found) < 2:
            raise NotApplicable(
                f"the {self.source} record of {self.subject} compares no configurations at the {rate} rate"
            )
        return found

    def _is_trained(self, configuration: str, rate: str) -> bool:
        return rate in self.rates and not np.isnan(self._of("train_loss")[self.place(configuration, rate)])

    def _of(self, name: str) -> np.ndarray:
        """A variable, averaged over what was sampled and over seeds: [rate, configuration], or a single number."""
        if name not in self._averages:
            values = self.mean(name)
            if "seed" in values.dims:
                values = values.mean("seed")
            self._averages[name] = values.transpose("rate", "configuration", missing_dims="ignore").values
        return self._averages[name]

    @cached_property
    def _averages(self) -> dict[str, np.ndarray]:
        return {}

    def _one(self, name: str, configuration: str, rate: str) -> float:
        """A variable of one run, averaged; of the model before training if the configuration is `base`."""
        if configuration == BASE:
            return float(self._of(f"base_{name}"))
        value = float(self._of(name)[self.place(configuration, rate)])
        if np.isnan(value):
            raise NotApplicable(f"{configuration} was not trained at the {rate} rate on {self.subject}")
        return value

    # ---- what was learned and forgotten

    def accuracy(self, split: SplitName, configuration: str = BASE, rate: str = GENTLE) -> float:
        """Share of the problems of a split that are solved."""
        return self._one(f"{split}_accuracy", configuration, rate)

    def gain(self, split: SplitName, configuration: str, over: str = BASE, rate: str = GENTLE) -> float:
        """Accuracy over that of another configuration, in percentage points."""
        return round(100 * (self.accuracy(split, configuration, rate) - self.accuracy(split, over, rate)), 9)

    def require_accuracy_of_skill(self, split: SplitName) -> None:
        """Raise NotApplicable where accuracy tells the style of answers, and not whether problems are solved.

        A measured answer is right if every token of the solution is. In distribution that is unknown to a model that
        has no annotated solution right before training: whatever it has afterwards is a gain. Out of distribution, a
        model that takes up the annotated style has no plain solution right: if no configuration has more than one
        right at the gentle rate, and the model had more before, all of them lost alike, and at no rate can more be
        lost. Published answers are judged by their number alone.
        """
        if self.source == "published":
            return
        before = self.right(split)
        if split == "id" and before == 0:
            raise NotApplicable(
                f"before training {self.subject} writes no solution in the annotated style: "
                "accuracy would tell of style"
            )
        if split == "ood" and before > 1 >= max(self.right(split, name) for name in self.trained()):
            raise NotApplicable(
                f"trained to the annotated style, {self.subject} hardly writes a plain solution: "
                "accuracy would tell of style"
            )

    def _gains(self, split: SplitName, rate: str) -> xr.DataArray:
        names = [name for name in self.configurations if self._is_trained(name, rate)]
        gains = [self.gain(split, name, rate=rate) for name in names]
        return xr.DataArray(gains, dims="configuration", coords={"configuration": names})

    @property
    def id_gains(self) -> xr.DataArray:
        """Accuracy in distribution over that before training, in points, gentle rate [configuration]."""
        return self._gains("id", GENTLE)

    @property
    def ood_gains(self) -> xr.DataArray:
        """Accuracy out of distribution over that before training, in points, gentle rate [configuration]."""
        return self._gains("ood", GENTLE)

    @property
    def aggressive_ood_gains(self) -> xr.DataArray:
        """Accuracy out of distribution over that before training, in points, aggressive rate [configuration]."""
        return self._gains("ood", AGGRESSIVE)

    def problems(self, split: SplitName) -> int:
        """Number of problems of a split."""
        dimension = f"{split}_problem"
        return self.data.sizes[dimension] if dimension in self.data.sizes else int(self.variable(f"{split}_problems"))

    def right(self, split: SplitName, configuration: str = BASE, rate: str = GENTLE) -> int:
        """Number of problems solved, averaged over seeds."""
        return round(self.accuracy(split, configuration, rate) * self.problems(split))

    def p_value(self, split: SplitName, configuration: str, over: str = BASE, rate: str = GENTLE) -> float:
        """Exact p-value of a difference of accuracies, two-sided.

        McNemar's test on the paired problems of the first seed; where only counts are known, Fisher's.
        """
        if f"{split}_problem" in self.data.sizes:
            return paired_p_value(self._vector(split, configuration, rate), self._vector(split, over, rate))
        counts = (self.right(split, name, rate) for name in (configuration, over))
        return fisher_p_value(*counts, self.problems(split))

    def _vector(self, split: SplitName, configuration: str, rate: str) -> np.ndarray:
        """Right or wrong [problem], of the first seed."""
        if configuration == BASE:
            whole: np.ndarray = self.variable(f"base_{split}_accuracy").values
            return whole
        array = self.variable(f"{split}_accuracy").isel(seed=0).transpose("rate", "configuration", f"{split}_problem")
        values: np.ndarray = array.values[self.place(configuration, rate)]
        if np.isnan(values).any():
            raise NotApplicable(f"{configuration} was not trained at the {rate} rate on {self.subject}")
        return values

    def delta_nll(self, split: SplitName, configuration: str, over: str = BASE, rate: str = GENTLE) -> float:
        """Loss on the digits of results over that of another configuration [nat/token]; negative is better."""
        return self._one(f"{split}_nll", configuration, rate) - self._one(f"{split}_nll", over, rate)

    def perplexity(self, configuration: str = BASE, rate: str = GENTLE) -> float:
        """Perplexity of unrelated text, template and prompt included, as published."""
        if self.has("full_text_loss"):
            return float(np.exp(self._one("full_text_loss", configuration, rate)))
        return self._one("text_perplexity", configuration, rate)

    def text_rise(self, configuration: str, rate: str = GENTLE) -> float:
        """Rise of the loss on completions of unrelated text [nat/token].

        Of the published run only the perplexity of the full text is known: the rise of its logarithm.
        """
        if self.has("text_loss"):
            return self._one("text_loss", configuration, rate) - self._one("text_loss", BASE, rate)
        return float(np.log(self.perplexity(configuration, rate) / self.perplexity()))

    # ---- what it costs

    def trainable(self, configuration: str) -> int:
        """Trainable parameters of a configuration."""
        if configuration not in self.configurations:
            raise NotApplicable(f"the {self.source} record of {self.subject} has no {configuration}")
        return int(self.variable("trainable_parameters").sel(configuration=configuration))

    def train_loss(self, configuration: str, rate: str = GENTLE) -> float:
        """Mean loss over all steps of the training [nat/token]."""
        return self._one("train_loss", configuration, rate)

    def train_seconds(self, configuration: str) -> float:
        """Seconds that training took at the gentle rate, on whatever machine it ran; mean over seeds."""
        return float(self.train_seconds_by_seed(configuration).mean())

    def train_seconds_by_seed(self, configuration: str) -> np.ndarray:
        """Seconds that training took at the gentle rate, of each run [seed]; one entry for published figures."""
        self.trainable(configuration)  # says which configurations there are
        seconds = self.variable("train_seconds").sel(configuration=configuration)
        if "rate" in seconds.dims:
            seconds = seconds.sel(rate=GENTLE)
        found: np.ndarray = np.atleast_1d(seconds.values)
        if np.isnan(found).any():
            raise NotApplicable(f"{configuration} was not trained at the {GENTLE} rate on {self.subject}")
        return found

    @property
    def perplexity_benefit(self) -> float:
        """Fall of the perplexity by H over that by A, at the gentle rate.

        Raises:
            NotApplicable: A has no such benefit.
        """
        whole = self.perplexity() - self.perplexity("A")
        if whole <= 0:
            raise NotApplicable(f"A does not lower the perplexity of other text on {self.subject}")
        return (self.perplexity() - self.perplexity("H")) / whole

    # ---- rates and repetitions

    def rate_effect(self, configuration: str) -> float:
        """Accuracy out of distribution lost from the gentle to the aggressive rate, in percentage points."""
        return self.gain("ood", configuration) - self.gain("ood", configuration, rate=AGGRESSIVE)

    def range_over_configurations(self, rate: str) -> float:
        """Range of the accuracy out of distribution over A, B, F and H, in percentage points."""
        gains = [self.gain("ood", name, rate=rate) for name in self.both_rates]
        return max(gains) - min(gains)

    @cached_property
    def both_rates(self) -> list[str]:
        """The source's configurations that were trained at both rates."""
        found = [name for name in self.trained() if name in self.trained(AGGRESSIVE)]
        if len(found) < 2:
            raise NotApplicable(f"fewer than two configurations were trained at both rates on {self.subject}")
        return found

    @property
    def variance_shares(self) -> dict[str, float]:
        """Shares of the variance of the two-way table (rate, configuration) that either explains, out of distribution.

        Of accuracies where losses are not known.
        """
        name = "ood_nll" if self.has("ood_nll") else "ood_accuracy"
        table = np.array(
            [[self._one(name, configuration, rate) for configuration in self.both_rates] for rate in RATES]
        )
        centred = table - table.mean()
        total = float((centred**2).sum())
        by_rate, by_configuration = (centred.mean(axis) for axis in (1, 0))
        return {
            "rate": float((by_rate**2).sum()) * table.shape[1] / total,
            "configuration": float((by_configuration**2).sum()) * table.shape[0] / total,
        }

    def sweep(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Learning rates of the sweep of A, rising, and a quantity (`ood_nll`, `ood_accuracy`, ...) at each."""
        values = self.mean(f"sweep_{name}").sortby("learning_rate")
        return values["learning_rate"].values, values.values

    @cached_property
    def sweep_text_rises(self) -> np.ndarray:
        """Rise of the loss on completions of unrelated text at the rates of the sweep, rising [learning_rate]."""
        rises: np.ndarray = self.sweep("text_loss")[1] - float(self.mean("base_text_loss"))
        return rises

    def require_times_of_its_own(self) -> None:
        """Raise NotApplicable where adapters were trained on a CPU: its cores are shared with other work."""
        if "cpu" in self.provenance["settings"].get("trained_on", ()):
            raise NotApplicable("adapters were trained on a CPU, whose cores other work shares")

    @property
    def rate_of_repetitions(self) -> str:
        """The rate at which one configuration was trained more than once."""
        return AGGRESSIVE if self.has("repeat_text_perplexity") else GENTLE

    @property
    def spread_of_repetitions(self) -> float:
        """How far repetitions of one configuration differ in the logarithm of the perplexity [nat/token].

        Standard deviation over seeds of A; the published run repeated F once: the difference.
        """
        if self.has("repeat_text_perplexity"):
            again = float(self.variable("repeat_text_perplexity").sel(configuration="F"))
            return abs(float(np.log(again / self.perplexity("F", self.rate_of_repetitions))))
        seeds = self.mean("full_text_loss").sel(rate=self.rate_of_repetitions, configuration="A").dropna("seed")
        if len(seeds) < 3:
            raise NotApplicable(
                f"{len(seeds)} of the three seeds of A that a spread needs were trained on {self.subject}"
            )
        return float(seeds.std("seed", ddof=1))

    def smallest_contrast(self, rate: str = GENTLE) -> float:
        """Smallest difference of two configurations in the logarithm of the perplexity, at one rate [nat/token]."""
        ordered = np.sort([np.log(self.perplexity(name, rate)) for name in self.trained(rate)])
        return float(np.diff(ordered).min())


@dataclass(frozen=True)
class Budget:
    """Which adapters are evaluated, and on how much.

    Attributes:
        gentle, aggressive: configurations at either rate.
        seeds: of the gentle runs; the aggressive ones have seed 0 alone.
        sweep: whether A is evaluated at every rate of the sweep.
        problems: of each split, from the first on; None is all 200.
        text_tokens: completion tokens of unrelated text.
        specimens: name of the set of adapters, for `python -m lab train`.
        batch_tokens: padded tokens per batch.
    """

    gentle: tuple[str, ...]
    aggressive: tuple[str, ...]
    seeds: tuple[int, ...]
    sweep: bool
    problems: int | None
    text_tokens: int
    specimens: str
    batch_tokens: int = 2048


@dataclass(frozen=True)
class Run:
    """One adapter of T-18."""

    configuration: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its specimen."""
        return run_name(self.configuration, self.learning_rate, self.seed)


def runs(budget: Budget, rates: Rates) -> dict[Run, tuple[str | None, bool]]:
    """The adapters that a budget evaluates, each once: its rate's name, if it has one, and whether the sweep has it."""
    gentle = {Run(name, rates.gentle, seed): (GENTLE, False) for seed in budget.seeds for name in budget.gentle}
    aggressive = {Run(name, rates.aggressive, 0): (AGGRESSIVE, False) for name in budget.aggressive}
    found: dict[Run, tuple[str | None, bool]] = {**gentle, **aggressive}
    if budget.sweep:
        found |= {run: (found.get(run, (None,))[0], True) for run in (Run("A", rate, 0) for rate in rates.sweep)}
    return found


def measure(subject: LoadedSubject, corpus: Corpus, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """Evaluate the adapters that were trained on a subject; those that are not here are named, with the command.

    Raises:
        NotApplicable: an adapter that the budget asks for is not here, or no recipe adapts this subject.
    """
    from lab.experiments.surgery.measuring import spectral_peft

    return spectral_peft.measure(subject, corpus, budget, sweep)


ARITHMETIC = Tolerance(1e-3, 1e-6, "float64 arithmetic on stored weights; other kernels move the last digits")
COUNT = Tolerance(0, 0, "a count")
EXPERIMENT = Experiment(
    id="T-18",
    title="Spectral-guided PEFT",
    question="Do weight spectra say which layers and matrices an adapter should change?",
    record=SpectralPeft,
    measure=measure,
    budgets={
        "quick": Budget(
            gentle=("A", "B_matched", "spectral", "inverse", "F", "H"),
            aggressive=("A", "H"),
            seeds=(0,),
            sweep=True,
            problems=16,
            text_tokens=300,
            specimens="spectral-peft",
        ),
        "full": Budget(
            gentle=(
                "A",
                "B",
                "F",
                "H",
                "A_matched",
                "B_matched",
                "spectral",
                "inverse",
                "skip_early",
                "skip_late",
                "early",
                "middle",
            ),
            aggressive=("A", "B", "F", "H", "early", "middle"),
            seeds=(0, 1, 2),
            sweep=True,
            problems=None,
            text_tokens=2000,
            specimens="spectral-peft-full",
            batch_tokens=8192,
        ),
    },
    tolerances={
        "": Tolerance(0.02, 0.02, "bfloat16 losses of single digits move by up to 0.02 nat between kernels"),
        "id_accuracy": Tolerance(0, 0.07, "a near tie between two digits makes a solution right or wrong: 1 of 16"),
        "ood_accuracy": Tolerance(0, 0.07, "a near tie between two digits makes a solution right or wrong: 1 of 16"),
        "trainable_parameters": COUNT,
        "rank": COUNT,
        "rows": COUNT,
        "columns": COUNT,
        "train_loss": Tolerance(0, 0, "recorded when the adapter was trained"),
        "train_seconds": Tolerance(0, float("inf"), "time on whichever machine trained it; no finding"),
        "update_relative_norm": ARITHMETIC,
        "merge_loss": ARITHMETIC,
        "merge_unchanged_fraction": ARITHMETIC,
        "effective_rank_ratio_before": ARITHMETIC,
        "effective_rank_ratio_change": Tolerance(1e-2, 1e-8, "a difference of nearly equal float64 numbers"),
        "subspace_overlap_left": ARITHMETIC,
        "subspace_overlap_right": ARITHMETIC,
    },
    data=(MANIFEST, RECIPES),
    libraries=("peft",),
)
