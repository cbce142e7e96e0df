"""The atlas as a folder: pages, style, script and downloads, written whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from lab import files
from lab.errors import UserError
from lab.report.data import downloads
from lab.report.pages import HERE, pages
from lab.report.results import Results

#: lists what a site consists of, by which we know our own folders again
MANIFEST = "atlas.json"
OTHER = "choose another folder with -o"


def build(results: Results) -> dict[str, bytes]:
    """Every file of the site, by its path in it."""
    return dict(_files(results))


def write(site: Mapping[str, bytes], folder: Path) -> Path:
    """Put the site in place of the folder: the new one stands there whole, or the old one stays.

    Raises:
        UserError: the folder holds anything that the atlas did not write, or cannot be written.
    """
    folder = folder.absolute()
    require_writable(folder)
    with files.locked(folder):
        _require_own(folder)
        try:
            _replace(folder, site)
        except OSError as error:
            remedy = f"free some space or {OTHER}"
            raise UserError(f"cannot write the atlas to {folder}: {error.strerror or error}; {remedy}") from error
    return folder


def require_writable(folder: Path) -> None:
    """Refuse a folder whose place cannot be written to.

    Raises:
        UserError: nothing can be made beside it.
    """
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write the atlas to {folder}: {error.strerror or error}; {OTHER}") from error


def size(site: Mapping[str, bytes]) -> int:
    """Bytes of the whole site."""
    return sum(map(len, site.values()))


def _files(results: Results) -> Iterator[tuple[str, bytes]]:
    for path, text in pages(results):
        yield path, text.encode()
    yield from downloads(results)
    for asset in ("atlas.css", "atlas.js"):
        yield f"assets/{asset}", (HERE / "assets" / asset).read_bytes()


def _require_own(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir() or folder.is_symlink():
        raise UserError(f"{folder} is no folder; {OTHER}")
    there = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    if there and MANIFEST not in there:
        raise UserError(f"{folder} holds files and is no atlas; {OTHER}")
    strange = sorted(there - _listed(folder) - {MANIFEST})
    if strange:
        raise UserError(f"{folder} holds {strange[0]}, which the atlas did not write; move it, or {OTHER}")


def _listed(folder: Path) -> set[str]:
    if not (folder / MANIFEST).exists():
        return set()
    listed = files.read_json(folder / MANIFEST, "list of the atlas's files")
    if not isinstance(listed, list):
        raise UserError(f"{folder / MANIFEST} is no list of files; remove the folder, or choose another with -o")
    return set(map(str, listed))


def _replace(folder: Path, site: Mapping[str, bytes]) -> None:
    parts = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        new, old = parts / "new", parts / "old"
        for path, content in site.items():
            (new / path).parent.mkdir(parents=True, exist_ok=True)
            (new / path).write_bytes(content)
        (new / MANIFEST).write_text(json.dumps(sorted(site), indent=0) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(parts, ignore_errors=True)
