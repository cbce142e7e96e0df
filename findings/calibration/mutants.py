"""Mutants of a module's functions: every small mistake of a list of kinds, each at one place of the source.

What runs when a module is imported (constants, defaults of arguments, decorators) is not changed, nor are the texts of
error messages. A mutant that compiles to what the original compiles to is none.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef
COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
PAIRS = (
    ("min", "max"), ("amin", "amax"), ("nanmin", "nanmax"), ("minimum", "maximum"), ("argmin", "argmax"),
    ("any", "all"), ("floor", "ceil"), ("mean", "sum"), ("exp", "log"), ("zeros", "ones"), ("cumsum", "cumprod"),
    ("idxmin", "idxmax"), ("clamp_min", "clamp_max"), ("triu", "tril"), ("append", "extend"), ("first", "last"),
)  # fmt: skip
NAMES = {**dict(PAIRS), **{second: first for first, second in PAIRS}}
AXES = {"axis", "dim", "axes"}
#: functions of which the order of arguments does not matter
COMMUTATIVE = {"min", "max", "minimum", "maximum", "isclose", "allclose", "gcd", "hypot"}


@dataclass(frozen=True)
class Place:
    """Where an expression or statement stands: the field of its parent, and the index where that is a list."""

    parent: ast.AST
    field: str
    index: int | None

    def put(self, node: object) -> Any:
        """Put a node here; what stood here before is returned."""
        held = getattr(self.parent, self.field)
        if self.index is None:
            setattr(self.parent, self.field, node)
            return held
        before = held[self.index]
        held[self.index] = node
        return before


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        module: path of the file from the root.
        function: qualified name of the outermost function that holds it.
        statement: the first line of the statement around it.
        before, after: what is changed, as source text.
        number: tells equal ones of a function apart; from 1.
        lines: first and last line of the statement.
        code: the function's, mistaken.
    """

    module: str
    function: str
    statement: str
    before: str
    after: str
    number: int
    lines: tuple[int, int]
    code: CodeType

    @property
    def name(self) -> str:
        """What results and the list of accepted survivors call it; does not move with lines added elsewhere."""
        again = f" #{self.number}" if self.number > 1 else ""
        return f"{self.module}::{self.function}: `{self.before}` -> `{self.after}` in `{self.statement}`{again}"


def mutants_of(root: Path, module: str) -> list[Mutant]:
    """All mutants of a module, in the order of its lines."""
    path = root / module
    tree = ast.parse(path.read_text())
    original = codes(compiled(tree, path))
    seen: Counter[tuple[str, ...]] = Counter()
    found = []
    for name, function in functions(tree):
        key, known = (name, first_line(function)), set()
        for mistake in list(mistakes(function)):
            with mistake.made():
                code = attempt(tree, path).get(key)
            if code is None or code in known or not _may_replace(code, original[key]):
                continue
            known.add(code)
            words = name, mistake.statement, short(mistake.before), short(mistake.after)
            seen[words] += 1
            found.append(Mutant(module, *words, seen[words], mistake.lines, code))
    return found


# ---- functions and their code


def functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """The outermost functions of a module and its classes, with their qualified names."""

    def inside(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Function]]:
        for node in body:
            if isinstance(node, Function):
                yield prefix + node.name, node
            elif isinstance(node, ast.ClassDef):
                yield from inside(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.If, ast.Try, ast.With)):
                yield from inside(node.body, prefix)

    return inside(tree.body, "")


def first_line(function: Function) -> int:
    """As in `co_firstlineno`, which counts decorators in."""
    return min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])


def compiled(tree: ast.Module, path: Path) -> CodeType:
    return compile(tree, str(path), "exec", dont_inherit=True)


def attempt(tree: ast.Module, path: Path) -> dict[tuple[str, int], CodeType]:
    """The code of a tree that may make no sense; nothing then."""
    try:
        return codes(compiled(tree, path))
    except (SyntaxError, ValueError, OverflowError):
        return {}


def codes(code: CodeType) -> dict[tuple[str, int], CodeType]:
    """The code of all functions in a module's, by qualified name and first line."""
    found = {}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found[constant.co_qualname, constant.co_firstlineno] = constant
            found |= codes(constant)
    return found


def _may_replace(code: CodeType, original: CodeType) -> bool:
    return code.co_freevars == original.co_freevars and not same(code, original)


def same(one: CodeType, other: CodeType) -> bool:
    """Whether two functions do the same, whatever line their code stands in."""
    if one.co_code != other.co_code or one.co_names != other.co_names or len(one.co_consts) != len(other.co_consts):
        return False
    return all(
        same(a, b) if isinstance(a, CodeType) and isinstance(b, CodeType) else repr(a) == repr(b)
        for a, b in zip(one.co_consts, other.co_consts, strict=True)
    )


def short(node: ast.AST) -> str:
    """Source text of a node on one line."""
    return " ".join(ast.unparse(node).split())


# ---- mistakes


@dataclass(frozen=True)
class Mistake:
    """A node, what takes its place, and the statement around both: its first line as text, and its lines."""

    place: Place
    before: ast.AST
    after: ast.AST
    statement: str
    lines: tuple[int, int]

    @contextmanager
    def made(self) -> Iterator[None]:
        """The tree with the mistake in it."""
        self.place.put(ast.fix_missing_locations(ast.copy_location(self.after, self.before)))
        try:
            yield
        finally:
            self.place.put(self.before)


def mistakes(function: Function) -> Iterator[Mistake]:
    """What can go wrong in a function's body; its docstring is left out."""
    has_docstring = ast.get_docstring(function, clean=False) is not None
    for index, statement in enumerate(function.body):
        if index >= has_docstring:
            yield from _of_statement(Place(function, "body", index), statement)


def _of_statement(place: Place, statement: ast.stmt) -> Iterator[Mistake]:
    around = ast.unparse(statement).splitlines()[0][:100], _lines_of_head(statement)
    for mistaken in _statements_instead(statement):
        yield Mistake(place, statement, mistaken, *around)
    if isinstance(statement, (ast.If, ast.While)):
        yield Mistake(Place(statement, "test", None), statement.test, _negated(statement.test), *around)
    if not isinstance(statement, ast.Raise):
        for where, node in _expressions(statement):
            for other in _instead(node, where):
                yield Mistake(where, node, other, *around)
    for parent, field, inner in _blocks(statement):
        for index, one in enumerate(inner):
            yield from _of_statement(Place(parent, field, index), one)


def _blocks(node: ast.AST) -> Iterator[tuple[ast.AST, str, list[ast.stmt]]]:
    """The lists of statements inside a statement, with their parents and fields."""
    for field, value in ast.iter_fields(node):
        if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
            yield node, field, value
        elif isinstance(value, list):
            for child in value:
                if isinstance(child, (ast.excepthandler, ast.match_case)):
                    yield from _blocks(child)


def _lines_of_head(statement: ast.stmt) -> tuple[int, int]:
    """First and last line of a statement without the statements inside it."""
    inner = [one.lineno for _, _, block in _blocks(statement) for one in block]
    last = min(inner) - 1 if inner else statement.end_lineno or statement.lineno
    return statement.lineno, max(statement.lineno, last)


def _statements_instead(statement: ast.stmt) -> Iterator[ast.stmt]:
    """A statement left out, or another in its place."""
    match statement:
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Delete():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Subscript() | ast.Attribute()]):
            yield ast.Pass()
        case ast.Return(value=ast.expr()):
            yield ast.Return(ast.Constant(None))
        case ast.Continue():
            yield ast.Break()
        case ast.Break():
            yield ast.Continue()
    if isinstance(statement, ast.AugAssign) and type(statement.op) in OPERATORS:
        yield changed(statement, op=OPERATORS[type(statement.op)]())


def _expressions(node: ast.AST) -> Iterator[tuple[Place, ast.expr]]:
    """Every expression that belongs to a statement itself, not to those inside it; annotations and texts left out."""
    for field, value in ast.iter_fields(node):
        if isinstance(node, (ast.AnnAssign, Function)) and field != "value":
            continue
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case, ast.JoinedStr)):
                continue
            if isinstance(child, ast.expr):
                yield Place(node, field, index if isinstance(value, list) else None), child
            if isinstance(child, ast.AST):
                yield from _expressions(child)


def _instead(node: ast.expr, place: Place) -> Iterator[ast.expr]:
    """Mistaken forms of an expression."""
    match node:
        case ast.Compare(ops=[*_, operator]):
            for other in COMPARISONS[type(operator)]:
                yield changed(node, ops=[*node.ops[:-1], other()])
        case ast.BinOp(op=operator) if type(operator) in OPERATORS:
            yield changed(node, op=OPERATORS[type(operator)]())
        case ast.BoolOp():
            yield changed(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(number))):
            yield ast.Constant(0) if _is_axis(place) else ast.Constant(number)
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
            yield node.operand
        case ast.IfExp():
            yield changed(node, body=node.orelse, orelse=node.body)
        case ast.Constant():
            yield from _constants(node, place)
        case ast.Slice():
            yield from _slices(node)
        case ast.Call():
            yield from _calls(node)
        case ast.Attribute(attr=name) if name in NAMES and isinstance(place.parent, ast.Call) and place.field == "func":
            yield changed(node, attr=NAMES[name])
        case ast.Name(id=name) if name in NAMES and isinstance(place.parent, ast.Call) and place.field == "func":
            yield changed(node, id=NAMES[name])
    if place.field == "ifs":
        yield _negated(node)


def _constants(node: ast.Constant, place: Place) -> Iterator[ast.expr]:
    match node.value:
        case bool(truth):
            yield ast.Constant(not truth)
        case 0 if _is_axis(place):
            yield ast.Constant(-1)
        case int(number):
            yield ast.Constant(number + 1)
            if not isinstance(place.parent, ast.UnaryOp):
                yield ast.Constant(number - 1)
        case float(number):
            yield ast.Constant(number * 2 if number else 1.0)
        case None if isinstance(place.parent, ast.keyword):
            yield ast.Constant(0)


def _slices(node: ast.Slice) -> Iterator[ast.Slice]:
    """Ends moved by one, where they hold no number that is changed by itself; steps left out."""
    one = ast.Constant(1)
    if node.step is not None:
        yield changed(node, step=None)
    elif node.lower is not None or node.upper is not None:
        if not _holds_number(node.lower):
            yield changed(node, lower=one if node.lower is None else ast.BinOp(node.lower, ast.Add(), one))
        if not _holds_number(node.upper):
            last = ast.UnaryOp(ast.USub(), one) if node.upper is None else ast.BinOp(node.upper, ast.Sub(), one)
            yield changed(node, upper=last)


def _holds_number(node: ast.expr | None) -> bool:
    return node is not None and any(isinstance(inner, ast.Constant) for inner in ast.walk(node))


def _calls(node: ast.Call) -> Iterator[ast.expr]:
    """Arguments swapped; a range's ends moved; a function of one argument left out where it only transforms."""
    starred = any(isinstance(argument, ast.Starred) for argument in node.args)
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if len(node.args) >= 2 and not starred and called not in COMMUTATIVE:
        yield changed(node, args=[node.args[1], node.args[0], *node.args[2:]])
    match node:
        case ast.Call(func=ast.Name("range")) if not starred:
            last = min(1, len(node.args) - 1)
            fewer = ast.BinOp(node.args[last], ast.Sub(), ast.Constant(1))
            yield changed(node, args=[*node.args[:last], fewer, *node.args[last + 1 :]])
        case ast.Call(func=ast.Name("abs" | "sorted" | "reversed"), args=[argument]):
            yield argument
        case ast.Call(func=ast.Attribute(attr="abs" | "sqrt" | "square" | "sort", value=ast.Name()), args=[argument]):
            yield argument
        case ast.Call(func=ast.Attribute(attr="abs" | "sqrt" | "square" | "clone" | "copy", value=value), args=[]):
            yield value


def _is_axis(place: Place) -> bool:
    return isinstance(place.parent, ast.keyword) and place.parent.arg in AXES


def _negated(node: ast.expr) -> ast.expr:
    is_negation = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    return node.operand if is_negation else ast.UnaryOp(ast.Not(), node)


def changed(node: Any, **fields: object) -> Any:
    """A shallow copy of a node with other fields."""
    other = copy.copy(node)
    for field, value in fields.items():
        setattr(other, field, value)
    return other
