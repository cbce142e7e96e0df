"""Claims read from the source are the claims that pytest collects."""

from __future__ import annotations

import ast
import inspect
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from textwrap import dedent

import pytest

from fixtures.claims import Claim, claim_of
from lab import experiments
from lab.errors import UserError
from lab.report.claims import CALIBRATION, FINDINGS, KINDS, statements

pytestmark = pytest.mark.calibration


def collected() -> dict[str, Claim]:
    found = {}
    for path in FINDINGS.rglob("test_*.py"):
        if path.relative_to(FINDINGS).parts[0] != CALIBRATION:
            spec = spec_from_file_location(f"read_{path.stem}", path)
            assert spec is not None
            assert spec.loader is not None
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            claims = [claim for value in vars(module).values() if (claim := claim_of(value))]
            found |= {claim.id: claim for claim in claims}
    return found


def test_claims_are_those_that_the_decorator_makes() -> None:
    read = {one.id: one for one in statements()}
    run = collected()
    assert read.keys() == run.keys()
    for id, claim in run.items():
        assert (read[id].kind, read[id].on, read[id].text) == (claim.kind, claim.on, claim.statement)
        arguments = inspect.signature(claim.function).parameters
        assert list(read[id].records) == [name for name in arguments if name in experiments.modules()]
        assert read[id].repeated == (len(arguments) > len(read[id].records))


def test_docstring_and_predicate_are_whole() -> None:
    for one in statements():
        ast.parse(one.code)
        assert "assert" in one.code or "not_applicable" in one.code, one.id
        assert one.kind in KINDS


def write(folder: Path, text: str) -> Path:
    (folder / "group").mkdir(exist_ok=True)
    (folder / "group" / "test_x.py").write_text(dedent(text))
    return folder


def test_what_is_read(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        '''
        THE_MODEL = "some-model"

        @claim("T-9.10c", kind="control", on=THE_MODEL)
        def test_it(layer_knockout, logit_lens, layer):
            """It holds.

            Because of this.
            """
            # why
            values = layer_knockout.loss_delta

            assert values.sel(layer=layer) > 0

        def test_no_claim(layer_knockout):
            """Not a claim."""
        ''',
    )
    (one,) = statements(folder)
    assert (one.id, one.stem, one.kind, one.on) == ("T-9.10c", "T-9.10", "control", "some-model")
    assert (one.text, one.reasons) == ("It holds.", "Because of this.")
    assert one.records == ("layer_knockout", "logit_lens")
    assert one.repeated
    assert one.code == "values = layer_knockout.loss_delta\n\nassert values.sel(layer=layer) > 0"
    assert (one.path, one.line) == ("group/test_x.py", 5)


@pytest.mark.parametrize(
    "text",
    [
        "@claim(",
        '@claim("T-1." + "1", "published")\ndef test_it(layer_knockout):\n    """S."""',
        '@claim("T-1.1", "rumour")\ndef test_it(layer_knockout):\n    """S."""',
        '@claim("T-1.1", "published")\ndef test_it(nothing):\n    """S."""',
    ],
    ids=["syntax", "computed id", "unknown kind", "no record"],
)
def test_a_claim_that_cannot_be_read_is_one_clear_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"cannot read .*test_x\.py"):
        statements(write(tmp_path, text))


def test_ids_sort_as_people_count(tmp_path: Path) -> None:
    claim = '@claim("T-1.{}", "published")\ndef test_{}(layer_knockout):\n    """S."""\n'
    folder = write(tmp_path, "".join(claim.format(id, id) for id in ("10", "9b", "9")))
    assert [one.id for one in statements(folder)] == ["T-1.9", "T-1.9b", "T-1.10"]
