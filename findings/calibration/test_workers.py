"""Several workers on one machine: the same results as one process, and nobody waits while there is other work."""

import json
import random
import re
import shutil
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest

from fixtures.dealing import Dealing

pytestmark = pytest.mark.calibration

OUTPUTS = ("--verdicts", "verdicts.json", "--drift", "drift.json", "--summary", "summary.md", "--junitxml", "junit.xml")
SUBJECTS = ("--subject", "tiny", "--subject", "small")
NOT_TOYS = """
    import pytest

    @pytest.mark.parametrize("number", range(4))
    def test_numbers(number):
        assert number < 3
"""


# ---- the same results


def left_by(folder) -> dict:
    """What a run leaves, without its times; tests and files end in another order where several run at once."""
    cases = ElementTree.parse(folder / "junit.xml").iter("testcase")
    snapshots = {path.relative_to(folder): json.loads(path.read_text()) for path in folder.glob("snapshots/*/*/*.json")}
    for content in snapshots.values():
        content["provenance"].pop("seconds", None)
    return {
        "verdicts": [row | {"seconds": None} for row in json.loads((folder / "verdicts.json").read_text())],
        "drift": json.loads((folder / "drift.json").read_text()),
        "summary": (folder / "summary.md").read_text(),
        "junit": sorted(
            (
                case.get("classname"),
                case.get("name"),
                sorted((each.get("name"), each.get("value")) for each in case.iter("property")),
                [(child.tag, child.get("message")) for child in case if child.tag != "properties"],
            )
            for case in cases
        ),
        "snapshots": snapshots,
    }


def shown(result) -> tuple:
    """The verdict table and what follows it, without times, and how the run ended."""
    lines = result.outlines
    start = next(place for place, line in enumerate(lines) if re.fullmatch("=+ verdicts =+", line))
    end = next((place for place, line in enumerate(lines) if "short test summary" in line), len(lines) - 1)
    return lines[start:end], sorted(lines[end + 1 : -1]), result.parseoutcomes(), result.ret


def test_workers_give_the_same_results_as_one_process(suite):
    suite.publish()
    suite.claims(NOT_TOYS, "test_numbers")
    runs = {}
    for arguments, measured in ((("--snapshot-update",), 0), ((), 0), (("--fresh",), 2)):
        if arguments == ("--fresh",):
            suite.values({"loss": [3.0] * 4, "layer_loss": [[1.1] * 4, [2.0] * 4, [2.5] * 4]})
        alone = shown(suite.run_apart(*SUBJECTS, *OUTPUTS, *arguments)), left_by(suite.folder)
        if arguments == ("--snapshot-update",):
            shutil.rmtree(suite.folder / "snapshots")
        before = suite.measurements
        runs[arguments] = (
            shown(suite.run_apart(*SUBJECTS, *OUTPUTS, *arguments, "--workers", "2")),
            left_by(suite.folder),
        )
        assert runs[arguments] == alone
        assert suite.measurements == before + measured  # each subject once, though claims ask in several processes
    assert len(runs[("--snapshot-update",)][1]["snapshots"]) == 3
    assert len(runs[("--fresh",)][1]["drift"]["differences"]) == 2 + 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--workers", "0"), "'0' is no number of workers; give a whole number from 1"),
        (("--workers", "two"), "'two' is no number of workers; give a whole number from 1"),
        (("--workers", "2", "-n", "3"), "--workers 2 and -n 3 exclude each other; choose one of them"),
        (("--workers", "2", "-p", "no:xdist"), "--workers needs the plugin pytest-xdist, which is switched off"),
    ],
)
def test_workers_that_cannot_be_had_are_refused_in_one_line(suite, arguments, said):
    result = suite.run(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert [line for line in f"{result.stdout}\n{result.stderr}".splitlines() if said in line]


@pytest.mark.parametrize(("there", "refused"), [(0, False), (1, True), (2, False), (4, False)])
def test_more_workers_than_cuda_devices_are_refused(suite, monkeypatch, there, refused):
    monkeypatch.setattr("fixtures.devices.cuda_devices", lambda: there)
    result = suite.run("--workers", "2", "--device", "cuda", "--collect-only", "-q")
    assert ("2 workers would share 1 CUDA devices; choose --workers 1" in str(result.stderr)) is refused
    assert "would share" not in str(suite.run("--workers", "2", "--collect-only", "-q").stderr)


# ---- who takes what


class Worker:
    """Stands for xdist's controller of a worker; runs what it was sent, one test after another."""

    def __init__(self, name: str):
        self.gateway = SimpleNamespace(id=name)
        self.shutting_down = False
        self.waiting: list[int] = []

    def send_runtest_some(self, indices):
        self.waiting += indices

    def shutdown(self):
        self.shutting_down = True


def dealing(needs: dict[str, list[str]], tests: list[str], folder, workers: int) -> tuple[Dealing, list[Worker]]:
    (folder / "needs.json").write_text(json.dumps(needs))
    config = SimpleNamespace(
        option=SimpleNamespace(loadscopereorder=True), getvalue=lambda name: ["popen"] * workers, rootpath=folder
    )
    dealt, crew = Dealing(config, None, folder / "needs.json"), [Worker(f"gw{i}") for i in range(workers)]
    for worker in crew:
        dealt.add_node(worker)
    for worker in crew:
        dealt.add_node_collection(worker, tests)
    dealt.schedule()
    return dealt, crew


def suite_of(rng: random.Random) -> tuple[dict[str, list[str]], list[str]]:
    """Tests over one record, tests over two, and tests over none; with the records they need."""
    records = [f"e{i} of s ({rng.choice(['measured', 'published'])})" for i in range(rng.randint(1, 5))]
    needs = {f"c.py::{i}-{j}": [record] for i, record in enumerate(records) for j in range(rng.randint(1, 6))}
    for k in range(rng.randint(0, 4) if len(records) > 1 else 0):
        needs[f"r.py::{k}"] = rng.sample(records, 2)
    tests = [*needs, *(f"f{i}.py::{j}" for i in range(rng.randint(0, 4)) for j in range(rng.randint(1, 3)))]
    rng.shuffle(tests)
    return needs, tests


@pytest.mark.parametrize("seed", range(60))
def test_nobody_is_dealt_what_another_measures_while_there_is_other_work(tmp_path, seed):
    rng = random.Random(seed)
    needs, tests = suite_of(rng)
    dealt_to: dict[str, Worker] = {}
    ended: set[str] = set()
    deal = Dealing._assign_work_unit

    def watched(self, node):
        before, left = set(self.workqueue), dict(self.workqueue)
        deal(self, node)
        (chosen,) = before - set(self.workqueue)

        def free(unit):
            owners = (dealt_to.get(r) for r in needs.get(next(iter(left[unit])), ()) if r not in ended)
            return all(owner in (None, node) for owner in owners)

        assert free(chosen) or not any(map(free, before))
        for record in needs.get(next(iter(left[chosen])), ()):
            dealt_to.setdefault(record, node)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dealing, "_assign_work_unit", watched)
        dealt, crew = dealing(needs, tests, tmp_path, rng.randint(1, 3))
        ran: list[tuple[str, Worker]] = []
        while busy := [worker for worker in crew if worker.waiting]:
            worker = rng.choice(busy)
            index = worker.waiting.pop(0)
            ran.append((tests[index], worker))
            ended.update(needs.get(tests[index], ()))
            dealt.mark_test_complete(worker, index)
    assert sorted(test for test, _ in ran) == sorted(tests)
    for record in {record for wanted in needs.values() for record in wanted}:
        assert len({id(worker) for test, worker in ran if needs.get(test) == [record]}) <= 1


def test_measured_records_come_first_and_claims_over_two_last(tmp_path):
    measured, published, two = "a of s (measured)", "a of t (published)", "b of s (measured)"
    needs = {"c.py::two": [measured, two], "c.py::p": [published], "c.py::m": [measured], "c.py::n": [two]}
    dealt, (worker,) = dealing(needs, ["f.py::1", *needs], tmp_path, 1)
    order = []
    while worker.waiting:
        order.append(worker.waiting.pop(0))
        dealt.mark_test_complete(worker, order[-1])
    tests = ["f.py::1", *needs]
    assert {tests[i] for i in order[:2]} == {"c.py::m", "c.py::n"}
    assert tests[order[-1]] == "c.py::two"


def test_what_a_lost_worker_measured_is_anybodys(tmp_path):
    record = "a of s (measured)"
    needs = {f"c.py::{i}": [record] for i in range(4)}
    tests = [*needs, *(f"f{i}.py::1" for i in range(6))]
    dealt, (first, second) = dealing(needs, tests, tmp_path, 2)
    assert first.waiting[:4] == [0, 1, 2, 3]
    dealt.mark_test_complete(first, first.waiting.pop(0))
    assert dealt.remove_node(first) == "c.py::1"
    ended = []
    while second.waiting:
        ended.append(second.waiting.pop(0))
        dealt.mark_test_complete(second, ended[-1])
    assert {1, 2, 3} <= set(ended)
    assert 0 not in ended
    assert dealt.tests_finished
