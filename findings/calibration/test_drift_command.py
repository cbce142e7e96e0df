"""`python -m lab drift A B`: what it compares, what it calls drift, and that a mistake is one line."""

import json
import subprocess

import pytest

from lab import cli, experiments, paths
from lab.experiments import Experiment, Tolerance
from lab.records import Record
from lab.snapshots import numbers

pytestmark = pytest.mark.calibration

AT = ("tiny", "quick-bfloat16", "toy")


def run(*arguments):
    """Exit code of the command."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["drift", *map(str, arguments)])
    return int(ended.value.code or 0)


def snapshot(loss=1.0, layers=(1.0, 2.0), verdicts=None, torch="2.13"):
    entry = {"unit": "nat/token", "dims": [], "coords": {}, "values": [loss]}
    profile = {"unit": "nat/token", "dims": ["layer"], "coords": {"layer": [0, 1]}, "values": list(layers)}
    return {
        "experiment": "toy",
        "subject": "tiny",
        "condition": "quick-bfloat16",
        "provenance": {"libraries": {"torch": torch}},
        "numbers": {"loss": entry, "layer_loss": profile},
        "verdicts": {key: {"verdict": verdict} for key, verdict in (verdicts or {"X-1.1 L00": "holds"}).items()},
    }


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    allowed = {"": Tolerance(0.01, 0.0, "a percent")}
    monkeypatch.setattr(experiments, "experiment", lambda name: Experiment("X-1", "", "", Record, None, {}, allowed))
    monkeypatch.setattr(experiments, "modules", lambda: {"toy": "toy"})


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository of its own, in the place of this one."""
    folder = tmp_path / "repository"
    folder.mkdir()
    monkeypatch.setattr(paths, "REPOSITORY", folder)
    monkeypatch.setattr(paths, "SNAPSHOTS", folder / "snapshots")
    git(folder, "init", "-q", "-b", "main")
    return folder


def git(folder, *arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def write(folder, content, at=AT):
    path = folder.joinpath(*at).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else numbers.dump(content))


def commit(repository, content, at=AT):
    write(repository / "snapshots", content, at)
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "x")


def two_folders(tmp_path, before, after):
    write(tmp_path / "before", before)
    write(tmp_path / "after", after)
    return tmp_path / "before", tmp_path / "after"


# ---- what is drift


@pytest.mark.parametrize(
    ("after", "code", "said"),
    [
        (snapshot(), 0, "no drift in 1 snapshots"),
        (snapshot(loss=1.009), 0, "no drift in 1 snapshots"),
        (snapshot(torch="2.14"), 0, "toy of tiny (quick-bfloat16): libraries.torch: 2.13 -> 2.14"),
        (snapshot(loss=1.5), 1, "  loss: 1 -> 1.5 nat/token (+50.00%, 50 x the tolerance)"),
        (snapshot(layers=(1.0, 3.0)), 1, "  layer_loss[layer=1]: 2 -> 3 nat/token (+50.00%, 50 x the tolerance)"),
        (snapshot(loss=1.5), 1, "  tolerance of loss: 1 % (a percent)"),
        (snapshot(loss=1.5, torch="2.14"), 1, "  also changed: libraries.torch: 2.13 -> 2.14"),
        (snapshot(verdicts={"X-1.1 L00": "refuted"}), 1, "  X-1.1 at L00: holds -> refuted"),
        (snapshot(verdicts={"X-1.2": "holds"}), 1, "  X-1.2: no verdict -> holds"),
        (snapshot(verdicts={"X-1.2": "holds"}), 1, "  X-1.1 at L00: holds -> no verdict"),
    ],
)
def test_numbers_and_verdicts_are_drift_and_provenance_is_not(tmp_path, capsys, after, code, said):
    assert run(*two_folders(tmp_path, snapshot(), after)) == code
    assert any(line.startswith(said) for line in capsys.readouterr().out.splitlines())


def test_what_came_and_went_is_drift(tmp_path, capsys):
    before, after = two_folders(tmp_path, snapshot(), snapshot())
    write(before, snapshot(), ("old", "quick-bfloat16", "toy"))
    write(after, snapshot(), ("tiny", "full-float32", "toy"))
    assert run(before, after) == 1
    assert capsys.readouterr().out.splitlines() == [
        "toy of old (quick-bfloat16): vanished, 2 quantities, 1 verdicts",
        "toy of tiny (full-float32): appeared, 2 quantities, 1 verdicts",
        f"drift in 2 of 3 snapshots, {before} -> {after}: 0 with other numbers, 0 with other verdicts, 1 new, 1 gone",
    ]


def test_many_places_of_a_claim_are_one_line(tmp_path, capsys):
    claims = {f"X-1.1 L{layer:02}": "holds" for layer in range(9)}
    after = snapshot(verdicts=claims | dict.fromkeys(list(claims)[:8], "refuted"))
    assert run(*two_folders(tmp_path, snapshot(verdicts=claims), after)) == 1
    assert "  X-1.1 at L00, L01, L02, L03, L04, L05 and 2 more: holds -> refuted" in capsys.readouterr().out


def test_markdown_and_json(tmp_path, capsys):
    after = snapshot(layers=(1.0, 3.0), verdicts={"X-1.1 L00": "refuted"}, torch="2.14")
    folders = two_folders(tmp_path, snapshot(), after)
    assert run(*folders, "--markdown", "--json", tmp_path / "out.json") == 1
    text = capsys.readouterr().out
    assert "| `layer_loss[layer=1]` | 2 -> 3 nat/token (+50.00%, 50 x the tolerance) |  |" in text
    assert "| X-1.1 | L00 | holds | refuted |  |" in text
    assert "What else changed: libraries.torch: 2.13 -> 2.14." in text
    content = json.loads((tmp_path / "out.json").read_text())
    (difference,) = content["differences"]
    assert difference["address"] == {"subject": "tiny", "condition": "quick-bfloat16", "experiment": "toy"}
    (move,) = difference["moves"]
    assert (move["variable"], move["before"], move["after"], move["share"]) == ("layer_loss", 2, 3, pytest.approx(50))
    assert difference["verdicts"][0]["after"] == {"verdict": "refuted"}


# ---- where it reads from


def test_revisions_are_read_without_a_checkout(repository, capsys):
    commit(repository, snapshot())
    commit(repository, snapshot(loss=2.0))
    write(repository / "snapshots", snapshot(loss=3.0))
    status = git(repository, "status", "--porcelain"), git(repository, "rev-parse", "HEAD")
    assert run("HEAD~1", "HEAD") == 1
    assert "loss: 1 -> 2 nat/token" in capsys.readouterr().out
    assert run("main", "WORKTREE") == 1
    assert "loss: 2 -> 3 nat/token" in capsys.readouterr().out
    assert run("HEAD", "main") == 0
    assert (git(repository, "status", "--porcelain"), git(repository, "rev-parse", "HEAD")) == status
    content = json.loads(repository.joinpath("snapshots", *AT).with_suffix(".json").read_text())
    assert content["numbers"]["loss"]["values"] == [3.0]


def test_what_else_lies_among_the_snapshots_of_a_revision_is_none(repository, capsys):
    commit(repository, snapshot())
    for path in ("tiny/quick-bfloat16/notes.md", "index.json", "tiny/quick-bfloat16/old/toy.json"):
        place = repository / "snapshots" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("{")
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "more")
    assert run("HEAD~1", "HEAD") == 0
    assert "no drift in 1 snapshots" in capsys.readouterr().out


def test_a_damaged_repository_is_one_line(repository, capsys):
    commit(repository, snapshot())
    blob = git(repository, "rev-parse", "HEAD:snapshots/" + "/".join(AT) + ".json").strip()
    (repository / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    assert run("HEAD", "HEAD") == 2
    assert capsys.readouterr().err.startswith("git show failed (fatal: ")


def test_a_repository_whose_suite_lies_in_a_folder(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "whole" / "part"
    folder.mkdir(parents=True)
    git(tmp_path / "whole", "init", "-q")
    monkeypatch.setattr(paths, "REPOSITORY", folder)
    monkeypatch.setattr(paths, "SNAPSHOTS", folder / "snapshots")
    commit(folder, snapshot())
    assert run("HEAD", "WORKTREE") == 0


def row(claim, verdict, where=None, subject="tiny", **more):
    named = {"claim": claim, "experiment": "toy", "subject": subject, "source": "measured", "where": where}
    return named | {"verdict": verdict, "measured": 1.0, "threshold": "< 2", "support": None} | more


def test_files_of_verdicts(tmp_path, capsys):
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    kept, unjudged = row("X-1.2", "holds"), row("X-1.3", None)
    before.write_text(json.dumps([row("X-1.1", "holds", "L07"), kept, unjudged]))
    after.write_text(
        json.dumps([row("X-1.1", "refuted", "L07", measured=2.5), kept, row("X-1.1", "holds", "L00", "new")])
    )
    assert run(before, before) == 0
    capsys.readouterr()
    assert run(before, after) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "  X-1.1 at L07: holds -> refuted (measured 1.0 -> 2.5, needed < 2)" in lines
    assert "toy of new (measured): appeared, 0 quantities, 1 verdicts" in lines


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (("nowhere", "HEAD"), "unknown revision 'nowhere': it is neither a file, a folder nor a commit here"),
        (("HEAD", "HEAD~7"), "unknown revision 'HEAD~7'"),
        (("HEAD:snapshots", "HEAD"), "unknown revision 'HEAD:snapshots'"),
        (("empty", "HEAD"), "holds no snapshots (<subject>/<condition>/<experiment>.json)"),
        (("bare", "HEAD"), "the revision bare holds no snapshots in snapshots/"),
        (("damaged", "HEAD"), "the snapshot damaged:snapshots/tiny/quick-bfloat16/toy.json is not whole JSON"),
        (("formless", "HEAD"), "the snapshot formless:snapshots/tiny/quick-bfloat16/toy.json has no proper numbers"),
        (("half.json", "half.json"), "half.json is not whole JSON"),
        (("other.json", "other.json"), "other.json is not what pytest's --verdicts writes"),
        (("none.json", "HEAD"), "none.json holds verdicts and HEAD holds snapshots; compare two of a kind"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(repository, monkeypatch, capsys, names, complaint):
    monkeypatch.chdir(repository)
    (repository / "empty").mkdir()
    for name, text in (("half.json", "[{"), ("other.json", '[{"claim": 1}]'), ("none.json", "[]")):
        (repository / name).write_text(text)
    (repository / "readme").write_text("")
    for branch, content in (("bare", None), ("damaged", '{"numbers":'), ("formless", '{"numbers": 1}')):
        if content is not None:
            write(repository / "snapshots", content)
        git(repository, "add", "readme", *(["snapshots"] if content else []))
        git(repository, "commit", "-q", "-m", branch)
        git(repository, "branch", branch)
    commit(repository, snapshot())
    assert run(*names) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert complaint in err


def test_outside_a_repository_folders_can_be_compared_and_revisions_cannot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    folders = two_folders(tmp_path, snapshot(), snapshot())
    assert run(*folders) == 0
    capsys.readouterr()
    assert run("HEAD", folders[1]) == 2
    assert "HEAD is neither a file nor a folder, and this is not a git repository" in capsys.readouterr().err


def test_without_git_it_is_one_line(repository, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert run("HEAD", "HEAD") == 2
    assert "git cannot be run" in capsys.readouterr().err
