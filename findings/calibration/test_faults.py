"""The suite under fault: killed, on a full disk, on a read-only one, beside itself, with a clock that is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from lab import files
from lab.errors import UserError
from lab.report import site
from lab.store import Store

pytestmark = pytest.mark.calibration

REPOSITORY = Path(__file__).parents[2]
KILLING = Path(__file__).with_name("killing.py")


def test_nothing_is_lost_to_kill_9():
    """Twice each while measuring, converting, completing, recording and reporting; `make faults` kills 200 times."""
    run = subprocess.run(
        [sys.executable, str(KILLING), "all", "--kills", "2"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert [line.split(" kills")[0] for line in run.stdout.splitlines()] == [
        f"{work}: 2" for work in ("measuring", "converting", "completing", "recording", "reporting")
    ]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def numbers(count: int) -> xr.Dataset:
    return xr.Dataset({"x": ("n", np.arange(count, dtype=float))})


def test_a_full_disk_costs_a_line_and_no_record(small_disk):
    store = Store(small_disk / "records")
    store.record("toy", {"which": "small"}, lambda sweep: numbers(1000))
    with pytest.raises(
        UserError, match=r"cannot write .*records/toy/.*\.nc: .*free some space or choose another folder"
    ):
        store.record("toy", {"which": "large"}, lambda sweep: numbers(100_000))
    assert not store.path("toy", {"which": "large"}).exists()
    again = store.record("toy", {"which": "small"}, lambda sweep: pytest.fail("measured again"))
    assert again.sizes == {"n": 1000}
    smaller = store.record("toy", {"which": "large"}, lambda sweep: numbers(2000))
    assert smaller.sizes == {"n": 2000}


def test_a_full_disk_stops_a_sweep_where_it_can_go_on(small_disk):
    """The shards that were saved stay; with more room the sweep takes up where it ended."""
    store, computed = Store(small_disk / "records"), []

    def measure(sweep):
        def shard(index):
            computed.append(index)
            return {"x": np.full(4000, float(index))}

        parts = [sweep.shard(f"part {index}", lambda index=index: shard(index)) for index in range(12)]
        return xr.Dataset({"x": ("n", [float(part["x"][0]) for part in parts])})

    with pytest.raises(UserError, match="free some space"):
        store.record("toy", {}, measure)
    reached = len(computed) - 1
    assert 3 < reached < 11
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert store.record("toy", {}, measure).x.values.tolist() == list(range(12))
    assert computed == [*range(reached + 1), *range(reached, 12)]


def test_a_full_disk_leaves_snapshot_and_atlas_as_they_were(small_disk):
    files.write_text(small_disk / "snapshot.json", "old")
    site.write({"index.html": b"old"}, small_disk / "atlas")
    with pytest.raises(UserError, match="free some space"):
        files.write_text(small_disk / "snapshot.json", "new" * 200_000)
    with pytest.raises(UserError, match="free some space"):
        site.write({"index.html": b"new" * 200_000}, small_disk / "atlas")
    assert (small_disk / "snapshot.json").read_text() == "old"
    assert (small_disk / "atlas" / "index.html").read_bytes() == b"old"
    assert sorted(path.name for path in small_disk.iterdir()) == ["atlas", "atlas.lock", "snapshot.json"]


def test_a_cache_that_cannot_be_written_is_read_or_one_line(small_disk):
    store = Store(small_disk / "records")
    kept = store.record("toy", {"which": "kept"}, lambda sweep: numbers(10))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    xr.testing.assert_identical(store.record("toy", {"which": "kept"}, lambda sweep: numbers(20)), kept)
    with pytest.raises(UserError, match=r"cannot write .*Read-only file system; .*choose another folder"):
        store.record("toy", {"which": "new"}, lambda sweep: numbers(10))


SCRIPT = """
import sys, time
from pathlib import Path
import numpy as np, xarray as xr
from lab.store import Store

def measure(sweep):
    with open(sys.argv[1] + ".log", "a") as log:
        log.write("measured\\n")
    time.sleep(0.5)
    return xr.Dataset({"x": ("n", np.arange(5.0))})

assert Store(Path(sys.argv[1])).record("toy", {}, measure).x.sum() == 10
"""


@pytest.mark.parametrize("count", [2, 4])
def test_runs_beside_each_other_measure_once(tmp_path, count):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "records")]
    runs = [subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}) for _ in range(count)]
    assert [run.wait() for run in runs] == [0] * count
    assert (tmp_path / "records.log").read_text().splitlines() == ["measured"]


def test_a_clock_that_jumps_back_changes_nothing(tmp_path):
    """Records are found by what determines them, whatever the time stamps say."""
    store = Store(tmp_path)
    store.record("toy", {}, lambda sweep: numbers(3))
    path = store.path("toy", {})
    for shift in (-1e9, 1e9):
        os.utime(path, (time.time() + shift,) * 2)
        assert store.record("toy", {}, lambda sweep: pytest.fail("measured again")).sizes == {"n": 3}
