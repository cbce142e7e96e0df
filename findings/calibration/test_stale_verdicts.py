"""Snapshots record verdicts of claims that exist, and of no others: renamed claims must not live on in them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.snapshots.addresses import all_addresses, load

pytestmark = pytest.mark.calibration

REPOSITORY = Path(__file__).parents[2]
COLLECT = """
import json, sys
import pytest
from fixtures.claims import claim_of
from fixtures.collection import case_of, experiments_of, has_case, where
from lab.snapshots.addresses import key

class Notes:
    @pytest.hookimpl(tryfirst=True, wrapper=True)
    def pytest_collection_modifyitems(self, items):
        claims = [item for item in items if claim_of(getattr(item, "function", None)) and has_case(item)]
        found = sorted({
            (case_of(item).subject, case_of(item).source, experiments_of(item.fixturenames)[0],
             key(claim_of(item.function).id, where(item)))
            for item in claims
        })
        with open(sys.argv[1], "w") as file:
            json.dump(found, file)
        return (yield)

options = ["--subject", "all", "--collect-only", "-qq", "-p", "no:cacheprovider"]
options = ["findings", "-m", "published or measured", *options]
sys.exit(pytest.main(options, plugins=[Notes()]))
"""


@pytest.fixture(scope="module")
def stated(tmp_path_factory):
    """(subject, source, experiment, key) of every claim that the suite can judge."""
    path = tmp_path_factory.mktemp("stated") / "claims.json"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", COLLECT, str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert path.exists(), done.stdout + done.stderr
    return {tuple(entry) for entry in json.loads(path.read_text())}


def test_claims_were_collected(stated):
    assert ("smollm2-135m-instruct", "measured", "layer_knockout", "T-2.2 L07") in stated
    assert ("smollm2-135m-instruct", "measured", "layer_knockout", "T-2.2 L30") not in stated


@pytest.mark.parametrize("address", list(all_addresses()), ids=lambda a: f"{a.subject}-{a.condition}-{a.experiment}")
def test_every_recorded_verdict_is_of_a_claim_that_exists(stated, address):
    source = "published" if address.condition == "published" else "measured"
    recorded = load(address.path).get("verdicts", {})
    stale = [key for key in recorded if (address.subject, source, address.experiment, key) not in stated]
    assert stale == [], f"nothing states these claims (there); take them out of {address.path}"
