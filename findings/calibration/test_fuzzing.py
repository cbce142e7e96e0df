"""Files that are damaged, or that are something else: read, or refused in one line (`make fuzz`: 21,000 cases)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.alarms import series
from lab.corpora import completions_file, contrastive_groups, minimal_pairs, prompts
from lab.errors import UserError
from lab.snapshots import addresses, numbers, sources
from lab.subjects import catalog, configuration

pytestmark = pytest.mark.calibration

FUZZING = Path(__file__).with_name("fuzzing.py")


def test_damaged_files_are_read_or_refused_in_one_line():
    environment = {**os.environ, "PYTHONPATH": str(FUZZING.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FUZZING), "all", "--cases", "60"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(run.stdout.splitlines()) >= 14


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
trees = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)
#: objects that have the right fields, with anything in them
FIELDS = (
    "format", "config", "completions", "version", "description", "system_message", "prompts", "families", "style",
    "groups", "pairs", "numbers", "bands", "verdicts", "provenance", "weight_map", "num_hidden_layers", "libraries",
)  # fmt: skip
objects = st.dictionaries(st.sampled_from(FIELDS), trees)


@given(content=trees | objects)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize(
    "read",
    [
        completions_file.read,
        prompts.load_prompts,
        contrastive_groups.load_contrastive_groups,
        minimal_pairs.load_minimal_pairs,
        lambda path: addresses.load(path).get("numbers") and numbers.to_record(addresses.load(path)),
        lambda path: sources.read(str(path)),
        series.read,
        configuration.read_config,
        lambda path: catalog.read_tables(json.loads(path.read_text())),
    ],
    ids=["completions", "prompts", "groups", "pairs", "snapshot", "verdicts", "alarms", "configuration", "catalog"],
)
def test_any_json_is_read_or_refused(tmp_path, read, content):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(content))
    with suppress(UserError):
        read(path)


def test_shards_outside_their_folder_are_refused(tmp_path):
    """An index of a checkpoint must not lead to other files of the machine."""
    (tmp_path / "secret.safetensors").write_bytes(b"")
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), ".."):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="which is no file of its folder"):
            configuration.safetensors_of(folder)
