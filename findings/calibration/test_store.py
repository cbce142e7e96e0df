"""The store: addresses, records that are whole or absent, sweeps that resume, one measurement for two."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from lab import files
from lab.store import Store, Sweep

pytestmark = pytest.mark.calibration

REPOSITORY = Path(__file__).parents[2]

# Measures ten shards, each noted in a log. With PAUSE it hangs inside the sixth.
SCRIPT = """
import os, sys, time
from pathlib import Path
import numpy as np, xarray as xr
from lab.store import Store

log, root, pause = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "pause"

def note(text):
    with open(log, "a") as file:
        file.write(text + "\\n")

def shard(index):
    if pause and index == 5:
        note("hanging")
        time.sleep(60)
    time.sleep(0.02)
    note(f"shard {index}")
    return {"x": np.array([index])}

def measure(sweep):
    note("measure")
    found = [sweep.shard(f"part {index}", lambda: shard(index))["x"] for index in range(10)]
    return xr.Dataset({"x": ("n", np.concatenate(found))})

dataset = Store(root).record("toy", {"a": 1}, measure)
note("sum " + str(int(dataset.x.sum())))
"""


def start(folder: Path, mode: str = "through") -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    arguments = [sys.executable, "-c", SCRIPT, str(folder / "log"), str(folder / "records"), mode]
    return subprocess.Popen(arguments, env=environment)


def logged(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines() if (folder / "log").exists() else []


def toy(value: float = 1.0) -> xr.Dataset:
    return xr.Dataset({"x": ("n", [value])}, attrs={"subject": "s"})


def test_a_killed_measurement_leaves_no_record_and_resumes(tmp_path):
    process = start(tmp_path, "pause")
    limit = time.monotonic() + 60
    while "hanging" not in logged(tmp_path):
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list((tmp_path / "records" / "toy").glob("*.nc")) == []
    assert start(tmp_path).wait() == 0
    lines = logged(tmp_path)
    assert [line for line in lines if line.startswith("shard")] == [f"shard {index}" for index in range(10)]
    assert lines[-1] == "sum 45"
    assert len(list((tmp_path / "records" / "toy").glob("*.nc"))) == 1
    assert list((tmp_path / "records" / "toy").glob("*.shards")) == []


def test_two_processes_measure_once(tmp_path):
    both = [start(tmp_path), start(tmp_path)]
    assert [process.wait() for process in both] == [0, 0]
    assert logged(tmp_path).count("measure") == 1
    assert logged(tmp_path).count("sum 45") == 2


def test_a_record_is_read_back_as_it_was(tmp_path):
    data = xr.Dataset(
        {"x": (("layer", "prompt"), np.random.default_rng(0).normal(size=(3, 4)), {"unit": "nat", "description": "d"})},
        {"layer": [0, 1, 2], "prompt_id": ("prompt", ["a", "bc", "d", "e"])},
        {"subject": "s", "provenance": "{}"},
    )
    found = [Store(tmp_path).record("toy", {}, lambda sweep: data) for _ in range(2)]
    xr.testing.assert_identical(*found)
    xr.testing.assert_equal(found[0], data)
    assert found[0].x.attrs == data.x.attrs


def test_a_record_is_read_without_its_lock(tmp_path):
    """Whoever holds the lock, a record that is there is whole."""
    store = Store(tmp_path)
    store.record("toy", {}, lambda sweep: toy(1.0))
    with files.locked(store.path("toy", {})), ThreadPoolExecutor(1) as other:
        assert other.submit(store.record, "toy", {}, lambda sweep: toy(2.0)).result(timeout=5).x[0] == 1


def test_fresh_measures_again_and_drops_old_shards(tmp_path):
    values = iter([1.0, 2.0, 3.0])

    def measure(sweep):
        return toy(float(sweep.shard("only", lambda: {"x": np.array(next(values))})["x"]))

    def value(**options):
        return float(Store(tmp_path).record("toy", {}, measure, **options).x[0])

    assert [value(), value(), value(fresh=True), value()] == [1, 1, 2, 2]


def test_every_part_of_the_key_counts(tmp_path):
    keys = [{"a": 1, "b": {"c": 2}}, {"a": 2, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}, {"a": 1}]
    paths = {Store(tmp_path).path("toy", key) for key in keys}
    assert len(paths) == len(keys)
    assert Store(tmp_path).path("toy", {"b": {"c": 2}, "a": 1}) in paths


def test_a_failing_measurement_keeps_its_shards(tmp_path):
    def measure(sweep):
        sweep.shard("first", lambda: {"x": np.zeros(1)})
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        Store(tmp_path).record("toy", {}, measure)
    assert not Store(tmp_path).path("toy", {}).exists()

    def again(sweep):
        return toy(float(sweep.shard("first", lambda: pytest.fail("measured again"))["x"][0]))

    assert float(Store(tmp_path).record("toy", {}, again).x[0]) == 0


def test_progress_is_passed_on(tmp_path):
    seen = []

    def measure(sweep):
        sweep.progress(1, 2, "layers")
        return toy()

    Store(tmp_path).record("toy", {}, measure, report=lambda *values: seen.append(values))
    assert seen == [(1, 2, "layers")]


@pytest.mark.parametrize("keeps", [True, False])
def test_a_shard_that_is_begun_is_saved_when_it_is_asked_for(tmp_path, keeps):
    """And one that is saved is not begun."""
    seen = []

    def start():
        seen.append("begun")
        return lambda: seen.append("done") or {"x": np.array([len(seen)])}

    sweep = Sweep(tmp_path if keeps else None)
    finish = sweep.begin("one", pytest.fail, start)
    assert (seen, list(tmp_path.iterdir())) == (["begun"], [])
    assert (finish()["x"][0], len(list(tmp_path.iterdir()))) == (2, keeps)
    again = sweep.begin("one", pytest.fail, start)()
    assert (again["x"][0], len(seen)) == ((2, 2) if keeps else (4, 4))


def test_a_sweep_without_a_folder_keeps_nothing():
    count = iter(range(2))
    sweep = Sweep()
    assert [int(sweep.shard("same", lambda: {"x": np.array(next(count))})["x"]) for _ in range(2)] == [0, 1]


def test_a_fresh_measurement_takes_over_nothing_of_an_interrupted_one(tmp_path):
    """Not even shards, and though there is no record yet; none are left once the record is whole."""
    store, parts = Store(tmp_path), {"a": 1}

    def measure(value, fails):
        def measured(sweep):
            found = sweep.shard("part", lambda: {"x": np.array([value])})
            if fails:
                raise KeyboardInterrupt
            return xr.Dataset({"x": ("n", found["x"])})

        return measured

    with pytest.raises(KeyboardInterrupt):
        store.record("toy", parts, measure(1.0, fails=True))
    assert store.path("toy", parts).with_suffix(".shards").exists()
    assert store.record("toy", parts, measure(2.0, fails=False), fresh=True).x.values.tolist() == [2.0]
    assert not store.path("toy", parts).with_suffix(".shards").exists()
    assert store.record("toy", parts, measure(3.0, fails=True)).x.values.tolist() == [2.0]
