"""Files that are whole or absent: atomic writes, locks, digests, and JSON with one-line errors."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from lab.errors import UserError


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; it takes the target's name only if the block succeeds.

    The content is flushed to disk before the rename, so that a reader sees the old file or the
    new one, whatever kills the writer.
    """
    part: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        os.close(descriptor)
        part = Path(name)
        yield part
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        part.chmod(0o666 & ~_umask())
        os.replace(part, target)
    except OSError as error:
        raise _cannot_write(target, error) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Replace `target` by `text`, whole or not at all."""
    with atomic_path(target) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the inter-process lock that belongs to `target` (a file `<target>.lock` beside it)."""
    lock = FileLock(f"{target}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise _cannot_write(target, error) from error
    try:
        yield
    finally:
        lock.release()


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file; `what` names it in the error, e.g. "snapshot" or "completions file"."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the {what} {path} is not UTF-8 text; restore it or make it again") from error
    if not text.strip():
        raise UserError(f"the {what} {path} is empty; restore it or make it again")
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"the {what} {path} is not whole JSON ({error}); restore it or make it again") from error


def _cannot_write(target: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {target}: {error.strerror or error}; free some space or choose another folder")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
