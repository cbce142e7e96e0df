"""Tests in forked processes: what they say, whether they end, and which lines of the instruments they run."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

MEMORY = 6 * 2**30  #: bytes that a process may take beside what is there
Say = Callable[[object], None]  #: tells the process that forked this one something that JSON can hold

# ---- children


def child(work: Callable[[Say], None], patience: float) -> Iterator[Any]:
    """Do work in a forked process, and give what it says; "hung" or "died" comes last where it did not end.

    Every message is a JSON value; one of the form {"patience": seconds} tells how long to wait for the next.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        _be_child(work, writing)
    os.close(writing)
    try:
        yield from _heard(reading, patience)
    finally:
        os.close(reading)
        os.killpg(process, signal.SIGKILL) if _leads_group(process) else os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _leads_group(process: int) -> bool:
    return os.getpgid(process) == process


def _be_child(work: Callable[[Say], None], writing: int) -> None:
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))

        def say(message: object) -> None:
            data = (json.dumps(message) + "\n").encode()
            while data:
                data = data[os.write(writing, data) :]

        work(say)
        say("ended")
    finally:
        os._exit(0)


def _heard(reading: int, patience: float) -> Iterator[Any]:
    left, deadline = b"", time.monotonic() + patience
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
        data = os.read(reading, 2**20) if ready else b""
        if not data:
            yield "died" if ready else "hung"
            return
        *lines, left = (left + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message == "ended":
                return
            if isinstance(message, dict) and "patience" in message:
                deadline = time.monotonic() + message["patience"]
            yield message


# ---- which test runs which lines

Lines = dict[str, set[int]]


@dataclass
class Reach:
    """What a test that passes takes, in seconds, and the lines of each module that it runs."""

    seconds: float
    lines: Lines


class Tracer:
    """Notes the lines of chosen files that run, into `into`."""

    def __init__(self, modules: dict[str, str]):
        self.modules, self.into = modules, defaultdict[str, set[int]](set)

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        module = self.modules.get(frame.f_code.co_filename)
        if module is None:
            return None
        self.into[module].add(frame.f_lineno)

        def line(frame: FrameType, event: str, argument: object) -> Any:
            if event == "line":
                self.into[module].add(frame.f_lineno)
            return line

        return line


class Suite:
    """pytest's plugin: takes over its loop, with everything collected and nothing run."""

    def __init__(self, do: Callable[[Suite], None]):
        self._do = do
        self.tracer: Tracer | None = None
        self._shared: Lines = {}
        self.failed = self.skipped = False

    def pytest_configure(self) -> None:
        """Property tests look at the same examples each time, and do not look for the smallest."""
        from hypothesis import HealthCheck, Phase, settings

        quick = {"phases": (Phase.explicit, Phase.generate), "deadline": None, "database": None, "derandomize": True}
        settings.register_profile("mutants", **quick, suppress_health_check=list(HealthCheck))
        settings.load_profile("mutants")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        self._do(self)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed
        self.skipped |= report.skipped and not hasattr(report, "wasxfail")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        """What fixtures run counts for all tests of the file, for the first alone may have found them empty."""
        if self.tracer is None:
            return (yield)
        into, self.tracer.into = self.tracer.into, self._shared
        try:
            return (yield)
        finally:
            self.tracer.into = into

    def run(self, name: str, following: str | None) -> None:
        """Run a test, and set `failed` and `skipped`."""
        self.failed = self.skipped = False
        item, following_item = self.items[name], self.items[following] if following else None
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following_item)

    def explore(self, names: list[str], modules: dict[str, str], forget: Callable[[], None], say: Say) -> None:
        """Say what each test of a file runs; claims share a record, which remembers what it derived."""
        self._shared = defaultdict(set)
        forget()
        for name, following in zip(names, [*names[1:], None], strict=True):
            is_claim = self.items[name].get_closest_marker("published") is not None
            self.tracer = Tracer(modules)
            if is_claim:
                self.tracer.into = self._shared
            else:
                forget()
            started = time.perf_counter()
            sys.settrace(self.tracer)
            threading.settrace(self.tracer)  # for the threads that the test starts
            self.run(name, following)
            sys.settrace(None)
            threading.settrace(None)
            own = {} if is_claim else {module: sorted(lines) for module, lines in self.tracer.into.items()}
            if not (self.failed or self.skipped):
                say({"test": name, "seconds": time.perf_counter() - started, "lines": own, "patience": 300})
        say({"shared": {module: sorted(lines) for module, lines in self._shared.items()}})


def reached(suite: Suite, names: list[str], modules: dict[str, str], forget: Callable[[], None]) -> dict[str, Any]:
    """What the tests of one file run, or nothing of those from the one on that hangs.

    `forget` empties what remembers results, so that each test is seen to run all that it needs.
    """
    found: dict[str, Any] = {"tests": {}, "shared": {}}
    for message in child(lambda say: suite.explore(names, modules, forget, say), 300):
        if isinstance(message, str):
            found["stopped"] = message
        elif "test" in message:
            found["tests"][message["test"]] = {"seconds": message["seconds"], "lines": message["lines"]}
        else:
            found["shared"] = message["shared"]
    return found
