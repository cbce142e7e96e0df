"""Where two sets of results are compared from: files of verdicts, folders of snapshots, git revisions.

A revision's snapshots are read out of git's objects; nothing is checked out. A file of verdicts (`--verdicts`)
is read as snapshots that hold no numbers.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from lab import files, paths
from lab.errors import UserError
from lab.snapshots.addresses import WHAT, Address, checked, key, load

WORKTREE = "WORKTREE"
VERDICTS = "file of verdicts"
KINDS = "a file of verdicts, a folder of snapshots, WORKTREE, or a git revision"

VALUE = (str, int, float, list, type(None))

Contents = dict[Address, dict[str, Any]]


def read(name: str) -> tuple[str, Contents]:
    """What a name on the command line stands for.

    Args:
        name: a file of verdicts, a folder that holds `<subject>/<condition>/<experiment>.json`, `WORKTREE` (the
            snapshots as they lie in this checkout), or a git revision of this repository, in this order.

    Returns:
        `verdicts` or `snapshots`, and the contents.

    Raises:
        UserError: it is none of these, or cannot be read.
    """
    if name == WORKTREE:
        return "snapshots", _of_folder(paths.SNAPSHOTS)
    path = Path(name)
    if path.is_file():
        return "verdicts", _of_verdicts(path)
    if path.is_dir():
        return "snapshots", _of_folder(path)
    return "snapshots", _of_revision(name)


def _of_verdicts(path: Path) -> Contents:
    rows = files.read_json(path, VERDICTS)
    if not isinstance(rows, list) or not all(map(_is_row, rows)):
        raise UserError(f"the {VERDICTS} {path} is not what pytest's --verdicts writes; write it again")
    found: Contents = {}
    for row in rows:
        content = found.setdefault(Address(row["subject"], row["source"], row["experiment"]), {"verdicts": {}})
        if row["verdict"] is not None:
            known = {name: row.get(name) for name in ("verdict", "measured", "threshold", "support")}
            content["verdicts"][key(row["claim"], row["where"])] = known
    return found


def _is_row(row: Any) -> bool:
    """Whether this is a claim's row: names in words; place and verdict in words, or null."""
    if not isinstance(row, dict):
        return False
    named = all(isinstance(row.get(name), str) for name in ("claim", "experiment", "subject", "source"))
    judged = all(name in row and isinstance(row[name], str | None) for name in ("where", "verdict"))
    return named and judged and all(isinstance(row.get(name), VALUE) for name in ("measured", "threshold", "support"))


def _of_folder(folder: Path) -> Contents:
    found = {_address(path.relative_to(folder)): load(path) for path in sorted(folder.glob("*/*/*.json"))}
    if not found:
        raise UserError(f"the folder {folder} holds no snapshots (<subject>/<condition>/<experiment>.json)")
    return found


def _of_revision(name: str) -> Contents:
    commit = _commit(name)
    root = Path(_git("rev-parse", "--show-toplevel").decode().strip())
    folder = paths.SNAPSHOTS.resolve().relative_to(root.resolve())
    listed = _git("ls-tree", "-r", "-z", "--full-tree", "--name-only", commit, "--", folder.as_posix())
    named = [Path(entry.decode()) for entry in listed.split(b"\0") if entry]
    named = [path for path in named if path.suffix == ".json" and len(path.relative_to(folder).parts) == 3]
    if not named:
        raise UserError(f"the revision {name} holds no snapshots in {folder}/")
    return {_address(path.relative_to(folder)): _blob(commit, path, name) for path in named}


def _blob(commit: str, path: Path, name: str) -> dict[str, Any]:
    place = f"{name}:{path.as_posix()}"
    try:
        return checked(json.loads(_git("show", f"{commit}:{path.as_posix()}")), place)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the {WHAT} {place} is not whole JSON ({error}); compare another revision") from error


def _commit(name: str) -> str:
    if _git("rev-parse", "--is-inside-work-tree", refused=b"").strip() != b"true":
        raise UserError(f"{name} is neither a file nor a folder, and this is not a git repository; give {KINDS}")
    asked = ("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    commit = _git(*asked, refused=b"").decode().strip()
    if not commit:
        raise UserError(f"unknown revision {name!r}: it is neither a file, a folder nor a commit here; give {KINDS}")
    return commit


def _git(*arguments: str, refused: bytes | None = None) -> bytes:
    """What a git command prints; `refused` where git says no, else that is an error."""
    try:
        done = subprocess.run(["git", "-C", str(paths.REPOSITORY), *arguments], capture_output=True, check=False)
    except OSError as error:
        raise UserError(f"git cannot be run ({error.strerror or error}); install it, or compare folders") from error
    if done.returncode == 0:
        return done.stdout
    if refused is not None:
        return refused
    said = done.stderr.decode(errors="replace").strip().splitlines()
    raise UserError(f"git {arguments[0]} failed ({said[0] if said else done.returncode}); compare folders instead")


def _address(path: Path) -> Address:
    subject, condition, file = path.parts
    return Address(subject, condition, file.removesuffix(".json"))
