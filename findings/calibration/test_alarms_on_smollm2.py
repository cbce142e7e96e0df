"""The drift gate on SmolLM2: no false alarms, no missed ones. Takes about 40 minutes on two cores.

`pytest findings/calibration/test_alarms_on_smollm2.py` measures the experiments again and again on a few
prompts and compares with a first time: under other circumstances every number must stay within its tolerance,
after a real change one at least must not. Finished measurements are kept in the measurement store, so an
interrupted run resumes; on two AVX2 cores beside other work a trial of the logit lens took 22 s. Native bfloat16
products are ten times slower there. `--snapshot-update` records what was found in `data/alarms.json`, which
`test_alarms.py` holds on every run.

Another version of PyTorch: install it in an environment of its own and run `-k another_torch` there, with the
same cache. What is measured there is compared with the numbers that were kept under the recorded version.
"""

from dataclasses import replace
from importlib.metadata import version

import pytest

from lab.alarms import changes, circumstances, comparison, series
from lab.alarms.trial import Trial
from lab.corpora.corpus import load_corpus

pytestmark = [pytest.mark.calibration, pytest.mark.benchmark]

#: the cheapest first; a change that they catch is caught
WATCHING = ("logit_lens", "layer_knockout")


@pytest.fixture(scope="module")
def trial(smollm2):
    corpus = load_corpus(smollm2.facts, smollm2.tokenizer).prefix(series.PROMPTS)
    return Trial(smollm2, corpus, series.BUDGETS)


@pytest.fixture(scope="module")
def table(request):
    """The recorded table; under --snapshot-update what this run finds is written into it."""
    found = series.read()
    yield found
    if request.config.getoption("update_snapshots"):
        found.write()


@pytest.fixture
def plain(trial, table):
    """The unvaried numbers of an experiment, under the recorded versions of the libraries."""
    if not table.libraries:
        table.libraries = comparison.libraries_here()

    def numbers(experiment):
        try:
            return comparison.kept(trial, experiment, libraries=table.libraries)
        except KeyError as error:
            pytest.skip(f"{error.args[0]}; run this test there first, with the same cache")

    return numbers


@pytest.mark.parametrize(("circumstance", "experiment"), series.QUIET_TRIALS)
def test_circumstances_raise_no_alarm(trial, table, plain, circumstance, experiment):
    before = plain(experiment)
    with series.CIRCUMSTANCES[circumstance](replace(trial, budgets={experiment: trial.budgets[experiment]})) as varied:
        after = comparison.kept(varied, experiment, circumstance, circumstances.__name__)
    moves = comparison.largest_moves(experiment, before, after)
    table.note_circumstance(circumstance, experiment, moves)
    assert [move.text for move in moves.values() if move.share > 1] == []


@pytest.mark.parametrize("experiment", series.BUDGETS)
def test_another_torch_raises_no_alarm(trial, table, plain, experiment):
    here = version("torch")
    before = plain(experiment)
    if here == table.libraries["torch"]:
        pytest.skip(f"the numbers were recorded under torch {here}; run this under another version")
    moves = comparison.largest_moves(experiment, before, comparison.kept(trial, experiment))
    table.note_circumstance(f"{series.ANOTHER_TORCH} {here}", experiment, moves)
    assert [move.text for move in moves.values() if move.share > 1] == []


@pytest.mark.parametrize("change", series.CHANGES)
def test_real_changes_raise_an_alarm(trial, table, plain, change):
    seen = []
    for experiment in WATCHING:
        before = plain(experiment)
        with series.CHANGES[change](trial) as varied:
            after = comparison.kept(varied, experiment, change, changes.__name__)
        moves = comparison.largest_moves(experiment, before, after)
        table.note_change(change, experiment, moves)
        seen.append(max(move.share for move in moves.values()))
        if seen[-1] > 1:
            return
    pytest.fail(f"the largest deviations are {seen} of a tolerance")
