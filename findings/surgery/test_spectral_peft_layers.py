"""T-18 spectral-guided PEFT by layers: leaving out the bottleneck (F), and adapting the last layers alone (H)."""

import numpy as np
import pytest

from fixtures.claims import claim
from lab.adapters.allocations import ALLOCATIONS, Shape
from lab.experiments.surgery.spectral_peft import PUBLISHED
from lab.statistics.proportions import best_case_p_value

ORIGINAL = "qwen3-4b-instruct-2507"
SIGNIFICANT = 0.05


@claim("T-18.9", "published")
def test_skipping_the_bottleneck_is_best_in_distribution(spectral_peft):
    """F, which leaves out the bottleneck, solves most problems in distribution.

    Published 93.0 %, 3.5 points above the model before training.
    """
    gains = {name: spectral_peft.gain("id", name) for name in spectral_peft.trained()}
    lead = gains.pop("F") - max(gains.values())
    assert lead > 0


@claim("T-18.9b", "control", on=ORIGINAL)
def test_the_lead_of_skipping_could_be_significant(spectral_peft):
    """F's gain in distribution is significant in the best case, corrected for four comparisons.

    McNemar's p = 0.016 against 0.05 / 4, Holm's bound for the smallest of four.
    """
    right, before = spectral_peft.right("id", "F"), spectral_peft.right("id")
    assert best_case_p_value(right, before) < SIGNIFICANT / len(PUBLISHED)


@claim("T-18.9c", "control", on=ORIGINAL)
def test_the_lead_of_skipping_over_uniform_could_be_significant(spectral_peft):
    """F's lead over A in distribution is significant in the best case (McNemar, 5 %): p = 0.063 it is not."""
    assert best_case_p_value(spectral_peft.right("id", "F"), spectral_peft.right("id", "A")) < SIGNIFICANT


@claim("T-18.9d", "control")
@pytest.mark.parametrize("other", ["skip_early", "skip_late"])
def test_skipping_the_bottleneck_beats_skipping_elsewhere(spectral_peft, other):
    """F has a lower loss in distribution than adapters that leave out as many layers elsewhere.

    Of equal size by construction: only this says that the bottleneck is the right block to leave out.
    """
    assert spectral_peft.delta_nll("id", "F", other) < 0


@claim("T-18.10", "published")
def test_skipping_the_bottleneck_keeps_the_rest_exactly(spectral_peft):
    """F solves exactly as many problems out of distribution as the model before training.

    Published 158 of 200 both.
    """
    spectral_peft.require_accuracy_of_skill("ood")
    assert spectral_peft.gain("ood", "F") == 0


@claim("T-18.10b", "hypothesis")
def test_skipping_the_bottleneck_keeps_the_rest_in_nats(spectral_peft):
    """F changes the loss out of distribution by at most 0.02 nat."""
    assert abs(spectral_peft.delta_nll("ood", "F")) <= 0.02


@claim("T-18.11", "published")
def test_the_last_layers_alone_reach_the_others(spectral_peft):
    """H solves at least as much as A on both kinds of problems, with 3.3 times fewer parameters.

    Published 91.0 and 80.0 against 90.5 and 78.0 %; 33.0 / 10.1 million = 3.27. In other models H has 30 % of the
    layers, a ratio of 3.0 to 3.6.
    """
    assert spectral_peft.gain("id", "H", "A") >= 0
    spectral_peft.require_accuracy_of_skill("ood")
    assert spectral_peft.gain("ood", "H", "A") >= 0
    assert 3.0 <= spectral_peft.trainable("A") / spectral_peft.trainable("H") <= 3.6


@claim("T-18.11b", "control")
@pytest.mark.parametrize("other", ["early", "middle"])
def test_the_last_layers_learn_more_than_as_many_others(spectral_peft, other):
    """H has a lower loss in distribution than adapters of as many layers at other depths."""
    assert spectral_peft.delta_nll("id", "H", other) < 0


@claim("T-18.11c", "hypothesis")
def test_the_last_layers_alone_learn_half(spectral_peft):
    """H lowers the loss in distribution by at least half of what A does."""
    assert spectral_peft.delta_nll("id", "H") <= 0.5 * spectral_peft.delta_nll("id", "A") < 0


@claim("T-18.12", "published")
def test_the_last_layers_have_80_percent_of_the_benefit(spectral_peft):
    """H has 80 % of A's benefit at 20 % of its cost.

    The benefit is the fall of the perplexity, 69 % in the published run; the cost 31 % of A, or 21 % of B. Gains in
    accuracy are 150 and 100 %, within noise.
    """
    assert spectral_peft.perplexity_benefit >= 0.8
    assert spectral_peft.trainable("H") / spectral_peft.trainable("A") <= 0.2


@claim("T-18.12b", "corrected", on=ORIGINAL)
def test_the_last_layers_have_69_percent_of_the_benefit(spectral_peft):
    """H has 69 % of A's benefit, the fall of the perplexity, at 31 % of its cost."""
    assert abs(spectral_peft.perplexity_benefit - 0.69) <= 0.005
    assert abs(spectral_peft.trainable("H") / spectral_peft.trainable("A") - 0.31) <= 0.005


@claim("T-18.23", "hypothesis")
def test_skipping_the_bottleneck_hurts_out_of_distribution(spectral_peft):
    """Skipping the bottleneck costs less than 2 points in distribution and more than 5 out of it. A prediction.

    The source's plan predicts it; its motivation predicts the opposite. A - F is -0.5 and -1.0 points, and -4.0 on
    SVAMP in the first run.
    """
    assert spectral_peft.gain("id", "A", "F") < 2
    spectral_peft.require_accuracy_of_skill("ood")
    assert spectral_peft.gain("ood", "A", "F") > 5


@claim("T-18.23b", "hypothesis")
def test_skipping_the_bottleneck_raises_the_loss_out_of_distribution(spectral_peft):
    """F has a higher loss out of distribution than A. The prediction in nats."""
    assert spectral_peft.delta_nll("ood", "F", "A") > 0


@claim("T-18.24", "hypothesis")
def test_the_last_layers_alone_fail_out_of_distribution(spectral_peft):
    """Adapting the last layers alone costs more than 5 points out of distribution against A. A prediction.

    A - H is -2.0 points, -18.5 at the aggressive rate, -4.5 on SVAMP.
    """
    spectral_peft.require_accuracy_of_skill("ood")
    assert spectral_peft.gain("ood", "A", "H") > 5


@claim("T-18.24b", "hypothesis")
def test_the_last_layers_alone_raise_the_loss_out_of_distribution(spectral_peft):
    """H has a higher loss out of distribution than A. The prediction in nats."""
    assert spectral_peft.delta_nll("ood", "H", "A") > 0


@claim("T-18.25", "published")
def test_the_last_layers_build_the_final_state(spectral_peft, residual_geometry):
    """The layers that H adapts, the last 30 % of depth, build at least 90 % of the final state.

    Shares of the final norm along the final state (T-4), 0.902 in the original.
    """
    n = residual_geometry.n_layers
    ranks = ALLOCATIONS["H"](Shape(np.ones((n, 1))))[:, 0]
    first = int(np.flatnonzero(ranks)[0])
    assert residual_geometry.final_share(first, n - 1) >= 0.9
