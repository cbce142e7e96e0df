"""Known answers of seriation, of searches over orders, and of the measures of what was recovered."""

import itertools

import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import published
from lab.statistics import order_search, orders, seriation

pytestmark = pytest.mark.calibration

permutations = st.integers(2, 20).flatmap(lambda n: st.permutations(range(n)))


# ---- measures


@given(permutations)
def test_tau_is_scipys_and_the_same_for_the_inverse(order):
    order = np.array(order)
    expected = scipy.stats.kendalltau(order, np.arange(len(order))).statistic
    assert orders.kendall_tau(order) == pytest.approx(expected, abs=1e-12)
    assert orders.kendall_tau(orders.positions_of(order)) == orders.kendall_tau(order)
    assert orders.kendall_tau(order[::-1]) == pytest.approx(-expected, abs=1e-12)


@given(permutations, st.data())
def test_an_adjacent_swap_moves_tau_by_two_pairs(order, data):
    at = data.draw(st.integers(0, len(order) - 2))
    swapped = [*order[:at], order[at + 1], order[at], *order[at + 2 :]]
    n = len(order)
    change = orders.kendall_tau(np.array(swapped)) - orders.kendall_tau(np.array(order))
    assert abs(change) == pytest.approx(4 / (n * (n - 1)))


def test_the_identity_is_perfect():
    order = np.arange(9)
    assert (orders.kendall_tau(order), orders.position_accuracy(order), orders.displacements(order).max()) == (1, 1, 0)
    assert np.isnan(orders.kendall_tau(np.arange(1)))


def test_chance_is_that_of_random_orders():
    drawn = np.array([np.random.default_rng(seed).permutation(28) for seed in range(4000)])
    taus, n = orders.kendall_tau(drawn), 28
    assert taus.std() == pytest.approx(orders.chance_deviation(n), rel=0.04)
    assert orders.chance_deviation(n) == pytest.approx(0.134, abs=5e-4)
    assert orders.displacements(drawn).mean() == pytest.approx((n**2 - 1) / (3 * n), rel=0.01)
    assert (np.abs(taus) >= 0.3).mean() == pytest.approx(orders.chance_p_value(0.3, n), abs=0.006)


def test_a_random_chain_turned_by_rising_norms_has_the_oriented_chance_level():
    """Mean 0.108, 95 % below 0.265, for 28 layers whose norms rise with depth."""
    norms = np.arange(28.0)
    paths = [np.random.default_rng(seed).permutation(28).tolist() for seed in range(3000)]
    taus = orders.kendall_tau(np.array([seriation.oriented(path, norms) for path in paths]))
    assert taus.mean() == pytest.approx(0.108, abs=0.006)
    assert np.quantile(taus, 0.95) == pytest.approx(0.265, abs=0.012)


# ---- chains


def planted(n, noise, seed=0):
    """Points on a line in random order: distances |i - j| with noise, and where each slot belongs."""
    generator = np.random.default_rng(seed)
    places = generator.permutation(n)
    distances = np.abs(places[:, None] - places) + noise * np.triu(generator.uniform(size=(n, n)), 1)
    return np.triu(distances, 1) + np.triu(distances, 1).T, places


@settings(deadline=None)
@given(st.integers(4, 14), st.integers(0, 50))
def test_points_on_a_line_are_put_in_line(n, seed):
    distances, places = planted(n, 0.3, seed)
    for path in (seriation.chain(distances), seriation.local_optima(distances, [range(n)])[0][1]):
        assert abs(orders.kendall_tau(places[path])) == 1


@settings(deadline=None, max_examples=40)
@given(st.integers(4, 12), st.integers(0, 1000))
def test_improvement_never_lengthens_a_path(n, seed):
    """Nor does the stronger solver find anything longer than the published one."""
    points = np.random.default_rng(seed).normal(size=(n, 3))
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    start = list(range(n))
    published_chain = seriation.chain(distances)
    for path in (start, published_chain):
        before = seriation.path_length(distances, path)
        assert seriation.path_length(distances, seriation.two_opt(distances, path)) <= before + 1e-9
        stronger = seriation.locally_shortest(distances, path)
        assert sorted(stronger) == start
        assert seriation.path_length(distances, stronger) <= before + 1e-9
    assert seriation.two_opt(distances, start)[0] == 0
    assert seriation.local_optima(distances, [published_chain])[0][0] <= 1e-9 + seriation.path_length(
        distances, published_chain
    )


@settings(deadline=None, max_examples=15)
@given(st.integers(4, 7), st.integers(0, 1000))
def test_the_stronger_solver_finds_the_shortest_of_all_paths(n, seed):
    points = np.random.default_rng(seed).normal(size=(n, 2))
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    shortest = min(seriation.path_length(distances, path) for path in itertools.permutations(range(n)))
    length, path = seriation.local_optima(distances, seriation.starting_paths(distances, 20, 0))[0]
    assert length == pytest.approx(shortest)
    assert length == pytest.approx(seriation.path_length(distances, path))


def test_two_opt_undoes_a_crossing_and_keeps_the_beginning():
    """Reversing 3..1 shortens a line; the beginning is never reversed, which the stronger solver does."""
    line = np.abs(np.subtract.outer(np.arange(6.0), np.arange(6.0)))
    assert seriation.two_opt(line, [0, 3, 2, 1, 4, 5]) == [0, 1, 2, 3, 4, 5]
    assert seriation.two_opt(line, [2, 1, 0, 3, 4, 5]) == [2, 1, 0, 3, 4, 5]
    assert seriation.locally_shortest(line, [2, 1, 0, 3, 4, 5]) in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0])


def test_the_fiedler_order_of_a_line_is_the_line():
    distances, places = planted(12, 0)
    assert abs(orders.kendall_tau(places[seriation.fiedler(distances)])) == 1


def test_a_greedy_path_starts_with_the_loneliest():
    similarity = np.array([[1, 0.9, 0.1], [0.9, 1, 0.5], [0.1, 0.5, 1]])
    assert seriation.most_similar_first(similarity) == [2, 1, 0]


@given(permutations)
def test_rising_norms_are_never_turned_round(order):
    norms = np.arange(len(order), dtype=float)
    assert seriation.oriented(sorted(order), norms) == sorted(order)
    turned = seriation.oriented(order, norms)
    assert turned in (list(order), list(order)[::-1])
    assert scipy.stats.spearmanr(turned, norms).statistic >= -1e-12


def test_wins_order_a_transitive_relation():
    strength = np.random.default_rng(0).permutation(9)
    spreads = np.where(strength[:, None] > strength, 1.0, 2.0)  # the stronger first spreads less
    assert [int(strength[item]) for item in seriation.by_wins(spreads)] == list(range(8, -1, -1))


# ---- searches


class Inversions:
    """A loss that counts inversions; what was tried is counted, too."""

    def __init__(self):
        self.trials = 0

    def loss(self, order):
        return float(orders.inversions(np.array(order)))

    def differences(self, base, trials, margins=0.0):
        self.trials += len(trials)
        return np.array([self.loss(trial) for trial in trials]) - self.loss(base)

    def lowest(self, trials):
        self.trials += len(trials)
        values = np.array([self.loss(trial) for trial in trials])
        return int(values.argmin()), values


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 7).flatmap(lambda n: st.permutations(range(n))))
def test_descents_sort(order):
    n, start = len(order), tuple(order)
    sorted_order = tuple(range(n))
    assert order_search.bubble(Inversions(), start, passes=n - 1, sweeps=0) == sorted_order
    assert order_search.reinsertion(Inversions(), start, passes=n) == sorted_order
    assert order_search.block_descent(Inversions(), start, rounds=n * n) == sorted_order


def published_seed():
    data = published.dataset("layer_shuffle_recovery")
    return tuple(data["recovered_order"].sel({"method": "activation_flow"}).values.tolist())


def test_the_published_seed_needs_one_pass_of_swaps_and_one_of_insertions():
    """Five swaps; 27 trials a pass over neighbours and 351 over other pairs, besides those tried again."""
    neighbours = [order_search.swapped(i, i + 1) for i in range(27)]
    order, swaps = order_search.descend(Inversions(), published_seed(), neighbours)
    assert order == tuple(range(28))
    assert swaps == 5
    assert order_search.reinsertion(Inversions(), published_seed(), passes=1) == tuple(range(28))


def test_trials_ahead_change_no_search():
    """With one trial at a time the same swaps are made: what was tried ahead of an accepted swap is tried again."""

    class Noisy(Inversions):
        def loss(self, order):
            return super().loss(order) + float(np.sin(np.arange(len(order)) * np.array(order)).sum())

    def one_by_one(losses, order, moves):
        made = 0
        for move in moves:
            if losses.differences(order, [move(order)])[0] < -order_search.EPSILON:
                order, made = move(order), made + 1
        return order, made

    moves = [order_search.swapped(i, j) for i, j in itertools.combinations(range(12), 2)]
    for seed in range(8):
        start = tuple(np.random.default_rng(seed).permutation(12).tolist())
        assert order_search.descend(Noisy(), start, moves) == one_by_one(Noisy(), start, moves)
        few = order_search.annealing(Noisy(), start, proposals=200, temperature=3, window=1)
        assert order_search.annealing(Noisy(), start, proposals=200, temperature=3, window=7) == few


def test_annealing_returns_the_lowest_order_that_it_met():
    """Lower than a random beginning, and the beginning itself where that is the optimum."""
    losses = Inversions()
    best = tuple(range(15))
    assert order_search.annealing(losses, best, proposals=200, temperature=5) == best
    for seed in range(5):
        start = tuple(np.random.default_rng(seed).permutation(15).tolist())
        found = order_search.annealing(losses, start, proposals=300, temperature=2, seed=seed)
        assert losses.loss(found) < losses.loss(start)


def test_annealing_accepts_by_metropolis_rule():
    """At a constant rise and a falling temperature, the share of accepted proposals is the mean of exp(-rise / T)."""

    class Rising:
        accepted = 0

        def differences(self, base, trials, margins=0.0):
            taken = np.asarray(margins) > 0.5
            self.accepted += int(taken[0])
            return np.full(len(trials), 0.5)

        def lowest(self, trials):
            raise NotImplementedError

    rising, count = Rising(), 4000
    order_search.annealing(rising, tuple(range(10)), proposals=count, temperature=1.0, window=1)
    temperatures = 1 - np.arange(count) / count
    assert rising.accepted / count == pytest.approx(np.exp(-0.5 / temperatures).mean(), abs=0.03)


def test_construction_appends_the_lowest():
    # All beginnings of one item are ties, and so are those of two after a 3.
    assert order_search.greedy_construction(Inversions(), [3, 1, 0, 2]) == (3, 1, 2, 0)

    class Last(Inversions):
        def loss(self, order):
            return float(order[-1])

    losses = Last()
    assert order_search.greedy_construction(losses, [3, 1, 0, 2]) == (0, 1, 2, 3)
    assert losses.trials == 4 * 5 / 2


def test_blocks_undo_what_single_items_cannot():
    """A loss that a single move never lowers, but the exchange of two blocks does."""

    class Blocks(Inversions):
        def loss(self, order):
            return 0.0 if order == (0, 1, 2, 3) else 1.0 if order == (2, 3, 0, 1) else 2.0

    assert order_search.bubble(Blocks(), (2, 3, 0, 1)) == (2, 3, 0, 1)
    assert order_search.block_descent(Blocks(), (2, 3, 0, 1)) == (0, 1, 2, 3)
    assert order_search.block_descent(Blocks(), (2, 3, 0, 1), largest_block=1) == (2, 3, 0, 1)


class Table(Inversions):
    """Losses of the orders that matter; any other is worse."""

    def __init__(self, known):
        super().__init__()
        self.known = known

    def loss(self, order):
        return self.known.get(order, 9.0)


def test_distant_swaps_reach_both_ends_and_no_further_than_they_may():
    """The first and the last of four items, three apart, have to change places at once."""
    ends, start, home = Table({(3, 1, 2, 0): 1.0, (0, 1, 2, 3): 0.0}), (3, 1, 2, 0), (0, 1, 2, 3)
    assert order_search.bubble(ends, start) == home
    assert order_search.bubble(ends, start, reach=3) == home
    assert order_search.bubble(ends, start, reach=2) == start
    assert order_search.bubble(ends, start, sweeps=0) == start


def test_so_many_passes_and_sweeps_are_made():
    """A pass from left to right takes item 4 one place to the left; a sweep over places two apart is worked out."""
    start = (0, 1, 2, 3, 5, 6, 4)
    fallen = (0, 1, 2, 3, 5, 4, 6)
    assert order_search.bubble(Inversions(), start, passes=1, sweeps=0) == fallen
    assert order_search.bubble(Inversions(), start, passes=2, sweeps=0) == tuple(range(7))
    # (4, 3, 2, 1, 0) -> (2, 3, 4, 1, 0) -> (2, 1, 4, 3, 0) -> (2, 1, 0, 3, 4); the next sweep needs its first swap only
    falling = (4, 3, 2, 1, 0)
    assert order_search.bubble(Inversions(), falling, passes=0, sweeps=1, reach=2) == (2, 1, 0, 3, 4)
    assert order_search.bubble(Inversions(), falling, passes=0, sweeps=None, reach=2) == (0, 1, 2, 3, 4)


def test_proposals_are_near_as_often_as_they_shall_be():
    """At no temperature worth the name nothing is accepted, so that every trial is one swap away from the beginning."""

    class Uphill(Inversions):
        def differences(self, base, trials, margins=0.0):
            for trial in trials:
                i, j = np.flatnonzero(np.array(trial) != np.arange(20))
                distances.append(min(j - i, 20 - (j - i)))
            return np.ones(len(trials))

    for near, expected in ((1.0, [0.5, 0.5, 0]), (0.0, [2 / 19, 2 / 19, 15 / 19]), (0.5, [0.303, 0.303, 0.395])):
        distances: list[int] = []
        order_search.annealing(Uphill(), tuple(range(20)), proposals=3000, temperature=1e-6, near=near)
        shares = [
            np.mean(np.array(distances) == 1),
            np.mean(np.array(distances) == 2),
            np.mean(np.array(distances) > 2),
        ]
        assert shares == pytest.approx(expected, abs=0.03)


def test_blocks_of_different_sizes_are_exchanged():
    """The first of three items belongs to the end: an exchange of one item with a block of two."""
    losses = Table({(2, 0, 1): 1.0, (0, 1, 2): 0.0})
    assert order_search.block_descent(losses, (2, 0, 1)) == (0, 1, 2)
    assert order_search.block_descent(losses, (2, 0, 1), largest_block=1) == (2, 0, 1)


def test_reinsertion_moves_no_further_than_it_may():
    """The last of four items belongs to the beginning, and no move of fewer than three places helps."""
    far, start, home = Table({(1, 2, 3, 0): 1.0, (0, 1, 2, 3): 0.0}), (1, 2, 3, 0), (0, 1, 2, 3)
    assert order_search.reinsertion(far, start, reach=3) == home
    assert order_search.reinsertion(far, start) == home
    assert order_search.reinsertion(far, start, reach=2) == start
    assert order_search.reinsertion(far, start, passes=0) == start


def test_block_descent_leaves_out_what_was_in_vain():
    """Sorting by neighbours: 11 trials, at most two for each of four inversions, and 11 to see that nothing is left.

    Passes over all neighbours take 11 trials for each place that item 3 has to go, and 11 to see it.
    """
    start = (0, 1, 2, 4, 5, 6, 3, 7, 8, 9, 11, 10)
    ours, passes = Inversions(), Inversions()
    assert order_search.block_descent(ours, start, largest_block=1) == tuple(range(12))
    assert order_search.bubble(passes, start, sweeps=0) == tuple(range(12))
    assert ours.trials <= 11 + 2 * 4 + 11
    assert passes.trials >= 4 * 11


@given(st.integers(3, 12), st.data())
def test_moves_are_permutations_with_the_right_ends(n, data):
    i = data.draw(st.integers(0, n - 2))
    j = data.draw(st.integers(i + 1, n - 1))
    order = tuple(range(n))
    swapped, moved = order_search.swapped(i, j)(order), order_search.moved(i, j)(order)
    assert (swapped[i], swapped[j], moved[j]) == (j, i, i)
    assert sorted(swapped) == sorted(moved) == list(order)
    first = data.draw(st.integers(1, n - 1))
    second = data.draw(st.integers(1, n))
    start = data.draw(st.integers(0, n))
    if start + first + second <= n:
        exchanged = order_search.blocks_exchanged(start, first, second)(order)
        assert exchanged[start : start + second] == tuple(range(start + first, start + first + second))
        assert sorted(exchanged) == list(order)


def test_paths_are_shortened_at_their_ends_too():
    """Four points on a line, of which the last two change places."""
    line = np.abs(np.subtract.outer(np.arange(4.0), np.arange(4.0)))
    assert seriation.two_opt(line, [0, 1, 3, 2]) == [0, 1, 2, 3]


def test_points_without_distance_stay_in_order():
    assert seriation.fiedler(np.zeros((3, 3))) == [0, 1, 2]
