"""Layer shuffle recovery: can the order of shuffled decoder layers be told from weights, random input, or the loss?

Slots hold the layers in a random order, and a method sees slots only. It returns an order of slots, which is judged by
the layers that they hold:

    tau = 1 - 4 inversions / (L (L - 1)),    (1 + tau) / 2 = share of layer pairs in the right order.

Nine published methods read parameters or the layers' response to random input, four minimise the loss of calibration
text; two are ours: sorting by norm, the baseline that the direction of every chain already uses, and block descent.
Losses are those of layer programs: each layer keeps its own mask and rotary embedding wherever it runs.

A run has a shuffle, random input, calibration text and random proposals of its own; methods that read parameters only
give the same order in every run, but for exact ties. What needs a beginning starts from the chain of lowest loss, in
the direction of lower loss: a blind choice. (The source started from the chain that was nearest to the truth.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import xarray as xr

from lab.errors import NotApplicable
from lab.experiments import Experiment, Tolerance
from lab.statistics.correlations import spearman_by_order
from lab.statistics.recovered_orders import RecoveredOrders

if TYPE_CHECKING:
    from lab.corpora.corpus import Corpus
    from lab.store import Sweep
    from lab.subjects.loading import LoadedSubject

WEIGHT_METHODS = (
    "weight_stats_continuity",
    "svd_spectrum",
    "layernorm_progression",
    "tsp_full_weights",
    "greedy_cosine",
    "fiedler_spectral",
    "ensemble_rank",
)
PROBE_METHODS = ("activation_flow", "causal_pairwise")
LOSS_METHODS = ("greedy_perplexity", "pairwise_bubble", "simulated_annealing", "remove_reinsert")
PUBLISHED_METHODS = (*WEIGHT_METHODS, *PROBE_METHODS, *LOSS_METHODS)
METHODS = (*PUBLISHED_METHODS, "sort_by_norm", "block_descent")
#: the four chains whose mean position the ensemble takes
ENSEMBLE = ("weight_stats_continuity", "svd_spectrum", "tsp_full_weights", "layernorm_progression")
#: methods that build a path through a matrix of distances
CHAINS = (*ENSEMBLE, "activation_flow")
#: methods turned round, where need be, so that norms rise
ORIENTED = (*(method for method in WEIGHT_METHODS if method != "ensemble_rank"), *PROBE_METHODS)
SEEDED = ("pairwise_bubble", "simulated_annealing", "remove_reinsert", "block_descent")
VARIANTS = ("gains_by_cosine", "query_spectrum", "standardised_statistics")
#: orders whose losses are compared on the same text
CONTENDERS = ("true_order", "seed", *LOSS_METHODS, "block_descent")

PLATEAU_RATIO = 1.1  #: largest over smallest norm of a plateau
FEWEST_IN_BLOCK = 5  #: layers, below which tau within a block is noise: chance alone gives it a deviation of 0.41


class LayerShuffleRecovery(RecoveredOrders):
    """Orders that each method recovered, what they cost, and the losses that decide.

    Dimensions: `method`, `seed` (a run), `layer` (L), `position`, `contender`, `neighbour` (a layer exchanged with the
    next), `prompt` (of the held-out text). Published figures are one run.
    """

    sampling: ClassVar = {"seed": None, "prompt": "scored_tokens"}
    profiles: ClassVar = ("tau", "exact_share", "neighbour_delta")

    # ---- weight norms

    @property
    def layer_norm(self) -> np.ndarray:
        """Euclidean norm of all parameters of each layer [layer]."""
        return self.variable("layer_norm").values

    @cached_property
    def norm_rise(self) -> float:
        """Spearman's correlation of depth and norm: whether a chain may be turned by it."""
        return spearman_by_order(np.arange(len(self.layer_norm)), self.layer_norm)

    @cached_property
    def plateau(self) -> range:
        """The longest run of layers whose norms differ by less than a tenth; of equals the first.

        In the published record layers 0 to 16, as the source's text has it.
        """
        if self.source == "published":
            return range(17)
        return plateau(self.layer_norm)

    def within_plateau(self, method: str) -> float:
        """Tau among the layers of the plateau, mean over runs.

        Raises:
            NotApplicable: the plateau has too few layers.
        """
        return self._within("kendall_tau_early", method, len(self.plateau), "in")

    def beyond_plateau(self, method: str) -> float:
        """Tau among the layers after the plateau, mean over runs.

        Raises:
            NotApplicable: too few layers come after it.
        """
        return self._within("kendall_tau_late", method, self.n_layers - self.plateau.stop, "after")

    def _within(self, name: str, method: str, layers: int, where: str) -> float:
        if layers < FEWEST_IN_BLOCK:
            raise NotApplicable(f"{self.subject} has {layers} layers {where} the plateau of norms")
        return self.of(name, method)

    # ---- losses and what they cost

    @property
    def seed_tau(self) -> np.ndarray:
        """Tau of the order from which searches began [seed]; in the published record that of the fingerprint chain."""
        if not self.has("seed_kendall_tau"):
            return self.runs("kendall_tau", "activation_flow")
        return self.chosen_seed_tau("blind")

    def chosen_seed_tau(self, selection: str) -> np.ndarray:
        """Tau of the chain of lowest loss (`blind`) and of the one nearest to the truth (`oracle`) [seed]."""
        return np.atleast_1d(self.variable("seed_kendall_tau").sel(selection=selection).values)

    @cached_property
    def best_candidate_tau(self) -> np.ndarray:
        """|tau| of the chain nearest to the truth in either direction [seed]: the best beginning that there was.

        The `oracle` takes chains as norms turn them, and its best may run backwards as a whole.
        """
        candidates = (*WEIGHT_METHODS, *PROBE_METHODS)
        best: np.ndarray = np.max([np.abs(self.runs("kendall_tau", method)) for method in candidates], axis=0)
        return best

    def extra_inversions(self, method: str) -> np.ndarray:
        """How many pairs more than its seed a search left in the wrong order [seed]; negative is better."""
        pairs = self.n_layers * (self.n_layers - 1) / 2
        found: np.ndarray = np.round((self.seed_tau - self.runs("kendall_tau", method)) * pairs / 2)
        return found

    def against_its_direction(self, method: str) -> np.ndarray:
        """Which pairs a method put against its own direction [seed, layer, layer], the lower layer first.

        Of a chain that runs backwards as a whole (tau below 0) nearly all pairs are inverted, and its errors are those
        that are not.
        """
        backwards = self.runs("kendall_tau", method) < 0
        errors: np.ndarray = np.triu(self.inverted(method) ^ backwards[:, None, None], k=1)
        return errors

    # ---- what a budget lets searches find

    def require_whole_searches(self) -> None:
        """Raise NotApplicable where the budget cuts sweeps short, or how far layers are moved."""
        sweeps, reach = (self.settings.get(name) for name in ("bubble_sweeps", "reach"))
        if sweeps is not None or reach is not None:
            raise NotApplicable(f"searches are cut short: bubble_sweeps {sweeps}, reach {reach}")

    def require_calibration_tokens(self, at_least: int) -> None:
        """Raise NotApplicable where losses of fewer tokens decide."""
        stages = self.settings.get("stages")
        tokens = at_least if stages is None else sum(texts * each for texts, each in stages)
        if tokens < at_least:
            raise NotApplicable(f"{tokens} tokens decide here: too few to tell neighbours apart, {at_least} are needed")

    def require_passes_from_anywhere(self) -> None:
        """Raise NotApplicable where swaps from a random order have fewer passes than the worst order needs, L - 1."""
        passes, needed = self.settings.get("random_passes"), self.n_layers - 1
        if passes is not None and passes < needed:
            raise NotApplicable(
                f"{passes} adjacent passes do not sort a random order whatever the loss says: {needed} would be needed"
            )

    # ---- what searches made of their beginnings

    def from_good_seeds(self, method: str, at_least: float) -> np.ndarray:
        """Tau of a search in the runs that began at `at_least` or better [run].

        Raises:
            NotApplicable: no run did.
        """
        good = self.seed_tau >= at_least
        if not good.any():
            raise NotApplicable(f"no run on {self.subject} began at a tau of {at_least}")
        return self.runs("kendall_tau", method)[good]

    def calibration_loss(self, contender: str) -> np.ndarray:
        """Loss of an order on the text that decided about it [seed], nat/token."""
        return np.atleast_1d(self.variable("calibration_loss").sel(contender=contender).values)

    def contender_tau(self, contender: str) -> np.ndarray:
        """Tau of an order whose loss was compared [seed]."""
        if contender == "true_order":
            return np.ones(len(self.seed_tau))
        return self.seed_tau if contender == "seed" else self.runs("kendall_tau", contender)

    @cached_property
    def heldout_losses(self) -> np.ndarray:
        """Loss of each of CONTENDERS on text that no search has read, in every run [contender, seed], nat/token.

        The true order's is the same in all runs.
        """
        losses = self.variable("heldout_loss").transpose("contender", ..., missing_dims="ignore")
        values: np.ndarray = losses.values
        if "prompt" in losses.dims:
            tokens = self.data["scored_tokens"].values
            values = (losses.transpose(..., "prompt").values * tokens).sum(-1) / tokens.sum()
        return values.reshape(len(values), -1)

    @cached_property
    def annealing_ended_lower(self) -> np.ndarray:
        """Whether annealing returned an order of lower loss, on its own text, than the one that it began with [seed].

        Where no losses were published, the algorithm tells: it returns the order of lowest loss that it met, so any
        other order than the first one has a lower loss.
        """
        if self.has("annealing_end_loss"):
            return np.atleast_1d((self.data["annealing_end_loss"] < self.data["annealing_start_loss"]).values)
        moved: np.ndarray = (self.orders("simulated_annealing") != self.orders("activation_flow")).any(axis=1)
        return moved

    @cached_property
    def neighbour_delta(self) -> xr.DataArray:
        """Rise of the held-out loss with a layer and the next exchanged [neighbour], nat/token."""
        return self.mean("neighbour_swap_delta")

    @cached_property
    def neighbour_z(self) -> np.ndarray:
        """That rise over its standard error, with prompts as clusters [neighbour]."""
        rises = self.variable("neighbour_swap_delta").transpose("neighbour", "prompt").values
        tokens = self.data["scored_tokens"].values
        off = (rises - self.neighbour_delta.values[:, None]) * tokens
        n = len(tokens)
        error = np.sqrt(n / (n - 1) * (off**2).sum(1)) / float(tokens.sum())
        with np.errstate(divide="ignore", invalid="ignore"):  # prompts that agree to the last digit
            z: np.ndarray = self.neighbour_delta.values / error
        return z

    @cached_property
    def turned_by_loss(self) -> dict[str, np.ndarray]:
        """Tau of each chain in its direction of lower loss [seed], by method."""
        losses = self.variable("candidate_loss").transpose("candidate", "direction", ...).values
        kept = (losses[:, 0] <= losses[:, 1]).reshape(len(losses), -1)
        names = [str(name) for name in self.data["candidate"].values]
        return {
            name: np.where(keep, 1, -1) * self.runs("kendall_tau", name) for name, keep in zip(names, kept, strict=True)
        }

    def along_chain(self, name: str, method: str) -> np.ndarray:
        """A variable [chain] of one chain in every run [seed]."""
        values: np.ndarray = np.atleast_1d(self.variable(name).sel(chain=method).values)
        return values

    # ---- counts

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the measurement, or of the published run."""
        return dict(self.provenance["settings"])

    def stated(self, section: str) -> dict[str, Any]:
        """What the source states of one of its parts, e.g. `greedy_perplexity`.

        Raises:
            NotApplicable: the record is not the source's.
        """
        if section not in self.settings:
            raise NotApplicable(f"the {self.source} record of {self.subject} states nothing of {section}")
        return dict(self.settings[section])

    @property
    def matrix_parameters(self) -> int:
        """Entries of the matrices of a gated decoder layer, counted from the configuration."""
        of = self.settings
        width, head = of["hidden_size"], of["head_dim"]
        attention = 2 * width * head * (of["num_attention_heads"] + of["num_key_value_heads"])
        return int(attention + 3 * width * of["intermediate_size"])


def plateau(norms: np.ndarray) -> range:
    """The longest run of entries [n] whose largest is below 1.1 times their smallest; of equals the first."""
    best = range(0)
    for start in range(len(norms)):
        stop = start
        while stop < len(norms) and norms[start : stop + 1].max() < PLATEAU_RATIO * norms[start : stop + 1].min():
            stop += 1
        best = max(best, range(start, stop), key=len)
    return best


# ---- measuring


@dataclass(frozen=True)
class Budget:
    """How many runs there are, what they read, and how far searches go.

    Calibration text is what the source reads: the user's words and the model's own completion without a template,
    cut to some tokens, every token scored. (The first token of the prompt stays, for attention rests on it.)

    Attributes:
        seeds: runs; run k shuffles with the generator 42 + k, draws random input from 42 + 100 k on, anneals with
            42 + k, and reads texts of its own.
        stages: (texts, tokens per text) that a trial is read on, one stage after the other.
        z: standard errors above its margin at which a trial is given up; see `lab.residual.order_losses`.
        small_stages: the first so many stages are the text of construction and annealing, for which the source too
            took less, of swaps from a random order, and of the choice of a beginning.
        proposals: of annealing.
        bubble_sweeps: over pairs of positions that are not neighbours, at most; None until nothing improves.
        reinsertion_passes: at most.
        random_passes: adjacent passes from a random order; None starts no search there.
        reach: how far insertions move a layer, and swaps of the sweeps exchange two; None is any distance.
        largest_block: layers in a block that block descent moves.
        heldout_texts: texts that no search reads, the first of the corpus.
        heldout_tokens: tokens of each.
        seed_selection: `blind`, the chain of lowest loss, or `oracle`, the chain of highest tau, as in the source.
        head_dtype: precision of the vocabulary projection.
    """

    seeds: int
    stages: tuple[tuple[int, int], ...]
    z: float
    small_stages: int
    proposals: int
    bubble_sweeps: int | None
    reinsertion_passes: int
    random_passes: int | None
    reach: int | None
    largest_block: int
    heldout_texts: int
    heldout_tokens: int
    seed_selection: Literal["blind", "oracle"] = "blind"
    head_dtype: str = "bfloat16"


def measure(subject: LoadedSubject, corpus: Corpus, budget: Budget, sweep: Sweep) -> xr.Dataset:
    """Shuffle the layers, let every method recover their order, and compare the orders' losses on held-out text."""
    from lab.experiments.layers.measuring import layer_shuffle_recovery

    return layer_shuffle_recovery.measure(subject, corpus, budget, sweep)


# Seven minutes of CPU time on a busy AVX2 core on SmolLM2, where the source's searches, a forward pass per trial, would
# take 16 hours for one run. Reduced are: text (50 tokens decide, 19 about what is hopeless, and
# about all that construction and annealing try), so that neighbours which cost little to exchange may stay exchanged,
# and a tau of exactly 1 has little support; annealing, to 40 proposals; sweeps and insertions, to one pass and 2
# positions, which the errors of a bad seed outlive; blocks, to two layers. Claims that would judge these bounds do not
# apply. Held-out text is 8 beginnings of 24 tokens: little for neighbours that are cheap to exchange. Nothing starts
# from a random order: a few passes from there could reach no high tau whatever the loss said. An interval over three
# runs is their range.
QUICK = Budget(
    seeds=3,
    stages=((1, 20), (1, 32)),
    z=1,
    small_stages=1,
    proposals=40,
    bubble_sweeps=1,
    reinsertion_passes=1,
    random_passes=None,
    reach=2,
    largest_block=2,
    heldout_texts=8,
    heldout_tokens=24,
)
FULL = Budget(
    seeds=5,
    stages=((2, 64), (5, 128)),
    z=6,
    small_stages=1,
    proposals=1500,
    bubble_sweeps=None,
    reinsertion_passes=3,
    random_passes=5,
    reach=None,
    largest_block=6,
    heldout_texts=12,
    heldout_tokens=128,
)
ANY = float("inf")
LOSS = Tolerance(
    0.02, 0.05, "other kernels moved T-2's losses by 1 % (AVX2 for AVX-512); a rise is a difference of two"
)
PATH = Tolerance(0.1, 0.1, "searches choose between near ties: with other kernels one run of three may end elsewhere")
COUNT = Tolerance(0.4, 5, "how often a search tries again hangs on near ties; a fault of racing costs a factor")
TIME = Tolerance(0, ANY, "seconds are the machine's")
WEIGHTS = Tolerance(1e-4, 1e-6, "weights alone decide; sums of float64 in another order")
TOLERANCES = {
    "": LOSS,
    "recovered_position": Tolerance(0, ANY, "a choice between near ties; measures of the orders are held"),
    **dict.fromkeys(("kendall_tau", "kendall_tau_early", "kendall_tau_late", "seed_kendall_tau"), PATH),
    "position_accuracy": Tolerance(0, 0.25, "one early layer out of place shifts all others by one"),
    "inversions": Tolerance(0.2, 20, "a tenth of tau is 22 of 435 pairs of 30 layers"),
    "mean_displacement": Tolerance(0.2, 1, "a tenth of tau is about one position"),
    "max_displacement": Tolerance(0.2, 4, "one layer put elsewhere moves it; other measures are held closer"),
    "random_start_tau": Tolerance(0, 0.2, "from a random order all ways part; chance deviates by 0.13"),
    **dict.fromkeys(("trial_orders", "layer_passes", "head_passes"), COUNT),
    **dict.fromkeys(("wall_time", "choice_wall_time", "extraction_time"), TIME),
    **dict.fromkeys(("calibration_loss", "heldout_loss", "annealing_end_loss"), PATH),
    "candidate_loss": Tolerance(0.05, 0.1, "other kernels moved losses of T-3's most broken orders by up to 3 %"),
    **dict.fromkeys(("layer_norm", "matrix_norm", "norm_gain_energy_share"), WEIGHTS),
    **dict.fromkeys(("feature_size", "parameters_per_layer", "parameters_total"), Tolerance(0, 0, "a count")),
    "near_optimal_tau": Tolerance(0, 0.1, "another local optimum may come within 1 % of the best"),
    "direction_agreement": Tolerance(0, 0.02, "bfloat16 spreads of a few pairs are nearly equal"),
}
EXPERIMENT = Experiment(
    id="LSR",
    title="Layer shuffle recovery",
    question="Can the order of shuffled decoder layers be recovered from weights, random input, or the loss?",
    record=LayerShuffleRecovery,
    measure=measure,
    budgets={"quick": QUICK, "full": FULL},
    tolerances=TOLERANCES,
)
