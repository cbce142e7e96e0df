"""Collection by the plugin, on a toy suite: ids, markers, which subjects, and malformed claims."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from findings.calibration.collected import named

pytestmark = pytest.mark.calibration

REPOSITORY = Path(__file__).parents[2]


def test_ids_name_subject_and_layer(suite):
    suite.publish()
    collected = named(suite.run("--collect-only", "-q"))
    assert collected == [
        "test_toy_matches_snapshot[famous]",
        "test_toy_matches_snapshot[tiny]",
        "test_loss[famous]",
        "test_loss[tiny]",
        *[f"test_every_layer[{subject}-L0{layer}]" for subject in ("famous", "tiny") for layer in range(3)],
        "test_prompts[famous]",
        "test_prompts[tiny]",
        "test_famous[famous]",
    ]
    assert suite.measurements == 0


def test_without_published_figures_only_measurements_are_collected(suite):
    assert named(suite.run("--collect-only", "-q", "-k", "X-1.1 or X-1.11")) == [
        "test_loss[tiny]",
        *[f"test_every_layer[tiny-L0{layer}]" for layer in range(3)],
    ]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("X-1.1", {"test_loss", "test_every_layer"}),
        ("X-1.1b", {"test_every_layer"}),
        ("X-1.10", {"test_prompts"}),
        ("X-1", {"test_loss", "test_every_layer", "test_prompts"}),
        ("X-1.1 and not X-1.1b", {"test_loss"}),
        ("(X-1.10)", {"test_prompts"}),
        ("toy_matches", {"test_toy_matches_snapshot"}),
        ("L01", {"test_every_layer"}),
    ],
)
def test_k_finds_a_claim_and_its_lettered_siblings(suite, expression, expected):
    collected = named(suite.run("--collect-only", "-q", "-k", expression))
    assert {name.partition("[")[0] for name in collected} == expected


def test_k_says_which_claims_it_did_not_find(suite):
    for expression, missing in (("X-1.99", ["X-1.99"]), ("X-1.1 or X-7", ["X-7"]), ("X-1.1 and not X-1.1b", [])):
        said = str(suite.run("--collect-only", "-q", "-k", expression).stdout)
        assert [line.split()[3] for line in said.splitlines() if line.startswith("no test of")] == [
            f"{claim}:" for claim in missing
        ]
    assert str(suite.run("-q", "-k", "X-1.99 or X-1.1", "-n", "2").stdout).count("no test of X-1.99:") == 1


def test_markers_part_published_from_measured(suite):
    suite.publish()
    assert all("famous" in name for name in named(suite.run("--collect-only", "-q", "-m", "published")))
    assert all("tiny" in name for name in named(suite.run("--collect-only", "-q", "-m", "measured")))


@pytest.mark.parametrize("source", ["published", "measured"])
def test_a_source_alone_has_the_tests_and_ids_of_the_whole(suite, source):
    """Tests that `-m published` or `-m measured` would deselect are not even made; the others are what they are."""
    suite.publish()
    asked = ("--collect-only", "-q", "--subject", "famous", "--device", "cpu")
    alone, picked = suite.run(*asked, "-m", source), suite.run(*asked, "-m", f"{source} and {source}")
    assert "deselected" not in str(alone.stdout)
    assert "deselected" in str(picked.stdout)
    assert named(alone) == named(picked) != []


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("published", False),
        ("published or measured", False),
        ("published or calibration", True),
        ("not published", True),
        ("published or gpu", True),
        ("calibration", True),
    ],
)
def test_calibration_is_not_imported_where_only_claims_are_asked_for(suite, expression, expected):
    folder = suite.folder / "findings" / "calibration"
    folder.mkdir(parents=True)
    (folder / "test_instrument.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    suite.run("--collect-only", "-q", "-m", expression)
    assert (suite.folder / "imported").exists() == expected


def test_subjects_are_chosen_by_name(suite):
    suite.publish()
    ask = ("--collect-only", "-q", "-k", "test_loss")
    assert named(suite.run(*ask, "--subject", "small")) == ["test_loss[famous]", "test_loss[small]"]
    everything = named(suite.run(*ask, "-m", "measured", "--subject", "all"))
    assert everything == ["test_loss[tiny]", "test_loss[small]", "test_loss[missing]"]


def test_gpu_subjects_wait_to_be_asked_for(suite, monkeypatch):
    suite.publish()
    asked = ("--collect-only", "-q", "-m", "gpu", "-k", "test_loss")
    monkeypatch.setattr("fixtures.collection.cuda_is_here", lambda: True)
    assert named(suite.run(*asked)) == ["test_loss[famous]"]
    assert named(suite.run("--collect-only", "-q", "-m", "not gpu", "-k", "test_loss")) == [
        "test_loss[famous]",
        "test_loss[tiny]",
    ]
    monkeypatch.setattr("fixtures.collection.cuda_is_here", lambda: False)
    nothing = suite.run(*asked)
    assert named(nothing) == []
    nothing.stdout.fnmatch_lines(["* need a CUDA device: there is none here"])


def test_only_what_was_asked_for_counts_as_needing_a_device(suite):
    assert "1 tests need a CUDA device: add -m gpu" in str(suite.run("-k", "test_loss", "--subject", "famous").stdout)
    assert "need a CUDA device" not in str(suite.run("-k", "X-9.99", "--subject", "famous").stdout)


def test_a_large_model_runs_on_the_cpu_if_the_user_insists(suite):
    asked = ("--collect-only", "-q", "-k", "test_loss", "--subject", "famous")
    assert named(suite.run(*asked)) == []
    assert named(suite.run(*asked, "--device", "cpu")) == ["test_loss[famous]"]


def test_published_and_measured_ids_of_one_subject_differ(suite, monkeypatch):
    suite.publish()
    monkeypatch.setattr("fixtures.collection.cuda_is_here", lambda: True)
    collected = named(suite.run("--collect-only", "-q", "-m", "gpu or published", "-k", "test_loss"))
    assert collected == ["test_loss[famous-published]", "test_loss[famous]"]


@pytest.mark.parametrize(
    ("claims", "complaint"),
    [
        (
            '''
            from fixtures.claims import claim
            @claim("X-1.1", "published")
            def test_a(toy):
                """A."""
            @claim("X-1.1", "published")
            def test_b(toy):
                """B."""
            ''',
            "claim X-1.1 is stated twice: by test_a and by test_b",
        ),
        (
            '''
            from fixtures.claims import claim
            @claim("X-1.1", "published")
            def test_a(toy, tmp_path):
                """A."""
            ''',
            "claim X-1.1 takes tmp_path; a claim takes records and parameters only",
        ),
        (
            '''
            from fixtures.claims import claim
            @claim("X-1.1", "published")
            def test_a():
                """A."""
            ''',
            "claim X-1.1 takes no record",
        ),
    ],
)
def test_malformed_claims_stop_the_run_with_one_line(suite, claims, complaint):
    suite.claims(claims)
    result = suite.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert complaint in str(result.stderr)
    assert "Traceback" not in f"{result.stdout}{result.stderr}"


def test_claims_may_be_parametrized_over_other_places(suite):
    suite.claims(
        '''
        import pytest
        from fixtures.claims import claim
        @pytest.mark.parametrize("matrix", ["q_proj", "k_proj"])
        @claim("X-1.2", "published")
        def test_matrix(toy, matrix):
            """Every matrix is one."""
            assert toy.loss > 0
        '''
    )
    assert [row["where"] for row in suite.verdicts()] == ["k_proj", "q_proj"]


def test_collecting_claims_imports_nothing_slow():
    code = (
        "import sys, pytest\n"
        "claims = ['findings', '-m', 'published or measured', '--collect-only']\n"
        "assert pytest.main([*claims, '-qq', '-p', 'no:cacheprovider']) == 0\n"
        "slow = ('torch', 'transformers', 'scipy.stats', 'sklearn', 'matplotlib.pyplot', 'hypothesis')\n"
        "print([name for name in slow if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
