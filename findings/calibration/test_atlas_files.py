"""The atlas on disk, whole or absent; the results in the README; single figures."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from lab import cli, paths
from lab.errors import UserError
from lab.report import commands, readme, site
from lab.report.results import Results

pytestmark = pytest.mark.calibration


@pytest.fixture(scope="module")
def committed() -> Results:
    return commands.results()


def test_a_site_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "atlas"
    site.write({"index.html": b"one", "old/page.html": b"gone"}, folder)
    site.write({"index.html": b"two"}, folder)
    assert sorted(path.name for path in folder.rglob("*")) == ["atlas.json", "index.html"]
    assert (folder / "index.html").read_bytes() == b"two"


@pytest.mark.parametrize("broken", ["write_bytes", "rename"])
def test_a_failure_leaves_the_old_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    folder = tmp_path / "atlas"
    site.write({"index.html": b"one"}, folder)
    usual = getattr(Path, broken)

    def fails(self: Path, *arguments: object) -> object:
        if self.name in ("new", "b.html"):
            raise OSError(28, "No space left on device")
        return usual(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Path, broken, fails)
        with pytest.raises(UserError, match="No space left"):
            site.write({"index.html": b"two", "b.html": b"two"}, folder)
    assert (folder / "index.html").read_bytes() == b"one"
    assert {path.name for path in tmp_path.iterdir()} <= {"atlas", "atlas.lock"}


def test_what_the_atlas_did_not_write_stays(tmp_path: Path) -> None:
    foreign = tmp_path / "papers"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="no atlas"):
        site.write({"index.html": b""}, foreign)
    own = tmp_path / "atlas"
    site.write({"index.html": b"one"}, own)
    (own / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        site.write({"index.html": b"two"}, own)
    link = tmp_path / "link"
    link.symlink_to(foreign)
    with pytest.raises(UserError, match="no folder"):
        site.write({"index.html": b""}, link)
    assert (foreign / "thesis.tex").read_text() == "years"
    assert (own / "notes.txt").read_text() == "mine"
    assert (own / "index.html").read_bytes() == b"one"


def test_a_place_that_cannot_be_written_to_is_refused_before_pages_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(site, "build", lambda results: pytest.fail("pages were made"))
    with pytest.raises(UserError, match=r"cannot write the atlas to .*file/atlas: .*; choose another folder with -o"):
        commands.report(tmp_path / "file" / "atlas", None)


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "atlas").mkdir()
    site.write({"index.html": b"one"}, tmp_path / "atlas")
    assert (tmp_path / "atlas" / "index.html").exists()


# ---- README and commands


def test_the_readme_is_current(committed: Results) -> None:
    path = paths.REPOSITORY / "README.md"
    text = path.read_text(encoding="utf-8")
    remedy = "run python -m lab report --readme README.md"
    assert readme.update(text, readme.generated(committed), path) == text, remedy


def test_the_figure_of_the_readme_is_current(committed: Results) -> None:
    pinned = re.search(r"^matplotlib==(.+)$", (paths.REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    if version("matplotlib") != pinned[1]:
        pytest.skip(f"drawn with matplotlib {pinned[1]}, here is {version('matplotlib')}")
    assert readme.DRAWING.read_text(encoding="utf-8") == readme.figure(committed)


def test_a_readme_without_a_place_for_results(committed: Results) -> None:
    for text in ("# Title", f"{readme.END}\n{readme.BEGIN}", readme.BEGIN * 2 + readme.END):
        with pytest.raises(UserError, match="no place for results"):
            readme.update(text, "part", Path("README.md"))


def test_an_agenda_id_draws_all_its_experiments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.svg"
    drawn = commands.draw("T-2", ["smollm2-135m-instruct"], out)
    assert drawn == [out, tmp_path / "out-activation_patching.svg"]
    assert all(path.read_text().startswith("<?xml") for path in drawn)


@pytest.mark.parametrize("ending", ["png", "pdf"])
def test_other_formats(tmp_path: Path, ending: str) -> None:
    (path,) = commands.draw("activation_patching", [], tmp_path / f"out.{ending}")
    assert path.read_bytes()[:4] in (b"\x89PNG", b"%PDF")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["T-99"], "did you mean"),
        (["layer_knokout"], "did you mean layer_knockout"),
        (["T-1", "--subject", "smollm2-instruct"], "did you mean smollm2-135m-instruct"),
        (["T-2", "--subject", "qwen3-1.7b"], "nothing is recorded of layer_knockout and activation_patching"),
        (["T-1", "-o", "out.gif"], "its ending must be one of .svg, .png, .pdf"),
    ],
)
def test_a_figure_that_cannot_be_drawn(arguments, words, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["figure", *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert words in error
    assert not list(tmp_path.iterdir())
