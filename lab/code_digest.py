"""Digests of code: which instruments a record was measured with.

A record's key holds the digest of everything that could change its numbers, and nothing else. Comments and
docstrings cannot, so that explaining an instrument better does not have every model measured again.
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from functools import cache
from pathlib import Path

from lab import paths

#: First line, first column, last line, last column: lines count from 1, columns are bytes from 0, as `ast` has them.
Span = tuple[int, int, int, int]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def code_digest(module: str) -> str:
    """Digest of a lab module's code together with every lab module it imports, however deep.

    Imports inside functions count too, so an experiment is tied to the instruments that it loads
    only when it measures.
    """
    digest = hashlib.sha256()
    for path in sorted(_sources(_file(module))):
        digest.update(path.relative_to(paths.REPOSITORY).as_posix().encode() + b"\0" + code_of(path.read_text("utf-8")))
    return digest.hexdigest()


@cache
def code_of(source: str) -> bytes:
    """Python source without comments, docstrings, blank lines and spaces at the ends of lines."""
    lines = source.encode().splitlines()
    for first, start, last, end in sorted([*_docstrings(source), *_comments(source)], reverse=True):
        lines[first - 1 : last] = [lines[first - 1][:start] + lines[last - 1][end:]]
    return b"".join(line.rstrip() + b"\n" for line in lines if line.strip())


def _docstrings(source: str) -> list[Span]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            assert text.end_lineno is not None
            assert text.end_col_offset is not None
            found.append((text.lineno, text.col_offset, text.end_lineno, text.end_col_offset))
    return found


def _comments(source: str) -> list[Span]:
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            start = len(token.line[:column].encode())
            found.append((line, start, line, start + len(token.string.encode())))
    return found


def _sources(start: Path | None) -> set[Path]:
    found: set[Path] = set()
    waiting = [start] if start else []
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [file for name in _imports(path.read_text("utf-8")) if (file := _file(name))]
    return found


@cache
def _imports(source: str) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(name for name in names if name.split(".")[0] == "lab")


def _file(module: str) -> Path | None:
    base = paths.REPOSITORY.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)
