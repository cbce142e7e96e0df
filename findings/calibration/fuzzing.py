"""Damaged files, by the thousand: whatever a user hands over is read, or refused in one line; nothing else.

`python findings/calibration/fuzzing.py READER --cases 2000 --seed 0`, or `all`. Real files are damaged in bytes
(flipped, cut, doubled, zeroed) or, where they are JSON, in structure (entries lost, doubled, renamed, of another type,
out of range, nested without end). A reader may accept what is left, or raise `UserError` with a message of one line
that names the file or what it holds. Any other exception is a fault, and is printed with the case that it came from.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import shutil
import sys
import tempfile
import tomllib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import paths, published
from lab.alarms import series
from lab.corpora import completions_file, contrastive_groups, minimal_pairs, prompts, reading, source_format
from lab.corpora.byte_tokenizer import byte_tokenizer
from lab.errors import UserError
from lab.snapshots import addresses, comparison, drift, numbers, sources
from lab.subjects import catalog
from lab.subjects.configuration import tensor_shapes
from lab.subjects.gguf import facts_of_gguf
from lab.subjects.tiny import tiny
from lab.subjects.tiny_gguf import random_tensors, write_gguf

Json = Any
#: what stands in a JSON file where something else should
STRANGERS: tuple[Json, ...] = (
    None, True, 0, -1, 1e308, 10**30, math.nan, math.inf, 0.5, "", " ", "x", "\u0000", "\ud83d", "x" * 5000,
    [], {}, [[]], [None], {"x": None}, ["x"], [1, "x"], [[1], [2, 3]],
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A way in for files.

    Attributes:
        name: of the file that is damaged, in a folder of its own.
        make: writes that folder, whole; the file that is damaged may be any in it.
        read: reads it as the suite does.
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]


# ---- damage


def damaged(content: bytes, chance: random.Random) -> bytes:
    """A copy with something wrong, in bytes or, if it is JSON, in structure."""
    try:
        parsed = json.loads(content)
    except ValueError:
        return damaged_bytes(content, chance)
    if chance.random() < 0.3:
        return damaged_bytes(content, chance)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        parsed = damaged_json(parsed, chance)
    return json.dumps(parsed).encode("utf-8", "surrogatepass")


def damaged_bytes(content: bytes, chance: random.Random) -> bytes:
    """Flipped, cut, doubled, zeroed, inserted or lost bytes."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5))):
        if not data:
            break
        start = chance.randrange(min(len(data), chance.choice((64, 4096, len(data)))))
        stop = min(len(data), start + chance.choice((1, 1, 4, 8, 100)))
        match chance.randrange(6):
            case 0:
                data[start] ^= 1 << chance.randrange(8)
            case 1:
                del data[start:]
            case 2:
                data[start:start] = data[start:stop]
            case 3:
                data[start:stop] = bytes(stop - start)
            case 4:
                data[start:stop] = chance.randbytes(stop - start)
            case 5:
                del data[start:stop]
    return bytes(data)


def damaged_json(parsed: Json, chance: random.Random) -> Json:
    """The tree, changed where it lies: one place lost, doubled, renamed, exchanged or taken by a stranger."""
    places = list(_places(parsed))
    if not places:
        return copy.deepcopy(chance.choice(STRANGERS))
    parent, at = chance.choice(places)
    match chance.randrange(7):
        case 0:
            del parent[at]
        case 1 | 2 | 3:
            parent[at] = copy.deepcopy(chance.choice(STRANGERS))
        case 4 if isinstance(parent, list):
            parent.insert(at, copy.deepcopy(parent[at]))
        case 4:
            parent[f"{at} "] = parent.pop(at)
        case 5:
            other, there = chance.choice(places)
            parent[at] = copy.deepcopy(other[there])
        case 6:
            for _ in range(chance.choice((1, 3, 100))):
                parent[at] = [parent[at]]
    return parsed


def _places(tree: Json) -> Iterator[tuple[Any, Any]]:
    """Every (parent, key or index) of a tree; of long lists the first few and the last."""
    waiting = [tree]
    while waiting:
        parent = waiting.pop()
        if isinstance(parent, dict):
            keys: list[Any] = list(parent)
        elif isinstance(parent, list):
            keys = sorted({*range(min(4, len(parent))), *range(max(0, len(parent) - 1), len(parent))})
        else:
            continue
        for key in keys:
            yield parent, key
            waiting.append(parent[key])


# ---- what is read

SUBJECT = "smollm2-135m-instruct"


def copied(path: Path) -> Callable[[Path], object]:
    return lambda folder: shutil.copy(path, folder / path.name)


def few_completions(folder: Path) -> None:
    whole = completions_file.read(reading.committed_path(SUBJECT))
    few = completions_file.CompletionsFile(whole.settings, whole.system_message, whole.completions[:3])
    completions_file.write(folder / "completions.json", few)


def source_completions(folder: Path) -> None:
    """A file in the form of hivaze/dl-experiments, over the bytes of a tiny tokenizer."""
    tokenizer, entries = byte_tokenizer(), []
    for index, (asked, said) in enumerate((("Name a river.", "The Rhine."), ("Count to three.", "One, two, three."))):
        prompt_ids, ids = tokenizer(f"user: {asked} ->")["input_ids"], tokenizer(said)["input_ids"]
        entries.append(
            {
                "idx": index, "category": "factual", "prompt": asked, "templated_prompt": f"user: {asked} ->",
                "completion": said, "full_text": f"user: {asked} ->{said}", "prompt_token_ids": prompt_ids,
                "completion_token_ids": ids, "full_token_ids": prompt_ids + ids,
                "prompt_token_count": len(prompt_ids), "completion_token_count": len(ids),
            }
        )  # fmt: skip
    config = {
        "model": "m", "max_new_tokens": 64, "temperature": 0.0, "num_prompts": len(entries),
        "total_prompt_tokens": sum(entry["prompt_token_count"] for entry in entries),
        "total_completion_tokens": sum(entry["completion_token_count"] for entry in entries),
    }  # fmt: skip
    (folder / "completions.json").write_text(json.dumps({"config": config, "completions": entries}))


def read_source(path: Path) -> None:
    from lab import files

    source_format.parse(files.read_json(path, "completions file"), path, byte_tokenizer(), "tiny")


def read_snapshot(path: Path) -> None:
    """As the drift gate, `--against` and the atlas read it, beside the whole one."""
    whole = addresses.load(SNAPSHOT)
    found = addresses.load(path)
    for before, after in ((found, whole), (whole, found)):
        if before.get("numbers") and after.get("numbers"):
            drift.report(before, after)
            comparison.report(before, after)
    if found.get("numbers"):
        numbers.to_record(found)
        numbers.parse(numbers.dump(found))


SNAPSHOT = addresses.Address(SUBJECT, "quick-bfloat16", "activation_patching").path


def write_verdicts(folder: Path) -> None:
    rows = [
        {"claim": "T-1.1", "experiment": "logit_lens", "subject": SUBJECT, "source": "measured", "where": where,
         "verdict": "holds", "measured": "1", "threshold": "< 2", "support": 1.0}
        for where in (None, "L03")
    ]  # fmt: skip
    (folder / "verdicts.json").write_text(json.dumps(rows))


def read_published(path: Path) -> None:
    published._document.cache_clear()
    published.read(path)


def save_tiny(folder: Path) -> None:
    tiny("llama").save_pretrained(folder)


def read_folder(path: Path) -> None:
    catalog.facts_of_model(path.parent)


def read_entries(path: Path) -> None:
    """The catalog's tables, damaged in structure; JSON that does not parse is no concern of the catalog."""
    try:
        tables = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return
    catalog.read_tables(tables)


def write_entries(folder: Path) -> None:
    (folder / "catalog.json").write_text(json.dumps(tomllib.loads(CATALOG.read_text())))


CATALOG = Path(catalog.__file__).with_name("catalog.toml")

READERS = {
    "completions": Reader(
        "completions.json", few_completions, lambda path: reading.read_completions(catalog.facts(SUBJECT), None, path)
    ),
    "source completions": Reader("completions.json", source_completions, read_source),
    "prompts": Reader("prompts.json", copied(prompts.default_path()), prompts.load_prompts),
    "contrastive groups": Reader(
        "contrastive_groups.json",
        copied(contrastive_groups.default_path()),
        contrastive_groups.load_contrastive_groups,
    ),
    "minimal pairs": Reader(
        "minimal_pairs.json", copied(minimal_pairs.default_path()), minimal_pairs.load_minimal_pairs
    ),
    "snapshot": Reader(SNAPSHOT.name, copied(SNAPSHOT), read_snapshot),
    "verdicts": Reader("verdicts.json", write_verdicts, lambda path: sources.read(str(path))),
    "published figures": Reader(
        "quantization.json", copied(paths.DATA / "published" / "quantization.json"), read_published
    ),
    "alarms": Reader("alarms.json", copied(series.TABLE), series.read),
    "catalog": Reader(CATALOG.name, copied(CATALOG), catalog.read),
    "catalog entries": Reader("catalog.json", write_entries, read_entries),
    "configuration": Reader("config.json", save_tiny, read_folder),
    "safetensors": Reader("model.safetensors", save_tiny, tensor_shapes),
    "gguf": Reader("tiny.gguf", lambda folder: write_gguf(folder / "tiny.gguf", random_tensors()), facts_of_gguf),
}


# ---- the trials


def tried(reader: Reader, path: Path) -> str | None:
    """What is wrong with the reader's answer to this file; None if nothing."""
    try:
        reader.read(path)
    except UserError as error:
        said = str(error)
        one_line = said.strip() and len(said.splitlines()) == 1
        return None if one_line else f"a message of {len(said.splitlines())} lines: {said[:200]!r}"
    except Exception:  # what is looked for: it is reported as a fault
        return traceback.format_exc(limit=-4)
    return None


def trials(name: str, cases: int, seed: int, show: int = 3) -> list[str]:
    """Damage a reader's file so many times; the first faults, each with the number of its case."""
    reader, found = READERS[name], []
    with tempfile.TemporaryDirectory(prefix="fuzzing-") as scratch:
        folder = Path(scratch)
        reader.make(folder)
        path = folder / reader.name
        whole = path.read_bytes()
        if fault := tried(reader, path):
            return [f"{name}: the whole file is refused: {fault}"]
        for case in range(cases):
            path.write_bytes(damaged(whole, random.Random(f"{name} {seed} {case}")))
            if fault := tried(reader, path):
                found.append(f"{name}, case {case} of seed {seed}: {fault}")
                if len(found) == show:
                    break
    return found


def main() -> None:
    """The command line; exits with 1 if a reader failed."""
    parser = argparse.ArgumentParser(description="damage files and read them")
    parser.add_argument("reader", choices=(*READERS, "all"))
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    failed = False
    for name in READERS if given.reader == "all" else (given.reader,):
        faults = trials(name, given.cases, given.seed)
        failed |= bool(faults)
        print(
            *faults or [f"{name}: {given.cases} damaged files, each read or refused in one line"], sep="\n", flush=True
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
