"""The atlas as pages: what it says is what is recorded, nothing in it is markup but ours, and it is small."""

from __future__ import annotations

import csv
import io
import json
import lzma
import re
import shutil
from collections import defaultdict
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from fixtures import support
from lab import cli, paths
from lab.errors import UserError
from lab.report import commands, recorded, site
from lab.report.claims import statements
from lab.report.recorded import Fresh, Verdict, snapshots
from lab.report.results import Cell, Results
from lab.snapshots.addresses import all_addresses

pytestmark = pytest.mark.calibration

LIMIT = 6_000_000  #: bytes of the whole site; 1.4 MB if compressed, of 14 experiments in 8 columns
PAGE_LIMIT = 750_000  #: bytes of a page, which is what a reader loads
AGENDA = 1_200  #: claims that all experiments of the agenda may come to; the first fourteen have 1,032
VOID = {"meta", "link", "input", "br", "img", "hr"}
CLAIMS = '''
from fixtures.claims import claim

ORIGINAL = "qwen3-4b-instruct-2507"


@claim("X-1.1", "published", on=ORIGINAL)
def test_markup(layer_knockout, layer):
    """A sentence with <script>alert("claim")</script> & <b>bold</b>.

    A reason with <img src=x onerror=alert(1)> and `code <i>`.

        formula <u>a</u> < b
    """
    assert layer_knockout.loss_ratio.sel(layer=layer) < 3  # <script>


@claim("X-1.1b", "corrected")
def test_sibling(layer_knockout, activation_patching):
    """What the data say."""
    assert layer_knockout.baseline_loss > 0
'''


@pytest.fixture(scope="module")
def committed() -> Results:
    return commands.results()


@pytest.fixture(scope="module")
def atlas(committed: Results) -> dict[str, bytes]:
    return site.build(committed)


@pytest.fixture
def shelf(drawn_shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, and no figures: drawing takes most of the time."""
    monkeypatch.setattr("lab.report.pages.figure_of", lambda name: None)
    return drawn_shelf


@pytest.fixture
def drawn_shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two committed snapshots in a folder of their own, with verdicts of the claims above."""
    for place in ("qwen3-4b-instruct-2507/published", "smollm2-135m-instruct/quick-bfloat16"):
        target = tmp_path / "snapshots" / place / "layer_knockout.json"
        target.parent.mkdir(parents=True)
        content = json.loads((paths.SNAPSHOTS / place / "layer_knockout.json").read_text())
        hostile = {"verdict": "refuted", "measured": "<script>2</script>", "threshold": "< '\"3"}
        content["verdicts"] = {f"X-1.1 L{layer:02d}": hostile for layer in range(20)}
        content["verdicts"]["X-1.1b"] = {"verdict": "holds", "measured": 0.5, "threshold": "> 0", "support": 0.948}
        target.write_text(json.dumps(content))
    (tmp_path / "findings").mkdir()
    (tmp_path / "findings" / "test_x.py").write_text(CLAIMS)
    monkeypatch.setattr(paths, "SNAPSHOTS", tmp_path / "snapshots")
    return tmp_path


def build(shelf: Path, *fresh: Fresh) -> dict[str, str]:
    made = site.build(Results(statements(shelf / "findings"), snapshots(), fresh))
    return {path: content.decode() for path, content in made.items() if not path.endswith(".xz")}


# ---- what it says


def test_every_recorded_verdict_is_there(committed: Results, atlas: dict[str, bytes]) -> None:
    rows = list(csv.DictReader(io.StringIO(lzma.decompress(atlas["data/verdicts.csv.xz"]).decode())))
    told = {(row["subject"], row["condition"], row["claim"], row["where"]): row["verdict"] for row in rows}
    unstated = {claim for snapshot in committed.snapshots for claim in committed.unstated(snapshot)}
    known = {
        (snapshot.address.subject, snapshot.address.condition, one.claim, one.where or ""): one.verdict
        for snapshot in committed.snapshots
        for one in snapshot.verdicts
        if one.claim not in unstated
    }
    assert told == known


def test_every_recorded_number_can_be_downloaded(committed: Results, atlas: dict[str, bytes]) -> None:
    for name in {snapshot.address.experiment for snapshot in committed.snapshots}:
        mine = [one for one in committed.snapshots if one.address.experiment == name]
        rows = list(csv.DictReader(io.StringIO(lzma.decompress(atlas[f"data/{name}.csv.xz"]).decode())))
        numbers = [row for row in rows if row["low"] == row["high"] == ""]
        assert len(numbers) == sum(len(entry["values"]) for one in mine for entry in one.content["numbers"].values())


def test_intervals_are_downloaded_with_their_labels(shelf: Path) -> None:
    path = next(shelf.glob("snapshots/smollm2*/*/layer_knockout.json"))
    content = json.loads(path.read_text())
    band = {"unit": "1", "dims": ["bound", "layer"], "coords": {"bound": ["low", "high"], "layer": [3, 4]}}
    content["bands"] = {"loss_ratio": band | {"values": [1.0, 2.0, 1.5, 2.5]}}
    path.write_text(json.dumps(content))
    made = site.build(Results(statements(shelf / "findings"), snapshots()))
    rows = list(csv.DictReader(io.StringIO(lzma.decompress(made["data/layer_knockout.csv.xz"]).decode())))
    found = [(row["labels"], row["low"], row["high"]) for row in rows if row["low"]]
    assert found == [("layer=3", "1.0", "1.5"), ("layer=4", "2.0", "2.5")]


def test_a_discrepancy_stands_beside_its_correction(shelf: Path) -> None:
    page = build(shelf)["discrepancies.html"]
    assert "X-1.1<" in page
    assert "What the data say." in page
    assert page.index("published sentence") < page.index("What the data say.")


def test_published_claims_that_hold_are_no_discrepancy(committed: Results, atlas: dict[str, bytes]) -> None:
    page = atlas["discrepancies.html"].decode()
    for statement in committed.statements:
        cells = [committed.cell(statement.id, column) for column in committed.columns if column.published]
        refuted = any(cell and cell.failing for cell in cells) and statement.kind == "published"
        assert (f'id="at-{statement.id}"' in page) == refuted, statement.id


def test_support_below_the_limit_never_reads_as_the_limit(shelf: Path) -> None:
    pages = build(shelf)
    assert "support 0.94" in pages["index.html"]
    assert "support 0.95" not in pages["index.html"]
    assert "≈ fragile" in pages["index.html"]
    assert recorded.FRAGILE == support.FRAGILE


def test_a_cell_folds_its_places() -> None:
    places = [Verdict("T", f"L{n:02d}", "holds" if n else "refuted", float(n), ">= 1", 0.9 + n / 100) for n in range(4)]
    cell = Cell((*places, Verdict("T", "L09", "not applicable")))
    assert cell.verdict == "refuted"
    assert [one.where for one in cell.failing] == ["L00"]
    assert (cell.measured.low, cell.measured.high, cell.support, cell.threshold) == (0, 3, 0.9, ">= 1")
    assert not cell.fragile  # what is refuted is not fragile, though three of its places are
    assert len(cell.fragile_places) == 3
    assert Cell(tuple(places[1:])).fragile
    assert Cell((Verdict("T", None, "not applicable"),)).verdict == "not applicable"


# ---- a fresh run


def test_a_fresh_verdict_takes_the_place_of_the_recorded_one(shelf: Path) -> None:
    moved = Verdict("X-1.1b", None, "refuted", 0.1, "> 0", 0.2, recorded="holds")
    pages = build(shelf, Fresh("smollm2-135m-instruct", "measured", "layer_knockout", moved))
    assert "△ moved, was holds" in pages["index.html"]
    assert "Verdicts that moved" in pages["subjects/smollm2-135m-instruct.html"]
    assert "△ moved" not in build(shelf)["index.html"]


def test_a_fresh_subject_has_a_column_and_a_page(shelf: Path) -> None:
    verdict = Verdict("X-1.1b", None, "holds", 0.1, "> 0", 1.0)
    pages = build(shelf, Fresh("my-model", "measured", "layer_knockout", verdict))
    assert "this run" in pages["index.html"]
    assert "the catalog does not know" in pages["subjects/my-model.html"]


def test_a_verdicts_file_is_read(tmp_path: Path) -> None:
    row = {"claim": "T-1.1", "kind": "published", "statement": "S", "experiment": "e", "subject": "s"}
    row |= {"source": "measured", "where": None, "verdict": "holds", "recorded": "refuted", "outcome": "failed"}
    row |= {"measured": 1, "threshold": "> 0", "support": 0.5, "seconds": 0.1}
    path = tmp_path / "verdicts.json"
    path.write_text(json.dumps([row, row | {"verdict": None}]))
    (fresh,) = recorded.fresh_verdicts(path)
    assert fresh.verdict == Verdict("T-1.1", None, "holds", 1, "> 0", 0.5, "refuted")
    for broken in ("{}", "[1]", '[{"claim": "T-1.1"}]', ""):
        path.write_text(broken)
        with pytest.raises(UserError, match="verdicts file"):
            recorded.fresh_verdicts(path)


# ---- nothing is markup but ours


class Page(HTMLParser):
    """Tags in order, identifiers, links and the text between, of a page that must be well formed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if "svg" not in self.open:  # a drawing has a title of its own
            self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def all(self, name: str) -> list[str]:
        return [value for _, attributes in self.attributes if (value := attributes.get(name)) is not None]


def test_what_others_wrote_is_escaped(shelf: Path) -> None:
    pages = build(shelf)
    for path, text in pages.items():
        if path.endswith(".html"):
            page = Page(text)
            assert page.tags.count("script") == (path == "index.html")
            assert not {"u", "img"} & set(page.tags), path
            assert "onerror" not in {name for _, attributes in page.attributes for name in attributes}
    assert "&lt;script&gt;alert(" in pages["index.html"]


def test_pages_are_well_formed(atlas: dict[str, bytes]) -> None:
    for path, content in atlas.items():
        if path.endswith(".html"):
            page = Page(content.decode())
            ids = page.all("id")
            assert len(ids) == len(set(ids)), path
            assert page.tags.count("h1") == page.tags.count("main") == page.tags.count("title") == 1, path
            assert dict(page.attributes[0][1]) == {"lang": "en"}
            heads = [attributes for tag, attributes in page.attributes if tag == "th"]
            assert all(attributes.get("scope") in ("col", "row") for attributes in heads), path
            drawings = [attributes for tag, attributes in page.attributes if tag == "svg"]
            assert all(attributes["role"] == "img" and attributes["aria-labelledby"] for attributes in drawings)


def test_links_resolve_and_nothing_comes_from_elsewhere(atlas: dict[str, bytes]) -> None:
    parsed = {path: Page(content.decode()) for path, content in atlas.items() if path.endswith(".html")}
    ids = {path: set(page.all("id")) for path, page in parsed.items()}
    for path, page in parsed.items():
        for link in page.all("href") + page.all("src") + page.all("xlink:href"):
            if link.startswith("data:"):
                continue
            assert not re.match(r"[a-z]+:|//|/", link), f"{path} links to {link}"
            target, _, fragment = link.partition("#")
            place = (Path(path).parent / unquote(target)).as_posix() if target else path
            place = Path("/", place).resolve().relative_to("/").as_posix()
            assert place in atlas, f"{path} links to {link}"
            assert not fragment or fragment in ids[place], f"{path} links to {link}"
    for path in ("assets/atlas.css", "assets/atlas.js"):
        assert not re.search(r"https?:|@import|url\(", atlas[path].decode())


# ---- missing and damaged pieces


def test_a_snapshot_without_verdicts_still_has_numbers(drawn_shelf: Path) -> None:
    path = next(drawn_shelf.glob("snapshots/smollm2*/*/layer_knockout.json"))
    content = json.loads(path.read_text())
    del content["verdicts"]
    path.write_text(json.dumps(content))
    pages = build(drawn_shelf)
    assert "not recorded" not in pages["experiments/layer_knockout.html"]
    assert "smollm2-135m-instruct" in pages["experiments/layer_knockout.html"]
    assert "<svg" in pages["experiments/layer_knockout.html"]


def test_without_any_snapshot_the_atlas_says_so(shelf: Path) -> None:
    shutil.rmtree(shelf / "snapshots")
    pages = build(shelf)
    assert "Nothing is recorded of this experiment yet" in pages["experiments/layer_knockout.html"]
    assert "Not judged on any subject yet" in pages["experiments/layer_knockout.html"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "not whole JSON"),
        (lambda text: "", "is empty"),
        (lambda text: text.replace('"numbers"', '"figures"'), "has no numbers"),
        (lambda text: text.replace('"X-1.1b": {"verdict": "holds"', '"X-1.1b": {"verdict": "maybe"'), "maybe"),
        (lambda text: text.replace('"coords": {"layer": [0, 1, ', '"coords": {"layer": ['), "has no proper numbers ("),
        (lambda text: text.replace('"subject": "smollm2', '"subject": "smollm3'), "smollm3"),
    ],
    ids=["truncated", "empty", "no numbers", "unknown verdict", "wrong shape", "another subject"],
)
def test_a_damaged_snapshot_is_one_clear_line(shelf: Path, capsys: pytest.CaptureFixture[str], damage, words) -> None:
    path = next(shelf.glob("snapshots/smollm2*/*/layer_knockout.json"))
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", "-o", str(shelf / "atlas")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert str(path) in error
    assert words in error
    assert not (shelf / "atlas").exists()


# ---- bytes and figures


def test_the_same_snapshots_give_the_same_bytes(drawn_shelf: Path) -> None:
    assert build(drawn_shelf) == build(drawn_shelf)


def test_a_figure_says_which_conditions_it_leaves_out(atlas: dict[str, bytes]) -> None:
    """It draws a subject once, under the condition that most subjects share."""
    conditions: defaultdict[str, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for address in all_addresses():
        conditions[address.experiment][address.subject].add(address.condition)
    several = {name for name, subjects in conditions.items() if any(len(found) > 1 for found in subjects.values())}
    assert {"layer_knockout", "spectral_peft"} <= several < set(conditions)
    pages = {name: atlas[f"experiments/{name}.html"].decode() for name in conditions}
    assert {name for name, page in pages.items() if "not drawn" in page} == several
    assert "not drawn: smollm2-135m-instruct, full-bfloat16-cuda." in pages["layer_knockout"]
    assert "not drawn: smollm2-135m-instruct, quick-bfloat16." in pages["spectral_peft"]


# ---- size


def test_the_site_is_small(committed: Results, atlas: dict[str, bytes]) -> None:
    assert site.size(atlas) < LIMIT
    assert max(len(content) for path, content in atlas.items() if path.endswith(".html")) < PAGE_LIMIT


def test_the_site_stays_small_with_the_whole_agenda(
    committed: Results, atlas: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lab.report.pages.figure_of", lambda name: None)
    figures = sum(
        len(drawing) for page in atlas.values() for drawing in re.findall(rb"<svg .*?</svg>", page, re.DOTALL)
    )
    copied = committed.statements[: max(0, AGENDA - len(committed.statements))]
    stated = [*committed.statements, *(replace(one, id=f"{one.id}.copy") for one in copied)]
    ids = {one.id for one in copied}
    grown = []
    for snapshot in committed.snapshots:
        verdicts = snapshot.content.get("verdicts", {})
        parts = [(key.partition(" "), value) for key, value in verdicts.items()]
        more = {f"{id}.copy{gap}{where}": value for (id, gap, where), value in parts if id in ids}
        grown.append(replace(snapshot, content=snapshot.content | {"verdicts": verdicts | more}))
    assert figures > 100_000
    assert site.size(site.build(Results(stated, grown))) + figures < LIMIT
