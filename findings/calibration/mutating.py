"""The power of the suite: small mistakes are made in the instruments and statistics, and its tests must notice them.

`python findings/calibration/mutating.py --sample 8 --seed 0`, or paths of modules for those only; `--sample 0` tries
all mutants of a module. Each mutant (`mutants.py` has the kinds) meets the calibration tests and the published claims
that run its lines, until one fails: then it is killed, as it is if a test hangs or the interpreter dies. Modules and
tests are imported once; every mutant lives in a forked process of its own, where the code of one function is
exchanged, so that nothing of it reaches the next one. Which tests run which lines is found out first, a process per
file. What was found lies in the folder of `--work`, and a run that was stopped, or that has new tests, goes on from it.

Why none of the packages: mutmut leaves out functions with decorators, which here are those under `no_grad` and the
derived quantities of records, and cosmic-ray starts an interpreter, and imports PyTorch, for every mutant.

A test that runs in a process of its own, or that needs weights, kills none. `survivors.toml` lists the mutants that
may survive, with the reason: `equivalent` ones, which nothing could observe, do not count; `accepted` ones count as
survivors. Exits with 1 if less than `--least` of the others are killed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
from mutants import Mutant, mutants_of
from mutation_report import line_of, result_of
from reaching import Lines, Reach, Say, Suite, child, reached

ROOT = Path(__file__).parents[2]
#: the numeric core
MODULES = (
    "lab/statistics/*.py", "lab/residual/*.py", "lab/quantization/rounding.py", "lab/quantization/layers.py",
    "lab/quantization/footprint.py", "lab/quantization/ggml.py", "lab/quantization/gptq.py",
    "lab/normalization/recovery.py", "lab/normalization/moments.py", "lab/normalization/replacements.py",
    "lab/normalization/constants.py", "lab/normalization/surgery.py", "lab/corpora/batches.py",
    "lab/corpora/degeneration.py", "lab/corpora/token_classes.py", "lab/records.py", "lab/store.py",
    "lab/subjects/calls.py", "lab/subjects/head.py", "lab/subjects/products.py", "lab/subjects/token_prefix.py",
    "lab/snapshots/*.py",
)  # fmt: skip
TESTS = ("findings/*/test_*.py",)
#: calibration of what is not mutated, or that runs in other processes, needs weights, or measures speed
LEFT_OUT = (
    "acestep_modules", "adapters", "alarms_on_smollm2", "anatomy", "arithmetic", "atlas", "atlas_browser",
    "atlas_files", "check_my_model", "checkpoints", "claims", "cli", "code_digest", "collection", "completions",
    "contrastive_groups", "contrastive_reading", "drawing", "faults", "figures", "fuzzing", "headers", "memory",
    "minimal_pairs", "mutating", "parcels", "plugin", "prompts", "ray", "rendering", "report_claims", "reports",
    "several_devices", "shapes", "specimens", "subjects", "training", "transfer", "weights", "workers",
    "workflows", "bench_*", "peers*",
)  # fmt: skip
#: a test may take so many times what it takes by itself, and `--margin` more; then it hangs
PATIENCE = 8
QUICK = 0.5  #: seconds

# ---- a mutant and its tests


class Bodies:
    """The functions of the modules, by their code, and all that remembers what functions returned."""

    def __init__(self, modules: dict[str, str], root: Path):
        self._functions = defaultdict[tuple[str, str, int], list[FunctionType]](list)
        self._caches = []
        for each in gc.get_objects():
            if type(each) is FunctionType and each.__code__.co_filename in modules:
                self._functions[_key(each.__code__)].append(each)
            elif type(each) is functools._lru_cache_wrapper:
                home = getattr(sys.modules.get(each.__module__ or ""), "__file__", None)
                if home and Path(home).is_relative_to(root) and ".venv" not in home:
                    self._caches.append(each)

    def holds(self, code: CodeType) -> bool:
        """Whether a function of this name and place was imported; one made by another function may not be."""
        return _key(code) in self._functions

    def exchange(self, code: CodeType) -> None:
        """Give the function that has a mutant's name and place the mutant's code, in this process, for good."""
        for function in self._functions[_key(code)]:
            function.__code__ = code
        self.forget()

    def forget(self) -> None:
        """Empty what remembers results."""
        for cache in self._caches:
            cache.cache_clear()


def _key(code: CodeType) -> tuple[str, str, int]:
    return code.co_filename, code.co_qualname, code.co_firstlineno


def tests_of(mutant: Mutant, reach: dict[str, Reach], seconds: float) -> tuple[list[str], int]:
    """The tests that run a mutant's lines: quick ones first, and the file named like its module, then the quickest.

    No more than take so many seconds; the number left out comes second.
    """
    first, last = mutant.lines
    found = [
        name for name, each in reach.items() if any(first <= line <= last for line in each.lines.get(mutant.module, ()))
    ]
    taken: Counter[str] = Counter()
    for name in found:
        taken[file_of(name)] += reach[name].seconds
    stem = Path(mutant.module).stem

    def rank(name: str) -> tuple[bool, bool, float, str, float]:
        file, alone = file_of(name), reach[name].seconds
        return alone > QUICK, f"test_{stem}" not in file, taken[file], file, alone

    chosen, total = [], 0.0
    for name in sorted(found, key=rank):
        total += reach[name].seconds
        if not chosen or total <= seconds:
            chosen.append(name)
    return chosen, len(found) - len(chosen)


def file_of(test: str) -> str:
    return test.split("::")[0]


def tried(suite: Suite, change: Callable[[], None], tests: dict[str, float]) -> dict[str, Any]:
    """Change something and run tests, each with its patience in seconds, until one fails; the outcome and that test."""

    def work(say: Say) -> None:
        change()
        for name, following in zip(tests, [*list(tests)[1:], None], strict=True):
            say({"test": name, "patience": tests[name]})
            suite.run(name, following)
            if suite.failed:
                say("killed")
                return
        say("survived")

    outcome, last = "survived", None
    for message in child(work, 60) if tests else ():
        if isinstance(message, str):
            outcome = message
        else:
            last = message["test"]
    if outcome == "died" and last is None:
        raise RuntimeError("a forked process died before its first test")
    return {"outcome": outcome, "by": None if outcome == "survived" else last}


# ---- a run


@dataclass(frozen=True)
class Plan:
    """What to try.

    Attributes:
        root: the folder that modules and tests are named from.
        modules, tests: files.
        traced: modules of which it is noted who runs them; more than those to try, so that a later run need not ask.
        marks: pytest's `-m`.
        sample: mutants per module; 0 for all.
        seconds: that the tests of one mutant may take together, at most.
        margin: seconds that a test may take beyond a multiple of its own time.
        work: folder of what was found.
    """

    root: Path
    modules: list[str]
    tests: list[str]
    traced: list[str]
    marks: str
    sample: int
    seed: int
    seconds: float
    margin: float
    work: Path

    def chosen(self, module: str) -> list[Mutant]:
        """The mutants of a module that are tried: a sample that is larger holds one that is smaller."""
        found = mutants_of(self.root, module)
        lot = {id(each): hashlib.sha256(f"{self.seed} {each.name}".encode()).digest() for each in found}
        kept = {id(each) for each in sorted(found, key=lambda each: lot[id(each)])[: self.sample or None]}
        return [each for each in found if id(each) in kept]


class Run:
    """Everything that one call finds out; `say` prints a line."""

    def __init__(self, plan: Plan, say: Callable[[str], None]):
        self._plan, self._say = plan, say
        self._paths = {str(plan.root / module): module for module in plan.traced}
        self.outcomes: list[dict[str, Any]] = []
        # before pytest reads the files: one that is changed later is then seen to be another the next time
        self._digests = {test: digest_of([(plan.root / test).read_text()]) for test in plan.tests}

    def __call__(self, suite: Suite) -> None:
        """Try all mutants of the plan, module by module."""
        for module in self._plan.traced:
            importlib.import_module(module.removesuffix(".py").replace("/", "."))
        self._bodies, self._suite = Bodies(self._paths, self._plan.root), suite
        gc.freeze()  # else each child would copy all pages that its collector visits
        self._reach, self._sound = self._reaches(), dict[str, bool]()
        known, state = self._known(), digest_of(sorted(self._digests.items()))
        with (self._plan.work / "outcomes.jsonl").open("a") as log:
            for module in self._plan.modules:
                for mutant in self._plan.chosen(module):
                    if not self._bodies.holds(mutant.code):
                        continue
                    entry = known.get(mutant.name)
                    if entry is None:
                        entry = {**self._tried(mutant), "sources": self._sources, "suite": state}
                        log.write(json.dumps(entry) + "\n")
                        log.flush()
                    self.outcomes.append(entry)
                self._say(line_of(module, [each for each in self.outcomes if each["module"] == module]))

    def _tried(self, mutant: Mutant) -> dict[str, Any]:
        """A mutant's outcome. A test that fails on the original, too, when it is run like this, kills none."""
        started = time.perf_counter()
        while True:
            tests, left_out = tests_of(mutant, self._reach, self._plan.seconds)
            found = tried(self._suite, lambda: self._bodies.exchange(mutant.code), self._patience(tests))
            killer = found["by"]
            if killer is None or self._is_sound(killer):
                break
            self._say(f"left out, for it fails by itself: {killer}")
            del self._reach[killer]
        return {
            "mutant": mutant.name, "module": mutant.module, "line": mutant.lines[0], **found, "tests": len(tests),
            "left_out": left_out, "seconds": round(time.perf_counter() - started, 2),
            "file": self._digests.get(file_of(killer or "")),
        }  # fmt: skip

    def _is_sound(self, test: str) -> bool:
        if test not in self._sound:
            alone = tried(self._suite, self._bodies.forget, self._patience([test]))
            self._sound[test] = alone["outcome"] == "survived"
        return self._sound[test]

    def _patience(self, tests: list[str]) -> dict[str, float]:
        """How long each test may take; the first that runs builds the file's fixtures, whichever did before."""
        slowest: defaultdict[str, float] = defaultdict(float)
        for name, each in self._reach.items():
            slowest[file_of(name)] = max(slowest[file_of(name)], each.seconds)
        return {
            test: self._plan.margin + PATIENCE * self._reach[test].seconds + 2 * slowest[file_of(test)]
            for test in tests
        }

    @functools.cached_property
    def _sources(self) -> str:
        """Of all that is imported and no test."""
        folders = sorted({module.split("/")[0] for module in self._plan.traced} | {"fixtures"})
        files = [path for folder in folders for path in _python_files(self._plan.root / folder)]
        return digest_of(
            (str(path), path.read_text())
            for path in [*files, *sorted(self._plan.root.rglob("findings/**/conftest.py"))]
        )

    def _known(self) -> dict[str, dict[str, Any]]:
        """Outcomes of an earlier run that still hold: killers are as they were, or no test of survivors is new."""
        path, suite = self._plan.work / "outcomes.jsonl", digest_of(sorted(self._digests.items()))
        entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return {
            entry["mutant"]: entry
            for entry in entries
            if entry["sources"] == self._sources
            and (entry["suite"] == suite or (entry["by"] and entry["file"] == self._digests.get(file_of(entry["by"]))))
        }

    def _reaches(self) -> dict[str, Reach]:
        """What each test runs; files that are as they were are not run again."""
        path = self._plan.work / "reach.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        files: defaultdict[str, list[str]] = defaultdict(list)
        for name in self._suite.items:
            files[file_of(name)].append(name)
        now: dict[str, Any] = {}
        for number, (file, names) in enumerate(files.items(), 1):
            state = digest_of([self._sources, self._digests[file], self._plan.traced])
            now[file] = before.get(file, {})
            if now[file].get("state") != state:
                now[file] = {"state": state, **reached(self._suite, names, self._paths, self._bodies.forget)}
                if "stopped" in now[file]:
                    self._say(f"{file}: {now[file]['stopped']} after {len(now[file]['tests'])} tests that passed")
                path.write_text(json.dumps({**before, **now}))
                seconds = sum(test["seconds"] for test in now[file]["tests"].values())
                self._say(f"{number} of {len(files)}: {file}: {len(now[file]['tests'])} tests pass in {seconds:.0f} s")
        return {
            name: Reach(test["seconds"], _joined(test["lines"], each["shared"]))
            for each in now.values()
            for name, test in each["tests"].items()
        }


def _joined(own: dict[str, list[int]], shared: dict[str, list[int]]) -> Lines:
    return {module: {*own.get(module, ()), *shared.get(module, ())} for module in own.keys() | shared.keys()}


def _python_files(path: Path) -> Iterable[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def digest_of(content: Iterable[object]) -> str:
    return hashlib.sha256(json.dumps(list(content)).encode()).hexdigest()[:16]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="make mistakes in the instruments, and see whether the tests notice")
    parser.add_argument("modules", nargs="*", default=list(MODULES))
    parser.add_argument("--tests", nargs="*", default=list(TESTS))
    parser.add_argument("--marks", default="(calibration or published) and not gpu and not benchmark")
    parser.add_argument("--sample", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--margin", type=float, default=6.0)
    parser.add_argument("--least", type=float, default=0.9)
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--work", type=Path, default=ROOT / "results" / "mutants")
    given = parser.parse_args()
    root, work = given.root.resolve(), given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    left_out = [f"findings/calibration/test_{name}.py" for name in LEFT_OUT]
    tests = [test for test in _matching(root, given.tests) if not any(fnmatch(test, pattern) for pattern in left_out)]
    modules = _matching(root, given.modules)
    plan = Plan(
        root, modules, tests, sorted({*modules, *_matching(root, MODULES)}), given.marks, given.sample, given.seed,
        given.seconds, given.margin, work,
    )  # fmt: skip
    content, lines = carried_out(plan)
    (work / "mutants.json").write_text(json.dumps(content, indent=1) + "\n")
    print(*lines, sep="\n", flush=True)
    sys.exit(content["power"] < given.least)


def _matching(root: Path, patterns: Iterable[str]) -> list[str]:
    found = [path for each in patterns for path in sorted(root.glob(each)) if path.name != "__init__.py"]
    return list(dict.fromkeys(str(path.relative_to(root)) for path in found))


def carried_out(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """Run pytest around the plan; what it prints goes to a file, for so it also does from the forked processes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and so ends the process that it has forked
    screen = os.fdopen(os.dup(1), "w")
    log = os.open(plan.work / "pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    random.seed(0)
    os.chdir(plan.root)
    sys.path.insert(0, str(plan.root))
    run = Run(plan, lambda line: print(line, file=screen, flush=True))
    print(f"{'module':<44} {'all':>4} killed equiv. accept. new", file=screen, flush=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as cache:
        os.environ |= {"DL_FINDINGS_CACHE": cache, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        options = [
            "-q",
            "-p",
            "no:cacheprovider",
            "--import-mode=importlib",
            f"--rootdir={plan.root}",
            *(["-m", plan.marks] if plan.marks else []),
        ]
        status = pytest.main([*options, *plan.tests], plugins=[Suite(run)])
    os.dup2(screen.fileno(), 1)
    if status != pytest.ExitCode.OK:
        sys.exit(f"the tests could not be collected ({status!r}): {plan.work / 'pytest.log'}")
    return result_of(run.outcomes)


if __name__ == "__main__":
    main()
