"""A specimen as a whole model: its base with the adapter merged, in a folder like any other checkpoint's."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from lab.adapters import lora
from lab.errors import NotApplicable, UserError
from lab.subjects.catalog import facts
from lab.subjects.loading import LoadedSubject, load
from lab.training import specimens
from lab.training.recipes import Recipe


def write_checkpoint(one: Recipe, folder: Path) -> Path:
    """Write the adapted model and its tokenizer to a new folder; `pytest findings --model FOLDER` then measures it.

    Raises:
        UserError: the folder is there already, or the specimen or the weights of its subject are not.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already; remove it or choose another folder")
    names = [one.name] if one.base is None else [one.base, one.name]
    require_adapters(names)
    return save_merged(load(facts(one.subject), "bfloat16"), names, folder)


def require_adapters(names: Sequence[str]) -> None:
    """Refuse adapters that are not here, or not those of the manifest.

    Raises:
        UserError: names the first, and the command that makes it.
    """
    try:
        specimens.require(names)
    except NotApplicable as error:  # a claim would be skipped; whoever asks for a model is told
        raise UserError(str(error)) from error


def save_merged(subject: LoadedSubject, names: list[str], folder: Path) -> Path:
    """Merge adapters into a loaded subject, in their order, and save it, whole or not at all."""
    for name in names:
        lora.merge(subject.decoder, lora.read_factors(subject.decoder, specimens.folder(name)))
    part = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(part, ignore_errors=True)
    try:
        subject.model.save_pretrained(part)
        subject.tokenizer.save_pretrained(part)
        part.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder
