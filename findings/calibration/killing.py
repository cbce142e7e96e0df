"""kill -9 at random moments: what was recorded stays, nothing half-written is read, and the next run succeeds.

`python findings/calibration/killing.py WORK --kills 40 --seed 0`, or `all` for every kind of work. A kind of work
writes files as the suite does, with the suite's own functions, on tiny models. It is done in a forked process, which
is killed after a random share of the time that it takes; then

- every file that a reader can find is as it was before, or as the work leaves it, and no reading fails;
- the same work, not killed this time, succeeds and leaves what it always leaves.

Processes are forked from one that has imported everything and runs a single thread: a hundred kills take a minute.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

from tqdm import tqdm

from fixtures.snapshots import Snapshots
from lab import files
from lab.corpora import completions, completions_file, generation_transformers, prompts
from lab.corpora.byte_tokenizer import byte_tokenizer
from lab.corpora.generator import Answer, Generation
from lab.experiments.layers import layer_knockout
from lab.report import site
from lab.snapshots import addresses, numbers
from lab.store import Store
from lab.subjects import fetching, weights
from lab.subjects.catalog import facts_of_model
from lab.subjects.tiny import loaded, random_corpus, tiny
from lab.subjects.tiny_gguf import random_tensors, write_gguf
from lab.subjects.uncatalogued import named_model

HUNG = 120  #: seconds after which work that takes less than one has hung

#: what a reader finds: name -> digest of the content
State = dict[str, str]

BUDGET = layer_knockout.Budget(None, None, 2, None, (1, 2), batch_tokens=16)


@dataclass(frozen=True)
class Work:
    """Something that leaves files behind.

    Attributes:
        prepare: makes what the work reads, once per folder.
        do: the work; rounds 0, 1, 2, ... follow each other in one folder.
        read: everything that is there to be read. Names begin with the round where rounds leave separate things.
        replaces: whether every round replaces what the last one left, by one of two contents.
        gap: whether there is a moment without the old and the new content.
    """

    prepare: Callable[[Path], object]
    do: Callable[[Path, int], object]
    read: Callable[[Path], State]
    replaces: bool = False
    gap: bool = False

    def expected(self, turn: int, alone: list[State]) -> State:
        """What a round leaves, known from rounds 0 and 1 in folders of their own."""
        return alone[turn % 2] if self.replaces else {f"{turn}": state for state in alone[0].values()}


def digest(content: object) -> str:
    """A short digest of anything that prints in full."""
    data = content if isinstance(content, bytes) else repr(content).encode()
    return hashlib.sha256(data).hexdigest()[:16]


# ---- measuring: shards and a record in the store


def record_of(folder: Path, turn: int, measure: Callable[..., object]) -> str:
    data = Store(folder / "records").record("layer_knockout", {"turn": turn}, measure)  # type: ignore[arg-type]
    return digest(sorted((str(name), data[name].values.tolist()) for name in data.variables))


def measure(folder: Path, turn: int) -> None:
    record_of(folder, turn, lambda sweep: layer_knockout.measure(loaded(tiny("llama")), random_corpus(), BUDGET, sweep))


def read_records(folder: Path) -> State:
    turns = range(len(list((folder / "records" / "layer_knockout").glob("*.nc.lock"))) + 1)
    there = [turn for turn in turns if Store(folder / "records").path("layer_knockout", {"turn": turn}).exists()]

    def unwanted(sweep: object) -> None:
        raise AssertionError("a record that is there was measured again")

    return {f"{turn}": record_of(folder, turn, unwanted) for turn in there}


# ---- converting: a GGUF file into a model's folder in the cache


def write_source(folder: Path) -> None:
    write_gguf(folder / "tiny.gguf", random_tensors())


def cache(folder: Path, turn: int) -> patch.dict:  # type: ignore[name-defined, type-arg]
    return patch.dict(os.environ, {"DL_FINDINGS_CACHE": str(folder / f"cache-{turn}")})


def convert(folder: Path, turn: int) -> None:
    with cache(folder, turn):
        fetching.fetch(replace(facts_of_model(folder / "tiny.gguf"), tied=True))


def read_models(folder: Path) -> State:
    found = {}
    for path in sorted(folder.glob("cache-*")):
        turn = int(path.name.removeprefix("cache-"))
        with cache(folder, turn):
            model = weights.location(facts_of_model(folder / "tiny.gguf"))
            if model is not None:
                found[f"{turn}"] = digest([weights.weights_digest(model), files.sha256(model / "tokenizer.json")])
    return found


# ---- completing: a model's answers to the prompts


def save_model(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    ends = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    tiny("llama", **ends).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def in_this_process(generator, model, asked, end_ids, max_tokens, log, device):  # type: ignore[no-untyped-def]
    request = {"model": str(model), "dtype": "float32", "end_ids": end_ids, "max_tokens": max_tokens}
    answers = generation_transformers.generate({**request, "prompts": [list(ids) for ids in asked]})
    return Generation(tuple(Answer(tuple(each["ids"]), each["finish_reason"]) for each in answers), {})


def complete(folder: Path, turn: int) -> None:
    three = replace(prompts.load_prompts(), prompts=prompts.load_prompts().prompts[:3])
    with ExitStack() as patches:
        patches.enter_context(cache(folder, 0))
        patches.enter_context(patch.object(completions, "generate", in_this_process))
        patches.enter_context(patch.object(prompts, "load_prompts", lambda: three))
        model = folder / "model"
        completions.complete(named_model(model), model, folder / "answers" / f"{turn}.json", "transformers", 4)


def read_answers(folder: Path) -> State:
    paths = (folder / "answers").glob("*.json")
    return {path.stem: digest([entry.completion_token_ids for entry in completions_file.read(path).completions])
            for path in paths}  # fmt: skip


# ---- recording: numbers and verdicts in a snapshot


def content(turn: int) -> dict[str, object]:
    values = [float(turn % 2)] * 2000
    loss = {"unit": "nat", "dims": ["n"], "coords": {"n": list(range(2000))}, "values": values}
    named = {"experiment": "toy", "subject": "tiny", "condition": "quick-bfloat16", "provenance": {}}
    return {**named, "numbers": {"loss": loss}}


def record(folder: Path, turn: int) -> None:
    with cache(folder, 0):
        noted = Snapshots()
        noted.note_numbers(folder / "snapshot.json", numbers.dump(content(turn)))
        for claim in range(100):
            noted.note_verdict(
                folder / "snapshot.json", f"T-1.{claim}", None, {"verdict": ["holds", "refuted"][turn % 2]}
            )
        noted.write()


def read_snapshot(folder: Path) -> State:
    found = addresses.load(folder / "snapshot.json")
    return {"snapshot": digest(json.dumps(found, sort_keys=True))} if found else {}


# ---- reporting: the atlas's folder


def report(folder: Path, turn: int) -> None:
    page = f"<p>{turn % 2}</p>".encode() * 2000
    site.write({f"pages/{number}.html": page for number in range(100)}, folder / "atlas")


def read_site(folder: Path) -> State:
    if not (folder / "atlas").exists():
        return {}
    paths = sorted(path for path in (folder / "atlas").rglob("*") if path.is_file())
    return {"atlas": digest([(path.name, path.read_bytes()) for path in paths])}


WORKS = {
    "measuring": Work(lambda folder: None, measure, read_records),
    "converting": Work(write_source, convert, read_models),
    "completing": Work(save_model, complete, read_answers),
    "recording": Work(lambda folder: None, record, read_snapshot, replaces=True),
    "reporting": Work(lambda folder: None, report, read_site, replaces=True, gap=True),
}


# ---- killing


def fork(task: Callable[[], object]) -> int:
    """Begin a task in a process of its own; the process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        task()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def seconds_of(task: Callable[[], object], what: str) -> float:
    """Do a task to its end, in a process of its own, and say how long it took; raises if it fails."""
    started = time.perf_counter()
    child = fork(task)
    ended, status = os.waitpid(child, os.WNOHANG)
    while not ended:
        if time.perf_counter() - started > HUNG:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"{what} hung")
        time.sleep(0.001)
        ended, status = os.waitpid(child, os.WNOHANG)
    if status:
        raise AssertionError(f"{what} ended with {os.waitstatus_to_exitcode(status)} though nothing killed it")
    return time.perf_counter() - started


def killed_after(seconds: float, task: Callable[[], object], what: str) -> bool:
    """Begin a task and kill it; whether it was still at work."""
    child = fork(task)
    time.sleep(seconds)
    try:
        os.kill(child, signal.SIGKILL)
    finally:
        _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise AssertionError(f"{what} failed before it was killed")
    return os.WIFSIGNALED(status)


def import_what_it_takes(work: Work, folder: Path) -> None:
    """Import the modules of a kind of work, which it would else import again in every child.

    The work itself is never done in this process: a child forked beside threads, or after PyTorch has made its pool
    of them, may fail or hang, as no process of a user's does.
    """
    folder.mkdir(parents=True)

    def learn() -> None:
        work.prepare(folder)
        work.do(folder, 0)
        (folder / "modules").write_text("\n".join(sys.modules))

    seconds_of(learn, "a first round")
    for name in (folder / "modules").read_text().splitlines():
        if name not in sys.modules and find_spec(name.partition(".")[0]) is not None:
            with suppress(ImportError):  # some modules are made, not found
                import_module(name)


def try_to_break(name: str, kills: int, seed: int, root: Path) -> str:
    """Kill one kind of work so many times; what was done, in a line.

    Raises:
        AssertionError: something was lost or half-written, or a later run failed.
    """
    work, moments = WORKS[name], random.Random(f"{name} {seed}")
    import_what_it_takes(work, root / name / "first")
    alone = []
    for turn in (0, 1):
        folder = root / name / f"alone-{turn}"
        folder.mkdir(parents=True)
        seconds_of(partial(work.prepare, folder), "preparing")
        usual = seconds_of(partial(work.do, folder, turn), f"round {turn} alone")
        alone.append(work.read(folder))
    folder = root / name / "killed"
    folder.mkdir()
    seconds_of(partial(work.prepare, folder), "preparing")
    turn = struck = 0
    while struck < kills:
        before, wanted = work.read(folder), work.expected(turn, alone)
        task = partial(work.do, folder, turn)
        struck += killed_after(moments.uniform(0, usual), task, f"round {turn}")
        after = work.read(folder)
        for part in before.keys() | after.keys() | wanted.keys():
            allowed = {before.get(part), wanted.get(part, before.get(part))} | ({None} if work.gap else set())
            assert after.get(part) in allowed, f"{name}, round {turn}: {part} is neither old nor new after a kill"
        usual = (usual + seconds_of(task, f"round {turn}")) / 2
        assert work.read(folder) == before | wanted, f"{name}, round {turn}: the next run left something else"
        turn += 1
    return f"{name}: {struck} kills in {turn} rounds of {usual:.2f} s; nothing lost, nothing half-written"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="kill the suite's work at random moments")
    parser.add_argument("work", choices=(*WORKS, "all"))
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # tqdm's own lock is shared between forked processes: one that is killed while it draws would lock out all others
    tqdm.set_lock(threading.RLock())
    root = Path(tempfile.mkdtemp(prefix="killing-"))
    try:
        for name in WORKS if given.work == "all" else (given.work,):
            print(try_to_break(name, given.kills, given.seed, root), flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
