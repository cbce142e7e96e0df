# Two commands do everything: `make findings` and `make test`.
PYTHON ?= python3
SUBJECTS ?= smollm2-135m-instruct
RESULTS ?= results

BIN := .venv/bin
INSTALLED := .venv/.installed
ATLAS = $(BIN)/python -m lab report --output $(RESULTS)/atlas
WRITE_RESULTS = --verdicts $(RESULTS)/verdicts.json --junitxml $(RESULTS)/junit.xml

.PHONY: findings test atlas lint bench install clean

# Audit every claim on the published figures and measure the subjects; verdict table and atlas are the result.
findings: $(INSTALLED)
	$(BIN)/python -m lab fetch $(SUBJECTS)
	$(BIN)/pytest findings -m "published or (measured and not gpu)" $(SUBJECTS:%=--subject %) $(WRITE_RESULTS); \
	status=$$?; $(ATLAS) --verdicts $(RESULTS)/verdicts.json && exit $$status

# The instruments' calibration, then the whole suite against the committed snapshots.
test: $(INSTALLED)
	$(BIN)/python -m lab fetch smollm2-135m-instruct
	$(BIN)/pytest findings $(WRITE_RESULTS)

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

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv $(RESULTS) build *.egg-info
