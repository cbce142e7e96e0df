"""A toy suite in a folder of its own: one experiment of three layers, two subjects, no model; and the peers."""

import inspect
import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

from lab import experiments, paths, published
from lab.subjects import catalog
from lab.subjects.weights import fetch_command, location

EXPERIMENT = """
    import json, os
    from dataclasses import dataclass
    from pathlib import Path

    from lab.errors import UserError
    from lab.experiments import Experiment, Tolerance
    from lab.records import Record, variable


    class Toy(Record):
        @property
        def loss(self):
            return self.mean("loss")

        @property
        def layer_loss(self):
            return self.mean("layer_loss")


    @dataclass(frozen=True)
    class Budget:
        prompts: int = 4


    def measure(subject, corpus, budget, sweep):
        import xarray as xr

        with open(os.environ["TOY_LOG"], "a") as log:
            log.write("measured\\n")
        values = json.loads(Path(os.environ["TOY_VALUES"]).read_text())
        if "error" in values:
            raise UserError(values["error"])
        sweep.progress(1, 1, "toys")
        return xr.Dataset({
            "scored_tokens": variable("prompt", [10, 20, 30, 40], "token", "scored tokens"),
            "loss": variable("prompt", values["loss"], "nat/token", "loss"),
            "layer_loss": variable(("layer", "prompt"), values["layer_loss"], "nat/token", "loss per layer"),
        }, {"layer": [0, 1, 2]}, {"settings": json.dumps({"vocabulary": 7})})


    EXPERIMENT = Experiment(
        id="X-1", title="Toy", question="Does the plugin work?", record=Toy, measure=measure,
        budgets={"quick": Budget()}, tolerances={"": Tolerance(0.01, 0.0, "toys are exact to a percent")},
    )
"""

CLAIMS = '''
    from fixtures.claims import claim, not_applicable

    def test_toy_matches_snapshot(toy, snapshot):
        assert toy == snapshot

    @claim("X-1.1", "published")
    def test_loss(toy):
        """The loss is below two."""
        assert toy.loss < 2

    @claim("X-1.1b", "corrected")
    def test_every_layer(toy, layer):
        """Every layer's loss is at most three."""
        assert toy.layer_loss.sel(layer=layer) <= 3

    @claim("X-1.10", "control")
    def test_prompts(toy):
        """The first prompt's loss is positive."""
        assert toy.variable("prompt_loss")[0] > 0

    @claim("X-1.11", "published", on="famous")
    def test_famous(toy):
        """The famous model's loss is one."""
        assert toy.loss == 1
'''

PLUGIN = 'pytest_plugins = ["fixtures.plugin"]\n'
VALUES = {
    "loss": [1.0, 1.1, 0.9, 1.0],
    "layer_loss": [[1.0, 1.1, 0.9, 1.0], [2.0, 2.1, 1.9, 2.0], [4.0, 4.1, 3.9, 4.0]],
}


def toy_world(folder, patch):
    """Put the toy experiment and subjects in the place of the real ones, through `patch(name, value)`.

    Its source also runs in the conftest.py of subprocesses, hence the imports inside.
    """
    import sys
    from pathlib import Path
    from types import SimpleNamespace

    from lab.subjects.facts import Facts, Local

    def facts(name, **more):
        geometry = {"layers": 3, "width": 4, "heads": 1, "kv_heads": 1, "head_dim": 4, "mlp_width": 8, "vocabulary": 7}
        kind = {
            "architecture": "toy",
            "tied": True,
            "parameters": 1,
            "licence": "MIT",
            "size_bytes": 1,
            "frame": "plain",
        }
        return Facts(name=name, source=Local(Path(folder)), **geometry, **kind, **{"device": "cpu", **more})

    subjects = [
        facts("tiny", default=True),
        facts("small"),
        facts("missing"),
        facts("famous", device="gpu", published=("toy",)),
    ]
    corpus = SimpleNamespace(digest="toy corpus", settings={}, problems=list)
    loading = SimpleNamespace(
        load=lambda facts, dtype, device: SimpleNamespace(facts=facts, digest="toy weights", tokenizer=None)
    )
    sys.path.insert(0, str(folder))
    (Path(folder) / "completions.json").write_text("{}")
    patch("lab.experiments.modules", lambda: {"toy": "toy_experiment"})
    patch("lab.paths.SNAPSHOTS", Path(folder) / "snapshots")
    patch("lab.paths.DATA", Path(folder) / "data")
    for place in ("catalog", "weights", "uncatalogued"):  # each has taken the name into its own
        patch(f"lab.subjects.{place}.catalog", lambda: {subject.name: subject for subject in subjects})
    patch("lab.subjects.weights.location", lambda facts: None if facts.name == "missing" else Path(folder))
    patch("lab.subjects.weights.weights_digest", lambda folder: "toy weights")
    patch("lab.corpora.reading.committed_path", lambda subject: Path(folder) / "completions.json")
    patch("lab.corpora.corpus.load_corpus", lambda facts, tokenizer, path: corpus)
    sys.modules["lab.subjects.loading"] = sys.modules["lab.subjects.several_devices"] = loading
    backends = SimpleNamespace(cpu=SimpleNamespace(get_cpu_capability=lambda: "TOY"))
    cuda = SimpleNamespace(get_device_name=lambda: "toy device")
    sys.modules["torch"] = SimpleNamespace(get_num_threads=lambda: 1, backends=backends, cuda=cuda)


class Suite:
    """The toy suite; `run` runs it in this process, `run_apart` in one of its own (for xdist)."""

    def __init__(self, pytester: pytest.Pytester):
        self._pytester = pytester
        self.folder: Path = pytester.path
        self.values(VALUES)
        pytester.makepyfile(toy_experiment=EXPERIMENT)
        pytester.makeconftest(PLUGIN)
        self.claims(CLAIMS)
        pytester.makeini("[pytest]\naddopts = --strict-markers -p no:hypothesispytest -p no:benchmark -p no:anyio\n")

    def claims(self, text: str, module: str = "test_toy") -> None:
        self._pytester.makepyfile(**{module: dedent(text)})

    def values(self, values: dict) -> None:
        (self.folder / "values.json").write_text(json.dumps(values))

    def publish(self, loss: float = 1.0) -> None:
        entries = {"loss": ([], loss), "layer_loss": (["layer"], [1.0, 2.0, 4.0])}
        quantities = {
            name: {
                "unit": "nat/token",
                "description": name,
                "dims": dims,
                "coords": {dim: [0, 1, 2] for dim in dims},
                "value": value,
            }
            for name, (dims, value) in entries.items()
        }
        document = {"subject": "famous", "source": {}, "settings": {}, "quantities": quantities}
        path = self.folder / "data" / "published" / "toy.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))
        published._document.cache_clear()

    def run(self, *arguments: str) -> pytest.RunResult:
        return self._pytester.runpytest_inprocess(*arguments)

    def run_apart(self, *arguments: str) -> pytest.RunResult:
        patching = f"from pathlib import Path\nimport pytest\n\n{inspect.getsource(toy_world)}\n"
        call = "toy_world(Path(__file__).parent, pytest.MonkeyPatch().setattr)\n"
        self._pytester.makeconftest(PLUGIN + patching + call)
        return self._pytester.runpytest_subprocess(*arguments)

    def snapshot(self, subject: str = "tiny", condition: str = "quick-bfloat16") -> Path:
        return self.folder / "snapshots" / subject / condition / "toy.json"

    def recorded(self, **which: str) -> dict:
        return json.loads(self.snapshot(**which).read_text())

    def verdicts(self, *arguments: str) -> list[dict]:
        """Run with these arguments and return the verdicts file's content."""
        self.run("--verdicts", "verdicts.json", *arguments)
        return json.loads((self.folder / "verdicts.json").read_text())

    @property
    def measurements(self) -> int:
        log = self.folder / "log"
        return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture(scope="session")
def imported() -> None:
    """Import what runs of the toy suite need before pytester begins, for it forgets what it saw being imported.

    What `toy_world` patches must not be imported afresh, and compiled modules cannot be.
    """
    for name in (
        "lab.corpora.corpus",
        "lab.corpora.on_the_spot",
        "lab.corpora.reading",
        "lab.subjects.weights",
        "scipy.io",
    ):
        import_module(name)


@pytest.fixture
def suite(imported, pytester, monkeypatch, tmp_path) -> Suite:
    monkeypatch.setenv("DL_FINDINGS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TOY_VALUES", str(pytester.path / "values.json"))
    monkeypatch.setenv("TOY_LOG", str(pytester.path / "log"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)  # toys are no findings of the run that tests them
    for name in ("CI", "BUILD_NUMBER"):  # where pytest finds one of them, it repeats each message uncut in its summary
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(pytester.path)
    # toy_world replaces them; this restores them
    for name in ("lab.subjects.loading", "lab.subjects.several_devices", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    toy_world(pytester.path, monkeypatch.setattr)
    experiments.experiment.cache_clear()
    published._document.cache_clear()
    yield Suite(pytester)
    experiments.experiment.cache_clear()
    published._document.cache_clear()


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A folder of specimens and recipes of its own, for a subject called tiny."""
    from lab.corpora import thinking
    from lab.corpora.exercises import worked_exercises
    from lab.training import answers, making, recipes

    text = (paths.DATA / "specimens" / "recipes.toml").read_text(encoding="utf-8")
    text = (
        text.replace('"smollm2-135m-instruct"', '"tiny"')
        .replace("steps = 200", "steps = 2")
        .replace("steps = 160", "steps = 2")
        .replace("steps = 60", "steps = 2")
    )
    text = (
        text.replace("batch = 16", "batch = 2").replace("warmup = 20", "warmup = 1").replace("warmup = 6", "warmup = 1")
    )
    (tmp_path / "data" / "specimens").mkdir(parents=True)
    (tmp_path / "data" / "specimens" / "recipes.toml").write_text(text, encoding="utf-8")
    (tmp_path / "data" / "specimens" / "manifest.json").write_text("{}")
    (tmp_path / "data" / "prompts.json").write_bytes((paths.DATA / "prompts.json").read_bytes())
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    monkeypatch.setenv("DL_FINDINGS_CACHE", str(tmp_path / "cache"))
    # two steps read four texts: a hundred are enough to draw them from, and quickly put into tokens
    monkeypatch.setattr(making, "worked_exercises", lambda tokenizer, all_: worked_exercises(tokenizer, all_[:100]))
    monkeypatch.setattr(thinking, "TRAINED", 40)
    monkeypatch.setattr(thinking, "EVALUATED", 3)
    monkeypatch.setattr(answers, "ROOM", 0.05)
    thinking.items.cache_clear()
    recipes._document.cache_clear()
    yield tmp_path / "data" / "specimens"
    recipes._document.cache_clear()
    thinking.items.cache_clear()


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The safetensors and the tokenizer of SmolLM2-135M-Instruct, as they are stored."""
    subject = catalog.facts("smollm2-135m-instruct")
    here = location(subject)
    if here is None:
        pytest.skip(f"the weights of {subject.name} are not here; {fetch_command(subject)}")
    return here


PEERS = Path(__file__).with_name("peers.py")


@pytest.fixture(scope="session")
def ask(tmp_path_factory):
    """Asks an implementation that is not ours for its numbers, or skips: `peers.py` says what is asked and answered."""

    def answer(peer: str, request: dict) -> dict[str, np.ndarray]:
        if find_spec(peer) is None:
            pytest.skip(f"{peer} is not installed: pip install -c constraints.txt -e .[peers]")
        folder = tmp_path_factory.mktemp(peer)
        (folder / "request.json").write_text(json.dumps(request))
        run = subprocess.run(
            [sys.executable, PEERS, peer, folder / "request.json", folder / "answer.npz"],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        with np.load(folder / "answer.npz") as arrays:
            return dict(arrays)

    return answer


@pytest.fixture(scope="module")
def losses() -> dict:
    """What each way of a benchmark found, nat/token, to be compared when both have run."""
    return {}
