"""The claims as `findings/` states them, read from the source without running it.

A claim is a function with the decorator `claim(id, kind, on=...)`: its arguments name the records it is about, the
first line of its docstring is the claim, what follows says why and whence, and its body is the predicate.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lab import experiments, paths
from lab.errors import UserError
from lab.snapshots.addresses import natural

FINDINGS = paths.REPOSITORY / "findings"
CALIBRATION = "calibration"  #: tests of the instruments; what they call claims are examples
KINDS = {
    "published": "as the source states it",
    "corrected": "the form that the source's data, or better statistics, support",
    "control": "a null model or robustness check that the published form needs",
    "hypothesis": "planned or open",
}


@dataclass(frozen=True)
class Statement:
    """A claim as it stands in its file.

    Attributes:
        id: `T-2.2b`.
        kind: one of `KINDS`.
        on: the only subject it speaks of, or None.
        records: experiments whose records it takes; its verdicts are recorded with the first.
        text: the claim in plain words.
        reasons: the rest of the docstring: why this threshold, what failure means, the source.
        code: the predicate's source.
        function: name of the test.
        path: its file, relative to the findings' folder, with forward slashes.
        line: of the file.
        repeated: whether it is stated per layer, matrix, head or pair.
    """

    id: str
    kind: str
    on: str | None
    records: tuple[str, ...]
    text: str
    reasons: str
    code: str
    function: str
    path: str
    line: int
    repeated: bool

    @property
    def stem(self) -> str:
        """The id without the letters that tell siblings apart: T-2.2b and T-2.2 are both of T-2.2."""
        return re.sub(r"(?<=\d)[a-z]+$", "", self.id)


def statements(folder: Path = FINDINGS) -> list[Statement]:
    """All claims, in the order of their ids.

    Raises:
        UserError: a file that does not parse, or a claim whose id, kind or record cannot be read off.
    """
    modules = sorted(path for path in folder.rglob("test_*.py") if path.relative_to(folder).parts[0] != CALIBRATION)
    found = [statement for module in modules for statement in _of_module(module, folder)]
    return sorted(found, key=lambda statement: natural(statement.id))


def _of_module(path: Path, folder: Path) -> Iterator[Statement]:
    text = path.read_text(encoding="utf-8")
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise UserError(
            f"cannot read the claims of {path}: {error.msg} in line {error.lineno}; mend the file"
        ) from None
    constants: dict[str, object] = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in tree.body:
        decorator = _decorator(node)
        if isinstance(node, ast.FunctionDef) and decorator is not None:
            yield _statement(node, decorator, constants, text, path, folder)


def _decorator(node: ast.stmt) -> ast.Call | None:
    calls = (call for call in getattr(node, "decorator_list", ()) if isinstance(call, ast.Call))
    return next((call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "claim"), None)


def _statement(
    node: ast.FunctionDef, decorator: ast.Call, constants: dict[str, object], text: str, path: Path, folder: Path
) -> Statement:
    given = dict(zip(("id", "kind", "on"), decorator.args, strict=False))
    given |= {keyword.arg: keyword.value for keyword in decorator.keywords if keyword.arg}
    values = {name: _constant(value, constants) for name, value in given.items()}
    arguments = [argument.arg for argument in node.args.args]
    records = tuple(name for name in arguments if name in experiments.modules())
    if not isinstance(values.get("id"), str) or values.get("kind") not in KINDS or not records:
        place = f"{path}, line {node.lineno}"
        raise UserError(f"cannot read the claim {node.name} ({place}): id, kind and record must be written out")
    first, _, rest = (ast.get_docstring(node) or "").partition("\n")
    on = values.get("on")
    return Statement(
        id=str(values["id"]),
        kind=str(values["kind"]),
        on=str(on) if on is not None else None,
        records=records,
        text=first.strip(),
        reasons=rest.strip(),
        code=_code(node, text),
        function=node.name,
        path=path.relative_to(folder).as_posix(),
        line=node.lineno,
        repeated=len(arguments) > len(records),
    )


def _constant(node: ast.expr, constants: dict[str, object]) -> object:
    if isinstance(node, ast.Constant):
        return node.value
    return constants.get(node.id) if isinstance(node, ast.Name) else None


def _code(node: ast.FunctionDef, text: str) -> str:
    """The body without the docstring, as it is written, to the left margin."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not body:
        return ""
    lines = text.splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
    return "\n".join(line[4:] for line in lines)
