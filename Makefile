# Two commands do everything: `make findings` and `make test`.
PYTHON ?= python3
SUBJECTS ?= smollm2-135m-instruct
RESULTS ?= results
GPU_SUBJECTS ?= qwen3-4b-instruct-2507
BUDGET ?= quick
# More options for pytest, such as --snapshot-update.
OPTIONS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
ATLAS = $(BIN)/python -m lab report --output $(RESULTS)/atlas
WRITE_RESULTS = --verdicts $(RESULTS)/verdicts.json --drift $(RESULTS)/drift.json \
	--summary $(RESULTS)/summary.md --junitxml $(RESULTS)/junit.xml

.PHONY: findings test gpu atlas lint bench peers alarms faults fuzz mutants install clean

# Audit every claim on the published figures and measure the subjects; verdict table and atlas are the result.
findings: $(INSTALLED)
	$(BIN)/python -m lab fetch $(SUBJECTS)
	$(BIN)/pytest findings -m "published or (measured and not gpu)" $(SUBJECTS:%=--subject %) $(WRITE_RESULTS) $(OPTIONS); \
	status=$$?; $(ATLAS) --verdicts $(RESULTS)/verdicts.json && exit $$status

# The instruments' calibration, then the whole suite against the committed snapshots.
test: $(INSTALLED)
	$(BIN)/python -m lab fetch smollm2-135m-instruct
	$(BIN)/pytest findings $(WRITE_RESULTS) $(OPTIONS)

# What needs a CUDA device, on the models that the findings were published on.
gpu: $(INSTALLED)
	$(BIN)/python -m lab fetch $(GPU_SUBJECTS)
	$(BIN)/pytest findings -m gpu --budget $(BUDGET) $(WRITE_RESULTS) $(OPTIONS)

# The static site of claims and subjects, from the committed snapshots: seconds, no weights.
atlas: $(INSTALLED)
	$(ATLAS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m lab fetch smollm2-135m-instruct
	$(BIN)/pytest findings -m benchmark --benchmark-only --benchmark-columns=min,mean,rounds

# The core instruments against TransformerLens, nnsight, weightwatcher and others: their numbers, then their times.
peers: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,audio,peers]"
	$(BIN)/python -m lab fetch smollm2-135m-instruct
	$(BIN)/pytest findings/calibration/test_peers.py $(OPTIONS)
	$(BIN)/pytest findings/calibration/test_bench_peers.py -m benchmark --benchmark-columns=min,mean,rounds $(OPTIONS)

# Whether the drift gate cries wolf or sleeps, tried at length; OPTIONS=--snapshot-update records what is found.
alarms: $(INSTALLED)
	$(BIN)/python -m lab fetch smollm2-135m-instruct
	$(BIN)/pytest findings/calibration/test_alarms_on_smollm2.py $(OPTIONS)

# kill -9 at random moments, 200 times: minutes, no weights.
faults: $(INSTALLED)
	TQDM_DISABLE=1 OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python findings/calibration/killing.py all --kills 40

# Damaged files of every kind that a user hands over, 1,500 of each: read or refused in one line.
fuzz: $(INSTALLED)
	TQDM_DISABLE=1 OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python findings/calibration/fuzzing.py all --cases 1500

# Small mistakes in the instruments and statistics, eight in each module: the tests must notice. About an hour, no weights.
mutants: $(INSTALLED)
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python findings/calibration/mutating.py $(OPTIONS)

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,audio]"
	touch $@

clean:
	rm -rf .venv $(RESULTS) build *.egg-info
