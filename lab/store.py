"""The measurement store: records that are whole or absent, and sweeps that resume.

A record's address is the digest of everything that determines its numbers. While a measurement
runs, its shards (named parts of a sweep) are saved one by one; a killed run picks them up. The lock
is held for the whole measurement, so that a second worker waits and then reads.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from lab import files, paths

Arrays = dict[str, np.ndarray]


class Sweep:
    """Shards and progress of one running measurement.

    Args:
        folder: where shards are kept; None keeps nothing (calibration, tests).
        report: called as `report(done, total, what)` after every step of work.
    """

    def __init__(self, folder: Path | None = None, report: Callable[[float, float, str], None] | None = None):
        self.folder = folder
        self._report = report

    def shard(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        """The arrays of this shard: read back if an earlier run saved them, else computed and saved."""
        path = self._path(name)
        if path is None:
            return compute()
        if path.exists():
            with np.load(path, allow_pickle=False) as saved:
                return {key: saved[key] for key in saved.files}
        arrays = compute()
        with files.atomic_path(path) as part, open(part, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        return arrays

    def begin(
        self, name: str, compute: Callable[[], Arrays], start: Callable[[], Callable[[], Arrays]]
    ) -> Callable[[], Arrays]:
        """Begin this shard unless it is saved; what is returned waits for its arrays, and saves them.

        Args:
            name: of the shard.
            compute: all of its work, for whoever has it done elsewhere.
            start: begins the work; what it returns waits for the arrays.
        """
        path = self._path(name)
        return partial(self.shard, name, compute if path is not None and path.exists() else start())

    def progress(self, done: float, total: float, what: str) -> None:
        """Tell whoever watches that `done` of `total` units of `what` are through."""
        if self._report is not None:
            self._report(done, total, what)

    def _path(self, name: str) -> Path | None:
        """Where a shard is saved; None if none are."""
        return None if self.folder is None else self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.npz"


class Store:
    """Records on disk, addressed by content."""

    def __init__(self, root: Path | None = None):
        self.root = root or paths.cache() / "records"

    def path(self, experiment: str, parts: Mapping[str, Any]) -> Path:
        """Where the record that these parts determine lies, or would lie."""
        address = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
        return self.root / experiment / f"{address}.nc"

    def record(
        self,
        experiment: str,
        parts: Mapping[str, Any],
        measure: Callable[[Sweep], xr.Dataset],
        *,
        fresh: bool = False,
        report: Callable[[float, float, str], None] | None = None,
    ) -> xr.Dataset:
        """The stored record, or a new one from `measure`, saved before it is returned.

        Args:
            experiment: its name, used as a folder.
            parts: everything that determines the numbers, JSON-serialisable.
            measure: computes the record; it is given a sweep whose shards survive an interruption.
            fresh: measure again even if the record, or shards of it, are there.
            report: progress callback, see `Sweep`.
        """
        path = self.path(experiment, parts)
        if not fresh:
            # A record is whole as soon as it is there, and a cache that cannot be written holds no lock.
            with suppress(FileNotFoundError):
                return _read(path)
        with files.locked(path):
            shards = path.with_suffix(".shards")
            if fresh:
                path.unlink(missing_ok=True)
                shutil.rmtree(shards, ignore_errors=True)
            if not path.exists():
                dataset = measure(Sweep(shards, report))
                with files.atomic_path(path) as part:
                    dataset.to_netcdf(part, engine="scipy")
                shutil.rmtree(shards, ignore_errors=True)
            return _read(path)


def _read(path: Path) -> xr.Dataset:
    with xr.open_dataset(path, engine="scipy") as stored:
        return stored.load()
