"""`python -m lab drift A B`: what moved between two sets of results."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

Before = Annotated[str, typer.Argument(metavar="A", help="Results before.")]
After = Annotated[str, typer.Argument(metavar="B", help="Results after.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print Markdown.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write all of it as JSON.")]


def drift(before: Before, after: After, markdown: Markdown = False, json: Json = None) -> None:
    """Compare two sets of results: numbers beyond their tolerance, verdicts, experiments that came or went.

    A and B are two files of verdicts (pytest's --verdicts), or two sets of snapshots: a folder, WORKTREE (this
    checkout), or a git revision, which is read without checking it out. Numbers are held to this checkout's
    tolerances; a file of verdicts holds none, so of it verdicts are compared.

    Exit code: 0 no drift, 1 drift, 2 bad input. Other provenance alone is reported and is no drift.
    """
    from lab import files
    from lab.errors import UserError
    from lab.snapshots import differences, documents, sources

    (kind, old), (other_kind, new) = sources.read(before), sources.read(after)
    if kind != other_kind:
        raise UserError(f"{before} holds {kind} and {after} holds {other_kind}; compare two of a kind")
    found = differences.compare(old, new)
    conclusion = documents.conclusion(found, before, after)
    if json is not None:
        content = {"before": before, "after": after, "differences": differences.in_json(found)}
        files.write_text(json, json_format.dumps(content, indent=1, ensure_ascii=False) + "\n")
    lines = [f"### {conclusion}", *documents.markdown(found)] if markdown else [*documents.text(found), conclusion]
    typer.echo("\n".join(lines))
    if any(difference.is_drift for difference in found):
        raise typer.Exit(1)
