"""The plugin, on a toy suite: outcomes, records, the command line, and what a run leaves behind."""

import json

import pytest

from findings.calibration.collected import named

pytestmark = pytest.mark.calibration
FIELDS = [
    "claim", "kind", "statement", "experiment", "subject", "source", "where",
    "verdict", "recorded", "outcome", "measured", "threshold", "support", "seconds",
]  # fmt: skip


# ---- outcomes

HELD, FAILED, INAPPLICABLE = "assert toy.loss < 2", "assert toy.loss > 2", "not_applicable('no toys')"


@pytest.mark.parametrize(
    ("recorded", "now", "expected"),
    [
        (HELD, HELD, "passed"),
        (HELD, FAILED, "failed"),
        (HELD, INAPPLICABLE, "failed"),
        (FAILED, FAILED, "xfailed"),
        (FAILED, HELD, "failed"),
        (FAILED, INAPPLICABLE, "failed"),
        (INAPPLICABLE, INAPPLICABLE, "skipped"),
        (INAPPLICABLE, HELD, "failed"),
        (INAPPLICABLE, FAILED, "failed"),
        (None, HELD, "passed"),
        (None, FAILED, "failed"),
        (None, INAPPLICABLE, "skipped"),
    ],
)
def test_outcome_table(suite, recorded, now, expected):
    def state(body):
        head = "from fixtures.claims import claim, not_applicable\n@claim('X-1.1', 'published')\n"
        suite.claims(f'{head}def test_loss(toy):\n    """The loss."""\n    {body}\n')

    if recorded:
        state(recorded)
        first = suite.run("--snapshot-update")
        first.assert_outcomes(**{{HELD: "passed", FAILED: "xfailed", INAPPLICABLE: "skipped"}[recorded]: 1})
    state(now)
    result = suite.run()
    result.assert_outcomes(**{expected: 1})
    drifted = recorded not in (None, now)
    assert ("drift" in str(result.stdout)) == drifted
    assert "INTERNALERROR" not in str(result.stdout)


def test_an_expected_failure_keeps_no_traceback_unless_asked_for(suite):
    suite.run("--snapshot-update")
    asked = ("--xfail-tb", "-k", "L02")
    short, full = suite.run(*asked), suite.run(*asked, "--full-trace")
    for result in (short, full):
        result.assert_outcomes(xfailed=1)
    short.stdout.fnmatch_lines(["All traceback entries are hidden*"])
    assert "def pytest_pyfunc_call" not in str(short.stdout)
    assert "def pytest_pyfunc_call" in str(full.stdout)


def test_failure_says_what_was_measured_and_what_was_needed(suite):
    result = suite.run("-k", "L02")
    result.stdout.fnmatch_lines(
        [
            ">*assert toy.layer_loss.sel(layer=layer) <= 3",
            "E*X-1.1b on tiny, L02 (quick-bfloat16): Every layer's loss is at most three.",
            "E*measured   3.99",
            "E*threshold  <= 3",
        ]
    )


def test_drift_names_the_recorded_counter_example(suite):
    suite.run("--snapshot-update")
    suite.values({"loss": [3.0] * 4, "layer_loss": [[1.0] * 4] * 3})
    result = suite.run("--fresh", "-k", "X-1.1")
    result.stdout.fnmatch_lines(
        ["*drift      the snapshot of tiny says holds (measured 0.99, needed < 2); now it fails"]
    )
    result.stdout.fnmatch_lines(
        ["*drift      the snapshot of tiny says refuted (measured 3.99, needed <= 3); now the claim holds"]
    )


def test_an_error_in_a_claim_is_no_verdict(suite):
    suite.claims(
        '''
        from fixtures.claims import claim
        @claim("X-1.1", "published")
        def test_loss(toy):
            """The loss."""
            assert toy.loss.sel(nowhere=1) < 2
        '''
    )
    (row,) = suite.verdicts("--snapshot-update")
    assert (row["verdict"], row["outcome"]) == (None, "failed")
    assert not suite.snapshot().exists()


# ---- records


def test_a_record_is_measured_once_and_then_read(suite):
    suite.run()
    suite.run()
    assert suite.measurements == 1
    suite.run("--fresh")
    assert suite.measurements == 2


def test_a_failed_measurement_is_one_line_and_not_repeated(suite):
    suite.values({"error": "the loss of prompt 3 is not finite; lower the learning rate"})
    result = suite.run("-k", "X-1.1")
    result.assert_outcomes(errors=4)
    assert suite.measurements == 1
    assert "Traceback" not in str(result.stdout)
    assert "another exception" not in str(result.stdout)
    assert "def " not in str(result.stdout)


def test_missing_weights_skip_with_the_command_that_fetches_them(suite):
    result = suite.run("--subject", "missing", "-rs", "-k", "X-1.10")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*the weights of missing are not here; python -m lab fetch missing"])


def test_unfit_completions_skip_with_the_reason(suite, monkeypatch):
    corpus = type("Unfit", (), {"digest": "", "problems": lambda self: ["only 3 tokens can be scored"]})()
    monkeypatch.setattr("lab.corpora.corpus.load_corpus", lambda facts, tokenizer, path: corpus)
    result = suite.run("-rs", "-k", "X-1.10")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(
        ["SKIPPED*the completions of tiny are unfit: only 3 tokens can be scored; *--corpus FILE"]
    )


def test_a_verdict_that_depends_on_the_prompts_drawn_may_turn(suite):
    """The loss is 0.99: held against limits just above and below, about half of the resamples pass either way."""

    def state(limit):
        body = f"assert toy.loss < {limit}"
        suite.claims(f'''
            from fixtures.claims import claim

            @claim("X-1.1", "published")
            def test_loss(toy):
                """The loss."""
                {body}
        ''')

    state(0.995)
    suite.run("--snapshot-update").assert_outcomes(passed=1)
    recorded = suite.recorded()["verdicts"]["X-1.1"]
    assert recorded["verdict"] == "holds"
    assert 0.05 < recorded["support"] < 0.95
    state(0.985)
    result = suite.run("-rx", "--drift", "drift.json")
    result.assert_outcomes(xfailed=1)
    assert "refuted, recorded as holds (support" in str(result.stdout)
    assert json.loads((suite.folder / "drift.json").read_text())["differences"] == []
    state(0.5)
    suite.run().assert_outcomes(failed=1)


def test_support_is_the_share_of_resamples_in_which_the_claim_holds(suite):
    suite.values({"loss": [1.0, 1.0, 1.0, 3.0], "layer_loss": [[1.0] * 4] * 3})  # 1.8; more if the last is drawn twice
    rows = {row["claim"]: row for row in suite.verdicts("--subject", "tiny")}
    assert 0.2 < rows["X-1.1"]["support"] < 0.8
    assert rows["X-1.1b"]["support"] == 1
    assert rows["X-1.10"]["support"] is None
    suite.run("-k", "X-1.1").stdout.fnmatch_lines(["*fragile*"])


# ---- the command line


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--subject", "tinny"), "unknown subject 'tinny': did you mean tiny"),
        (("--against", "tinny"), "unknown subject 'tinny'"),
        (("--model", "/nowhere/at-all"), "/nowhere/at-all"),
        (("--corpus", "nowhere.json"), "there is no file nowhere.json"),
        (("--budget", "huge"), "invalid choice: 'huge'"),
        (("--against", "small", "--snapshot-update"), "--against compares and --snapshot-update records"),
    ],
)
def test_a_wrong_option_is_one_line(suite, arguments, complaint):
    result = suite.run(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert complaint in str(result.stderr)
    assert "Traceback" not in f"{result.stdout}{result.stderr}"


def test_verdicts_file_has_one_object_per_claim_test(suite):
    suite.publish()
    suite.run("--snapshot-update")
    rows = suite.verdicts()
    assert all(list(row) == FIELDS for row in rows)
    assert [(row["claim"], row["source"], row["where"]) for row in rows if row["claim"] == "X-1.1b"] == [
        ("X-1.1b", source, f"L0{layer}") for source in ("measured", "published") for layer in range(3)
    ]
    third = next(row for row in rows if row["where"] == "L02" and row["source"] == "measured")
    assert third | {"seconds": 0} == {
        "claim": "X-1.1b", "kind": "corrected", "statement": "Every layer's loss is at most three.",
        "experiment": "toy", "subject": "tiny", "source": "measured", "where": "L02",
        "verdict": "refuted", "recorded": "refuted", "outcome": "xfailed",
        "measured": 3.99, "threshold": "<= 3", "support": 0.0, "seconds": 0,
    }  # fmt: skip


@pytest.mark.parametrize("option", ["--verdicts", "--drift", "--summary"])
@pytest.mark.parametrize(
    ("file", "why"),
    [("taken/out.json", "*taken is no folder that can be written to"), ("folder", "*folder is a folder")],
)
def test_a_result_that_cannot_be_written_is_refused_before_anything_runs(suite, option, file, why):
    (suite.folder / "taken").write_text("")
    (suite.folder / "folder").mkdir()
    result = suite.run(option, file)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "INTERNALERROR" not in str(result.stdout)
    result.stderr.fnmatch_lines([f"ERROR: cannot write {option} {file}: {why}; name another file"])


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("gpu", "unknown device 'gpu': choose cpu, cuda or cuda:N"),
        ("cuda:first", "unknown device 'cuda:first': choose cpu, cuda or cuda:N"),
        (
            "cuda:2",
            "the device cuda:2 is not to be had: the driver sees 2 CUDA devices here; choose another with --device",
        ),
        ("cuda:1", None),
        ("cpu", None),
    ],
)
def test_a_device_that_is_not_there_is_refused_once(suite, monkeypatch, device, said):
    monkeypatch.setattr("fixtures.devices.cuda_devices", lambda: 2)
    result = suite.run("--device", device, "--collect-only", "-q")
    assert (result.ret == pytest.ExitCode.USAGE_ERROR) == bool(said)
    if said:
        result.stderr.fnmatch_lines([f"ERROR: {said}"])


def test_a_catalogued_name_for_a_model_is_told_from_a_path(suite):
    result = suite.run("--model", "tiny")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: tiny is a subject of the catalog: choose it with --subject tiny"])


def test_table_folds_layers_into_one_row(suite):
    suite.publish()
    text = " ".join(str(suite.run("-k", "X-1.1b").stdout).split())
    assert "holds 2/3; holds 2/3; least at most" not in text
    assert text.count("fails L02") == 2
    result = suite.run()
    result.stdout.fnmatch_lines(
        ["*verdicts*", "*claim*statement*", "famous (published): 4 holds, 1 refuted, 1 not applicable"]
    )
    result.stdout.fnmatch_lines(["tiny (measured): 3 holds, 1 refuted, 1 not applicable"])


def test_junit_xml_is_written_by_pytest(suite):
    suite.run("--junitxml", "junit.xml")
    assert 'name="test_every_layer[tiny-L02]"' in (suite.folder / "junit.xml").read_text()


def test_exitfirst_and_last_failed_behave_as_usual(suite):
    suite.run("--snapshot-update", "-k", "toy_matches")
    first = suite.run("-x")
    first.assert_outcomes(passed=4, failed=1)
    assert named(suite.run("--lf", "--collect-only", "-q")) == ["test_every_layer[tiny-L02]"]


def test_two_workers_measure_once_and_write_one_of_everything(suite):
    suite.publish()
    result = suite.run_apart("-n", "2", "--snapshot-update", "--verdicts", "verdicts.json")
    result.assert_outcomes(passed=9, xfailed=2, skipped=2)
    assert suite.measurements == 1
    rows = json.loads((suite.folder / "verdicts.json").read_text())
    assert len(rows) == 11
    recorded = suite.recorded()
    assert set(recorded["numbers"]) == {"loss", "layer_loss"}
    assert list(recorded["verdicts"]) == ["X-1.1", "X-1.1b L00", "X-1.1b L01", "X-1.1b L02", "X-1.10"]
    again = suite.run_apart("-n", "2")
    again.assert_outcomes(passed=9, xfailed=2, skipped=2)
    assert suite.measurements == 1


def test_malformed_claims_stop_workers_too(suite):
    suite.claims(CLAIM_WITHOUT_RECORD)
    result = suite.run_apart("-n", "1")
    assert result.ret != 0
    assert "claim X-1.1 takes no record" in f"{result.stdout}{result.stderr}"


CLAIM_WITHOUT_RECORD = '''
    from fixtures.claims import claim
    @claim("X-1.1", "published")
    def test_a():
        """A."""
'''
