"""Where a subject's weights lie, and what identifies them; `lab.subjects.fetching` brings them there."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path

from lab import files, paths
from lab.adapters.names import WEIGHTS
from lab.errors import UserError
from lab.subjects import configuration
from lab.subjects.catalog import catalog
from lab.subjects.facts import Adapted, Facts, Hub, Local, Wheels
from lab.subjects.gguf import CONVERSION

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
            return _whole(converted_folder(facts))
        case Adapted():
            folder = adapted_folder(facts)
            return folder and _whole(folder)


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


def converted_folder(facts: Facts) -> Path:
    """Where the safetensors of a GGUF file lie, or would lie."""
    source = facts.source
    if isinstance(source, Wheels):
        identity = source.sha256
    elif isinstance(source, Local):
        identity = _file_digest(source.path)
    else:
        raise TypeError(f"{source} is not converted")
    return paths.cache() / "subjects" / facts.name / f"{identity[:12]}-{CONVERSION}"


def adapted_folder(facts: Facts) -> Path | None:
    """Where a subject with an adapter merged into it lies, or would lie; None without its base or the adapter."""
    assert isinstance(facts.source, Adapted)
    base = location(catalog()[facts.source.base])
    adapter = paths.DATA / "specimens" / facts.source.specimen / WEIGHTS
    if base is None or not adapter.is_file():
        return None
    identity = hashlib.sha256(f"{weights_digest(base)}\0{files.sha256(adapter)}".encode()).hexdigest()
    return paths.cache() / "subjects" / facts.name / identity[:12]


def _whole(folder: Path) -> Path | None:
    return folder if (folder / MANIFEST).exists() else None
