"""The folder that neural-compressor makes where it is imported goes when it is empty, and stays when it is not."""

import sys
from types import SimpleNamespace

import pytest

from lab import leftovers

pytestmark = pytest.mark.calibration


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    made = tmp_path / "nc_workspace" / "now"
    made.mkdir(parents=True)
    constants = SimpleNamespace(DEFAULT_WORKSPACE=f"{made}/")
    monkeypatch.setitem(sys.modules, "neural_compressor.common.utils.constants", constants)
    return made


def test_an_empty_workspace_goes(workspace):
    leftovers.remove_workspace()
    assert not workspace.parent.exists()
    leftovers.remove_workspace()  # and nothing happens where there is none


def test_a_workspace_of_another_run_stays(workspace):
    (workspace.parent / "before").mkdir()
    leftovers.remove_workspace()
    assert not workspace.exists()
    assert (workspace.parent / "before").exists()


def test_a_workspace_that_holds_anything_stays(workspace):
    (workspace / "history.json").write_text("{}")
    leftovers.remove_workspace()
    assert (workspace / "history.json").exists()
