# Everything runs in .venv; `make` targets are what CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a process: two OpenMP threads on busy cores ran tiny operations up to 300 times slower.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo federation test lint bench utility audit soak fuzz vectors docs clean

$(BIN)/activate-demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo]"
	touch $@

$(BIN)/activate-dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@ $(BIN)/activate-demo

$(BIN)/activate-fuzz: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,fuzz]"
	touch $@ $(BIN)/activate-demo $(BIN)/activate-dev

demo: $(BIN)/activate-demo  ## Four hospitals on one machine, real model, real clinical text.
	$(BIN)/umbel-simulate run quickstart

federation: $(BIN)/activate-demo  ## A server and three hospitals as real processes, with TLS.
	$(BIN)/umbel-simulate federation

test: $(BIN)/activate-dev  ## All tests, as in CI.
	$(BIN)/pytest -n 2 --dist loadfile

lint: $(BIN)/activate-dev  ## Format, style, types, import directions.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(BIN)/activate-dev  ## Measures this machine; writes build/bench.json.
	$(BIN)/python tests/benchmarks/run.py build/bench.json

utility: $(BIN)/activate-dev  ## The quickstart under three seeds; minutes. Commit what it writes.
	$(BIN)/python tests/benchmarks/utility.py docs/benchmarks/utility.json

audit: $(BIN)/activate-dev  ## Attacks on the quickstart; minutes. Commit what it writes.
	$(BIN)/python tests/benchmarks/audit.py docs/benchmarks/audit.json

soak: $(BIN)/activate-dev  ## Real processes that die, lines that are slow; half an hour, outside CI.
	$(BIN)/python tests/benchmarks/soak.py docs/benchmarks/soak.json

fuzz: $(BIN)/activate-fuzz  ## A million hostile inputs, 10,000 sums; half an hour.
	HYPOTHESIS_PROFILE=fuzz $(BIN)/pytest tests/fuzz tests/common/secagg/test_attempt.py --timeout 7200

vectors: $(BIN)/activate-dev  ## Rewrites tests/vectors/*.json; a change is one of the protocol.
	$(BIN)/python tests/vectors/generate.py

docs: $(BIN)/activate-dev  ## Holds commands, exit codes, checks and outputs against the documentation.
	$(BIN)/pytest tests/test_docs.py tests/test_keys_doc.py tests/test_budget_doc.py tests/test_protocol_docs.py

clean:
	rm -rf $(VENV) build dist
