"""T-17 contrastive trajectories beside T-7 linearization gap: are the turning layers the nonlinear ones?"""

import numpy as np

from fixtures.claims import claim

#: relative depths of the source's layers 21-23 and 24-35 of 36
TURN, LATE = (21 / 36, 24 / 36), (24 / 36, 1)


@claim("T-17.34", "published")
def test_the_turn_is_nonlinear_and_what_follows_is_consistent(contrastive_trajectories, linearization_gap):
    """Over the layers of the turn the nonlinearity rises, and in the last third Jacobians agree more than before it.

    Published gaps are 0.150, 0.154 and 0.166; consistency 0.840 against 0.802, a small difference.
    """
    record = contrastive_trajectories
    turn, late = record.layers(*TURN), record.layers(*LATE)
    assert np.diff(linearization_gap.rounded_gap.values[turn]).min() > 0
    consistency = linearization_gap.consistency.values
    assert consistency[late].mean() > consistency[: late[0]].mean()
