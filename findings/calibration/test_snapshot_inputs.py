"""Snapshots were measured on the weights and texts that lie here, to the last bit.

Numbers have tolerances, for other kernels move them; a change of weights or text that is small enough hides
within. Digests have none, and no kernel moves them.
"""

import pytest

from lab.corpora.corpus import load_corpus
from lab.corpora.reading import committed_path
from lab.snapshots.addresses import all_addresses, load
from lab.subjects import catalog, weights

pytestmark = pytest.mark.calibration

MEASURED = [address for address in all_addresses() if address.condition != "published"]


def recorded(address, name):
    return load(address.path)["provenance"][name]


@pytest.mark.parametrize("address", MEASURED, ids=lambda a: f"{a.subject}-{a.condition}-{a.experiment}")
def test_weights_are_those_of_the_snapshot(address):
    facts = catalog.facts(address.subject)
    folder = weights.location(facts)
    if folder is None:
        pytest.skip(f"the weights of {facts.name} are not here; {weights.fetch_command(facts)}")
    assert weights.weights_digest(folder) == recorded(address, "subject")


@pytest.mark.parametrize("address", MEASURED, ids=lambda a: f"{a.subject}-{a.condition}-{a.experiment}")
def test_texts_are_those_of_the_snapshot(address):
    corpus = load_corpus(catalog.facts(address.subject), None, committed_path(address.subject))
    assert corpus.digest == recorded(address, "corpus")
