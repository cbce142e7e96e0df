"""Claims outside pytest: what their asserts compared, and what the decorator refuses."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from fixtures.assertions import Predicate, Refuted, decisive
from fixtures.claims import claim, claim_of, not_applicable
from fixtures.collection import exact_keywords
from fixtures.support import FRAGILE, support
from fixtures.values import plain, show
from fixtures.verdicts import is_unsettled, judge, outcome
from lab.errors import NotApplicable
from lab.records import Record

pytestmark = pytest.mark.calibration


# ---- predicates whose comparisons are known


def chained(x):
    assert 1 <= x < 3


def threshold_first(x):
    assert x > 2


def several(x):
    assert x > 0
    assert x < 10 and x != 5  # noqa: PT018


def listed(x):
    assert x == [1, 2]


def contained(x):
    assert 6 in x


def of_sets(x):
    assert {1} <= x


def truth(x):
    assert x


def negated(x):
    assert not x > 1


def explained(x):
    assert x > 1, f"x is {x}"


def in_a_loop(x):
    for value in x:
        assert value > 0


def scalar(x):
    assert x.mean() >= 0.5


@pytest.mark.parametrize(
    ("function", "argument", "measured", "threshold"),
    [
        (chained, 2, 2, "in [1, 3)"),
        (threshold_first, 3, 3, "> 2"),
        (several, 9, 9, "< 10"),
        (listed, [1, 2], [1, 2], "== [1, 2]"),
        (contained, [5, 6], [5, 6], "contains 6"),
        (of_sets, {2, 1}, [1, 2], ">= [1]"),
        (truth, 7, 7, "true"),
        (negated, 1, True, "true"),
        (explained, 2.0000001, 2.0, "> 1"),
        (in_a_loop, [3, 1, 2], 1, "> 0"),
        (scalar, xr.DataArray([0.25, 1.0]), 0.625, ">= 0.5"),
    ],
)
def test_measured_value_and_threshold_of_a_claim_that_holds(function, argument, measured, threshold):
    comparison = decisive(Predicate(function)({"x": argument}))
    assert (comparison.measured, comparison.threshold, comparison.holds) == (measured, threshold, True)


@pytest.mark.parametrize(
    ("function", "argument", "measured"),
    [
        (chained, 3, 3),
        (chained, float("nan"), "nan"),
        (threshold_first, 2, 2),
        (several, 11, 11),
        (listed, [2, 1], [2, 1]),
        (contained, [5], [5]),
        (of_sets, {2}, [2]),
        (truth, 0, 0),
        (negated, 2, False),
        (in_a_loop, [3, -1, 2], -1),
        (scalar, xr.DataArray([0.25, 0.5]), 0.375),
    ],
)
def test_the_failed_comparison_is_the_decisive_one(function, argument, measured):
    predicate = Predicate(function)
    with pytest.raises(Refuted):
        predicate({"x": argument})
    comparison = decisive(predicate.last)
    assert (comparison.measured, comparison.holds) == (measured, False)


@pytest.mark.parametrize(
    "function", [chained, threshold_first, several, listed, contained, of_sets, truth, negated, explained]
)
@pytest.mark.parametrize("argument", [-1, 0, 1, 2, 3, 5, 9, 10, [1, 2], [6], {1, 6}, []], ids=repr)
def test_compiled_claims_decide_as_python_does(function, argument):
    def result(call):
        try:
            call()
        except Exception as error:
            return "refuted" if isinstance(error, AssertionError) else type(error)
        return "holds"

    assert result(lambda: Predicate(function)({"x": argument})) == result(lambda: function(argument))


def test_an_assert_message_reaches_the_error():
    with pytest.raises(Refuted, match="x is 0"):
        Predicate(explained)({"x": 0})


def test_labels_that_differ_are_no_common_labels():
    """xarray would compare the one layer that both profiles have."""

    def claim(one, other):
        assert (one - other).max() < 1

    profiles = {
        "one": xr.DataArray([0.0, 9.0], {"layer": [0, 1]}),
        "other": xr.DataArray([0.0, 0.0], {"layer": [0, 2]}),
    }
    with pytest.raises(ValueError, match="layer"):
        Predicate(claim)(profiles)
    assert len(profiles["one"] - profiles["other"]) == 1


def test_single_numbers_compare_as_xarray_has_it():
    """In their own precision, labels or not."""
    number = xr.DataArray(np.float32(0.1), {"layer": 3})

    def claim(found):
        assert found == 0.1
        assert 0.1 <= found < np.float32(0.2)

    compared = Predicate(claim)({"found": number})
    assert compared[0].operands[0] is number
    assert all(comparison.holds for comparison in compared)
    assert bool(number == 0.1)


def test_tracebacks_point_at_the_claim():
    with pytest.raises(Refuted) as caught:
        Predicate(in_a_loop)({"x": [-1]})
    entry = next(entry for entry in caught.traceback if entry.name == "in_a_loop")
    assert entry.path == Path(__file__)
    assert entry.lineno + 1 == inspect.getsourcelines(in_a_loop)[1] + 2


def test_closures_and_defaults_survive():
    limit = 3

    def closed(x, more=1):
        assert x + more < limit

    assert decisive(Predicate(closed)({"x": 1})).measured == 2
    with pytest.raises(Refuted):
        Predicate(closed)({"x": 2})


# ---- the decorator


def test_the_statement_is_the_docstrings_first_line():
    @claim("T-2.1b", "corrected", on="famous")
    def test_something(record):
        """It holds.

        And here is why.
        """

    made = claim_of(test_something)
    assert (made.id, made.kind, made.on, made.statement) == ("T-2.1b", "corrected", "famous", "It holds.")
    assert made.families == {"T-2.1b", "T-2.1", "T-2"}


def documented(record):
    """It holds."""


def undocumented(record):
    pass


@pytest.mark.parametrize(
    ("function", "id", "kind", "complaint"),
    [
        (undocumented, "T-2.1", "published", "T-2.1: the first line of the docstring"),
        (
            documented,
            "T-2.1",
            "proven",
            "T-2.1: unknown kind 'proven'; one of published, corrected,",
        ),
        (documented, "two", "published", "'two': an id reads like"),
    ],
)
def test_incomplete_claims_are_refused(function, id, kind, complaint):
    with pytest.raises(TypeError, match=complaint):
        claim(id, kind)(function)


def test_k_expressions_keep_what_is_no_claim_id():
    expression = "T-2.1 and not (T-10a.4b or gemma-3-270m) or layer_knockout or smollm2-135m-instruct-L07"
    exact = exact_keywords(expression)
    assert exact == expression.replace("T-2.1", "claim:T-2.1:").replace("T-10a.4b", "claim:T-10a.4b:")
    assert exact_keywords(exact) == exact


# ---- verdicts


def judged(body):
    @claim("T-2.1", "published")
    def test_body(record):
        """It holds."""
        body(record)

    return judge(claim_of(test_body), {"record": 3})


def test_judging():
    def inapplicable(record):
        not_applicable("no such layer")

    def helper_fails(record):
        np.testing.assert_allclose(record, 4)

    assert judged(lambda record: None).verdict == "holds"
    assert judged(helper_fails).verdict == "refuted"
    assert judged(inapplicable).verdict == "not applicable"
    assert judged(inapplicable).reason == "no such layer"
    with pytest.raises(KeyError):
        judged(lambda record: {}[record])


@pytest.mark.parametrize("verdict", ["holds", "refuted", "not applicable"])
@pytest.mark.parametrize("recorded", ["holds", "refuted", "not applicable", None])
def test_updating_never_drifts(recorded, verdict):
    expected = {"holds": "pass", "refuted": "xfail", "not applicable": "skip"}[verdict]
    assert outcome(recorded, verdict, updating=True) == expected
    same = recorded == verdict
    assert (outcome(recorded, verdict, updating=False) == "drift") == (recorded is not None and not same)


@pytest.mark.parametrize("verdict", ["holds", "refuted"])
@pytest.mark.parametrize("recorded", ["holds", "refuted", None])
def test_a_verdict_that_support_does_not_settle_may_turn(recorded, verdict):
    """Only where the snapshot has a verdict: on a new model a failure stays the answer."""
    expected = {"holds": "pass", "refuted": "fail" if recorded is None else "xfail"}[verdict]
    assert outcome(recorded, verdict, updating=False, unsettled=True) == expected


@pytest.mark.parametrize(
    ("recorded", "now", "unsettled"),
    [
        (0.43, 0.61, True),
        (0.06, 0.94, True),
        (0.05, 0.5, False),
        (0.5, 0.95, False),
        (1.0, 0.0, False),
        (0.6, 0.0, False),
        (None, 0.5, False),
        (0.5, None, False),
    ],
)
def test_support_settles_a_verdict_unless_it_is_between_the_bounds_twice(recorded, now, unsettled):
    assert is_unsettled(recorded, now) == unsettled


@pytest.mark.parametrize(
    ("value", "json", "text"),
    [
        (1 / 3, 0.333333, "0.3333"),
        (np.float32(2.5), 2.5, "2.5"),
        (np.int64(3), 3, "3"),
        (xr.DataArray(1e-9), 1e-9, "1e-09"),
        (float("inf"), "inf", "inf"),
        (np.bool_(True), True, "True"),
        ({(1, 10), (1, 9)}, [[1, 9], [1, 10]], "[[1, 9], [1, 10]]"),
        (None, None, "None"),
    ],
)
def test_values_in_json_and_in_tables(value, json, text):
    assert plain(value) == json
    assert show(value) == text


# ---- support


class Losses(Record):
    @property
    def loss(self):
        return self.mean("loss")


def losses(values, dimension="prompt", **attrs):
    data = {"loss": (dimension, np.asarray(values, dtype=float))}
    weights = {"scored_tokens": ("prompt", np.ones(len(values)))} if dimension == "prompt" else {}
    return Losses(xr.Dataset(data | weights, attrs={"subject": "s", "source": "measured", "condition": "c"} | attrs))


def below_two(record):
    assert record.loss < 2


def below_the_other(record, other):
    assert record.loss < other.loss


def test_support_is_near_the_normal_approximation():
    generator = np.random.default_rng(0)
    values = generator.normal(1.9, 1.0, 100)
    distance = (2 - values.mean()) / (values.std() / 10)
    from scipy.stats import norm

    assert support(Predicate(below_two), {"record": losses(values)}) == pytest.approx(norm.cdf(distance), abs=0.05)


def test_support_of_the_certain_is_one_or_zero():
    assert support(Predicate(below_two), {"record": losses([1.0] * 8)}) == 1
    assert support(Predicate(below_two), {"record": losses([3.0] * 8)}) == 0


def test_records_of_the_same_prompts_are_resampled_together():
    values = np.random.default_rng(0).normal(size=50)
    together = support(Predicate(below_the_other), {"record": losses(values), "other": losses(values + 0.01)})
    apart = support(Predicate(below_the_other), {"record": losses(values), "other": losses(values[::-1] + 0.01)})
    assert together == 1
    assert apart < FRAGILE


def test_what_cannot_be_resampled_has_no_support():
    published = Losses(xr.Dataset({"loss": 1.0}))
    assert support(Predicate(below_two), {"record": published}) is None


def sizes_and_losses():
    return Losses(losses([1.0, 1.0, 4.0, 4.0]).data.assign(size=3.0, layer_size=("layer", [2.0, 3.0])))


def test_what_was_not_sampled_has_no_support():
    def rests_on_sizes(record):
        assert record.mean("size") > 2
        assert record.mean("layer_size").max() <= record.data["size"]

    def refuted_on_sizes(record):
        assert record.mean("size") > 3

    arguments = {"record": sizes_and_losses()}
    assert support(Predicate(rests_on_sizes), arguments) is None
    assert support(Predicate(refuted_on_sizes), arguments) is None


@pytest.mark.parametrize("least", [1, 3])
def test_a_claim_that_rests_on_samples_too_has_support(least):
    def rests_on_both(record):
        assert record.mean("size") >= least
        assert record.loss < least + 1.6

    assert 0 < support(Predicate(rests_on_both), {"record": sizes_and_losses()}) <= 1


def test_what_stands_in_for_a_missing_sample_is_another_quantity():
    def another_without_losses(record):
        assert (record.loss if record.has("loss") else record.mean("size")) < 3.1

    assert 0.5 < support(Predicate(another_without_losses), {"record": sizes_and_losses()}) < 1


def test_an_inapplicable_resample_does_not_count_as_holding():
    def needs_the_outlier(record):
        if record.loss < 1.5:
            raise NotApplicable("no outlier")
        assert record.loss > 1

    found = support(Predicate(needs_the_outlier), {"record": losses([1.0, 1.0, 1.0, 4.0])})
    assert 0.3 < found < FRAGILE
