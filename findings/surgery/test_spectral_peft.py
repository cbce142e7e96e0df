"""T-18 spectral-guided PEFT at the gentle rate: what each configuration learns, keeps, and costs.

A is uniform, B has ranks by phase, F leaves out the bottleneck, H adapts the last layers alone. The published run has
200 problems of either kind: differences below 8 points are within its noise, so nearly every published contrast stands
beside a control that asks whether it could be significant at all. Siblings in nats of the digits of results resolve
more, and compare allocations of equal size, which the source does not.

Measured accuracy asks for every token of a solution, its style included. Claims about it do not apply where style alone
decides: gains in distribution of a model that has no annotated solution right before training, and all of accuracy out
of distribution where no trained configuration writes a plain solution any more. Siblings in nats are not concerned.
"""

import numpy as np
import pytest

from fixtures.claims import claim, not_applicable
from lab.adapters.allocations import Shape, allocation, parameters
from lab.statistics.correlations import spearman_by_order
from lab.statistics.proportions import best_case_p_value, difference_half_width

ORIGINAL = "qwen3-4b-instruct-2507"
SIGNIFICANT = 0.05


def test_spectral_peft_matches_snapshot(spectral_peft, snapshot):
    assert spectral_peft == snapshot


# ---- in distribution, and what is kept


@claim("T-18.1", "published")
def test_every_configuration_improves_in_distribution(spectral_peft):
    """At the gentle rate every configuration solves more problems in distribution than the model before training.

    Published +1.0, +1.5, +3.5 and +1.5 points for A, B, F and H.
    """
    spectral_peft.require_accuracy_of_skill("id")
    assert min(spectral_peft.gain("id", name) for name in spectral_peft.trained()) > 0


@claim("T-18.1b", "control")
def test_an_improvement_is_significant(spectral_peft):
    """At least one configuration's improvement in distribution is significant (exact test, 5 % over all of them).

    The smallest p of several is held to Holm's bound for it, 0.05 over their number. Published p = 0.87, 0.74, 0.29 and
    0.74 by Fisher's test on the counts. Measured p-values are those of seed 0 alone.
    """
    spectral_peft.require_accuracy_of_skill("id")
    trained = spectral_peft.trained()
    improved = [name for name in trained if spectral_peft.gain("id", name) > 0]
    smallest = min((spectral_peft.p_value("id", name) for name in improved), default=1.0)
    assert smallest < SIGNIFICANT / len(trained)


@claim("T-18.1c", "hypothesis")
def test_every_configuration_lowers_the_loss_in_distribution(spectral_peft):
    """At the gentle rate every configuration lowers the loss on the digits of results in distribution.

    Support says whether the interval excludes 0. If it failed, the task would not be learned at all.
    """
    assert max(spectral_peft.delta_nll("id", name) for name in spectral_peft.trained()) < 0


@claim("T-18.2", "published")
def test_no_configuration_forgets(spectral_peft):
    """No configuration loses more than 2 points out of distribution, and none raises the perplexity of other text.

    Published -1.0, +1.5, 0.0, +1.0 points and perplexities of 3.53 to 3.58 against 3.66. These cover template and
    prompt, which hold 96 % of that loss: they say little of completions.
    """
    trained = spectral_peft.trained()
    assert max(spectral_peft.perplexity(name) for name in trained) <= spectral_peft.perplexity()
    spectral_peft.require_accuracy_of_skill("ood")
    assert min(spectral_peft.gain("ood", name) for name in trained) >= -2


@claim("T-18.2b", "control")
def test_two_points_can_be_told_apart(spectral_peft):
    """The problems are enough to tell 2 points of accuracy: half of the 95 % interval of a difference is no wider.

    With 200 problems and 79 % solved it is 8 points.
    """
    share, problems = spectral_peft.accuracy("ood"), spectral_peft.problems("ood")
    assert 100 * difference_half_width(share, share, problems) <= 2


@claim("T-18.2c", "hypothesis")
def test_no_configuration_forgets_in_nats(spectral_peft):
    """At the gentle rate the loss out of distribution rises by at most 0.05 nat, that of other text by 0.02.

    0.02 is the limit by which the gentle rate was chosen for A; the others may exceed it.
    """
    trained = spectral_peft.trained()
    assert max(spectral_peft.delta_nll("ood", name) for name in trained) <= 0.05
    assert max(spectral_peft.text_rise(name) for name in trained) <= 0.02


# ---- the phase-aware allocation


@claim("T-18.3", "published")
def test_phase_aware_ranks_are_best_out_of_distribution(spectral_peft):
    """The phase-aware allocation B solves most problems out of distribution.

    Published 80.5 % against 78.0, 79.0 and 80.0.
    """
    spectral_peft.require_accuracy_of_skill("ood")
    gains = {name: spectral_peft.gain("ood", name) for name in spectral_peft.trained()}
    if "B" not in gains:
        not_applicable("B was not trained at its own budget")
    lead = gains.pop("B") - max(gains.values())
    assert lead > 0


@claim("T-18.3b", "control", on=ORIGINAL)
def test_the_phase_aware_lead_could_be_significant(spectral_peft):
    """B's lead over A out of distribution is significant in the best case, all discordant problems in B's favour.

    McNemar's p = 0.063: no pairing of the published counts makes it so.
    """
    assert best_case_p_value(spectral_peft.right("ood", "B"), spectral_peft.right("ood", "A")) < SIGNIFICANT


@claim("T-18.3c", "control")
def test_phase_aware_ranks_are_better_at_equal_budget(spectral_peft):
    """With as many parameters as A, phase-aware ranks have the lower loss out of distribution.

    The published B has 47 % more parameters than A; only at equal budgets is the allocation tested.
    """
    assert spectral_peft.delta_nll("ood", "B_matched", "A") < 0


@claim("T-18.3d", "control")
def test_phase_aware_ranks_are_better_than_as_many_uniform_ones(spectral_peft):
    """B has a lower loss out of distribution than uniform ranks with as many parameters as B."""
    assert spectral_peft.delta_nll("ood", "B", "A_matched") < 0


@claim("T-18.4", "published")
def test_phase_aware_ranks_beat_uniform_ones(spectral_peft):
    """B solves more than A on both kinds of problems.

    Published +0.5 and +2.5 points.
    """
    assert spectral_peft.gain("id", "B", "A") > 0
    spectral_peft.require_accuracy_of_skill("ood")
    assert spectral_peft.gain("ood", "B", "A") > 0


@claim("T-18.4b", "control")
def test_phase_aware_ranks_beat_uniform_ones_significantly(spectral_peft):
    """B's lead over A is significant on at least one kind of problems (exact test, 5 % over both).

    The smaller p of two is held to Holm's bound for it, 0.025. Published p = 1.0 and 0.62; 80 % power would take 750 to
    1,250 problems. Measured p-values are those of seed 0 alone.
    """
    leads = [split for split in ("id", "ood") if spectral_peft.gain(split, "B", "A") > 0]
    p_values = {split: spectral_peft.p_value(split, "B", "A") for split in leads}
    if p_values.get("id", 1.0) >= SIGNIFICANT / 2:
        spectral_peft.require_accuracy_of_skill("ood")
    assert min(p_values.values(), default=1.0) < SIGNIFICANT / 2


@claim("T-18.4c", "control")
def test_phase_aware_ranks_learn_more_at_equal_budget(spectral_peft):
    """With as many parameters as A, phase-aware ranks have the lower loss in distribution."""
    assert spectral_peft.delta_nll("id", "B_matched", "A") < 0


@claim("T-18.5", "published")
def test_phase_aware_ranks_have_the_lowest_perplexity(spectral_peft):
    """B has the lowest perplexity of other text.

    Published 3.53.
    """
    perplexities = {name: spectral_peft.perplexity(name) for name in spectral_peft.trained()}
    if "B" not in perplexities:
        not_applicable("B was not trained at its own budget")
    own = perplexities.pop("B")
    assert own < min(perplexities.values())


@claim("T-18.5b", "control")
def test_perplexity_says_nothing_beyond_the_number_of_parameters(spectral_peft):
    """The order of the perplexities is not simply that of the parameters: Spearman above -1.

    It is -1 in the published run: 48.5, 33.0, 23.9 and 10.1 million have 3.527, 3.545, 3.559 and 3.580. So the lowest
    perplexity is no evidence for B's allocation.
    """
    trained = spectral_peft.trained()
    sizes = np.array([spectral_peft.trainable(name) for name in trained])
    assert spearman_by_order(sizes, np.array([spectral_peft.perplexity(name) for name in trained])) > -1 + 1e-9


@claim("T-18.5c", "control")
def test_phase_aware_ranks_keep_other_text_at_equal_budget(spectral_peft):
    """With as many parameters as A, phase-aware ranks raise the loss on other text less."""
    assert spectral_peft.text_rise("B_matched") < spectral_peft.text_rise("A")


# ---- budgets


@claim("T-18.6", "published")
def test_phase_aware_ranks_cost_47_percent_more(spectral_peft):
    """B has 47 % more trainable parameters than A.

    Published 48.5 against 33.0 million, 1.468. Models whose matrices have other proportions may differ by a point.
    """
    assert abs(spectral_peft.trainable("B") / spectral_peft.trainable("A") - 1.47) <= 0.01


@claim("T-18.6b", "corrected")
def test_parameters_are_rank_times_in_plus_out(spectral_peft):
    """Every configuration's trainable parameters are the sum of rank times (in + out), to the last one."""
    rows, columns = spectral_peft.variable("rows").values, spectral_peft.variable("columns").values
    cost = np.broadcast_to(rows + columns, (spectral_peft.n_layers, len(rows)))
    scale = 1.0
    if spectral_peft.source == "measured":
        scale = float(spectral_peft.provenance["settings"]["rank_scale"])
    shape = Shape(cost, spectral_peft.effective_rank_ratio.values, scale)
    for name in spectral_peft.configurations:
        assert spectral_peft.trainable(name) == parameters(allocation(name, shape), cost)


@claim("T-18.6c", "control")
@pytest.mark.parametrize("configuration", ["A_matched", "B_matched", "spectral", "inverse"])
def test_matched_budgets_are_equal(spectral_peft, configuration):
    """Configurations that are compared at equal budget have equal numbers of parameters within 0.5 %."""
    reference = "B" if configuration == "A_matched" else "A"
    ratio = spectral_peft.trainable(configuration) / spectral_peft.trainable(reference)
    assert abs(ratio - 1) <= 0.005


# ---- noise and time


@claim("T-18.26", "control")
def test_initialisation_is_no_larger_than_what_is_claimed(spectral_peft):
    """Repetitions of one configuration differ by less than the configurations do, in the logarithm of the perplexity.

    At one and the same rate. The source trained F twice at the aggressive rate, with different initialisations:
    perplexities of 4.85 and 5.13, a difference of 0.056, while A and F differ by 0.048 there. Measured: the standard
    deviation over three seeds of A at the gentle rate.
    """
    smallest = spectral_peft.smallest_contrast(spectral_peft.rate_of_repetitions)
    assert spectral_peft.spread_of_repetitions < smallest


@claim("T-18.27", "published")
def test_training_the_last_layers_is_twice_as_fast(spectral_peft):
    """Training the last layers alone takes about half the time: A takes 1.8 times as long as H, or more.

    Published 145 against 72 seconds, loading included. Timed on a GPU alone: a CPU shares its cores with other work,
    and the runs that are compared are hours apart.
    """
    spectral_peft.require_times_of_its_own()
    assert spectral_peft.train_seconds("A") / spectral_peft.train_seconds("H") >= 1.8


@claim("T-18.27c", "corrected")
def test_training_the_last_layers_is_faster_in_every_run(spectral_peft):
    """Training the last layers alone is faster in every run: A takes 1.5 times as long as H with the same seed.

    The bound of the generalisation, on a GPU. A seed sets the batches, so A and H of one seed read the same text. The
    worst of the seeds and not their mean, which one slow run may carry.
    """
    spectral_peft.require_times_of_its_own()
    whole, last = (spectral_peft.train_seconds_by_seed(name) for name in ("A", "H"))
    assert (whole / last).min() >= 1.5


@claim("T-18.27b", "hypothesis")
def test_keeping_the_frozen_prefix_makes_it_faster_still(spectral_peft):
    """With the output of the layers below the first adapter kept, A takes 2.5 times as long as H, or more.

    H then runs 9 of 30 layers. No run could judge it so far: training here keeps no outputs of the prefix, which its
    records say in `prefix_kept`.
    """
    if not spectral_peft.provenance["settings"].get("prefix_kept"):
        not_applicable("these runs keep nothing of the layers below the first adapter")
    assert spectral_peft.train_seconds("A") / spectral_peft.train_seconds("H") >= 2.5
