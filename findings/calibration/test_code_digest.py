"""Digests of code: a record's key follows its instruments' code, and nothing that cannot change a number."""

import io
import tokenize
from pathlib import Path

import pytest

from lab import code_digest as module_under_test
from lab import paths
from lab.code_digest import code_digest, code_of

pytestmark = pytest.mark.calibration

PLAIN = '''
import math


class Scale:
    def __call__(self, x):
        return "# not a comment" + x


async def run():
    """%s"""
    return 1
'''
EXPLAINED = '''
"""A module."""  # with a remark: café

import math  # for later


class Scale:  # é
    """Says
    much."""

    def __call__(self, x):
        'one "line"'

        # a comment
        return "# not a comment" + x  # ü and more


async def run():
    """Another text."""
    return 1
'''


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A small lab: experiment -> (inside a function) instrument -> base; and a module that nobody imports."""
    texts = {
        "experiment": "def measure():\n    from lab.instrument import run\n",
        "instrument": "import lab.base\n",
        "base": "x = 1\n",
        "bystander": "y = 1\n",
    }
    (tmp_path / "lab").mkdir()
    for name, text in texts.items():
        (tmp_path / "lab" / f"{name}.py").write_text(text)
    monkeypatch.setattr(paths, "REPOSITORY", tmp_path)
    code_digest.cache_clear()
    yield tmp_path / "lab"
    code_digest.cache_clear()


@pytest.mark.parametrize(
    ("module", "counts"), [("experiment", True), ("instrument", True), ("base", True), ("bystander", False)]
)
def test_a_records_key_follows_the_source_of_its_instruments(sources, module, counts):
    before = code_digest("lab.experiment")
    with open(sources / f"{module}.py", "a") as file:
        file.write("z = 2\n")
    code_digest.cache_clear()
    assert (code_digest("lab.experiment") != before) == counts


def test_comments_docstrings_and_blank_lines_are_no_code():
    assert code_of(PLAIN) == code_of(EXPLAINED)
    assert b"# not a comment" in code_of(PLAIN)
    assert b"remark" not in code_of(EXPLAINED)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"# not a comment"', '"# another text"'),
        ("return 1", "return 2"),
        ("import math", "import cmath"),
        ("async ", ""),
    ],
)
def test_everything_else_is_code(before, after):
    assert code_of(PLAIN.replace(before, after)) != code_of(PLAIN)


def test_a_text_that_is_used_is_code():
    assert code_of('x = """a"""\n') != code_of('x = """b"""\n')
    assert code_of('x = 1\n"""a"""\n') != code_of('x = 1\n"""b"""\n')  # not first: ast does not take it for a docstring


def test_what_is_left_of_every_module_is_its_code():
    """On our own sources: not a name, number or operator is lost, and no comment is left."""
    for path in sorted(Path(module_under_test.__file__).parent.rglob("*.py")):
        source = path.read_text()
        left = code_of(source).decode()
        assert _tokens(left) == _tokens(source), path
        assert tokenize.COMMENT not in {token.type for token in tokenize.generate_tokens(io.StringIO(left).readline)}


def _tokens(source):
    kinds = (tokenize.NAME, tokenize.NUMBER, tokenize.OP)
    return [token.string for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type in kinds]
