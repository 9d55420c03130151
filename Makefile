# `make demo` and `make test` are the two commands of a fresh machine: each does all its own set-up.
PYTHON ?= python3
# Any build of torch >= 2.11 with its torchvision will do. CPU wheels only, where the index's default is CUDA:
#   make setup TORCH="torch==2.13.0 torchvision==0.28.0 --extra-index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0 torchvision==0.28.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export OMP_NUM_THREADS ?= 1
# Tests start hundreds of processes: each finds what the first has compiled, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: faults soak setup demo test unit lint integration test-ui test-slurm slurm-up slurm-down bench bench-data bench-read calibrate results equivalence gpu-check clean
.DEFAULT_GOAL := test

setup: .venv/.installed  # an environment that was moved or copied still runs the code, and the Python, that it was made with
	@cd / && test "$$($(CURDIR)/$(BIN)/python -c 'import harness; print(harness.__path__[0])' 2> /dev/null)" = "$(CURDIR)/harness" || \
		{ echo "error: .venv was made for another folder than $(CURDIR); remove it, and make setup makes it anew"; exit 2; }

.venv/.installed: pyproject.toml constraints.txt harness/data/_jpeg.c harness/data/_huffman.h
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is too old, wrbench needs Python 3.11 or later; e.g. make PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || \
		{ test "$$(id -u)" = 0 && apt-get -qq update && apt-get -qq install -y python3-venv && $(PYTHON) -m venv .venv; }
	@echo "installing pinned dependencies into .venv (a few minutes the first time)"
	@$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) $(firstword $(TORCH)) $(filter --%,$(TORCH)) $(filter https://%,$(TORCH))
	@$(BIN)/python -m pip show --quiet torchvision 2>/dev/null || $(PIP) $(TORCH)
	@DS_BUILD_OPS=0 $(PIP) --constraint constraints.txt --editable ".[dev,notebook]"
	@touch $@

data/mnist5k: | setup
	@$(BIN)/wrbench shards build mnist5k --out $@

demo: setup data/mnist5k
	@$(BIN)/wrbench study submit configs/study/demo.yaml --cluster local
	@$(BIN)/wrbench report configs/study/demo.yaml
	@echo "MLflow UI:  .venv/bin/wrbench ui"

CHROMIUM_INSTALLED := command -v chromium > /dev/null && command -v chromedriver > /dev/null
SLURM_INSTALLED := $(BIN)/python -c "from tests.slurm.cluster import missing; raise SystemExit(bool(missing()))"

test: lint unit integration  # installs packages of the system only with CI=true, on machines that are thrown away
	@if test "$$CI" = true || { $(CHROMIUM_INSTALLED); }; then $(MAKE) --no-print-directory test-ui; \
		else echo "Tests of MLflow's UI: NOT RUN, Chromium is not installed; make test-ui installs it (as root on Debian) and runs them"; fi
	@if test "$$CI" = true || $(SLURM_INSTALLED); then $(MAKE) --no-print-directory test-slurm; \
		else echo "SLURM tests: NOT RUN, SLURM is not installed; make test-slurm installs it (as root on Debian or Ubuntu) and runs them"; fi

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy harness launch analysis

unit: setup
	@$(BIN)/python -m pytest tests/unit -n 2

integration: setup
	@$(BIN)/python -m pytest tests/integration -n 2 --dist loadfile

test-ui: setup
	@{ $(CHROMIUM_INSTALLED); } || tests/ui/install.sh
	@$(BIN)/python -m pytest tests/ui

test-slurm: setup
	@$(SLURM_INSTALLED) || tests/slurm/install.sh
	@$(BIN)/python -m pytest tests/slurm -n 2 --dist loadgroup  # each worker has a cluster of its own

slurm-up: setup  # a cluster of four nodes on this machine, to play with
	@$(BIN)/python -m tests.slurm.cluster up

slurm-down: setup
	@$(BIN)/python -m tests.slurm.cluster down

faults: setup
	@$(BIN)/python -m tests.faults

soak: setup
	@$(BIN)/python -m tests.faults.soak

bench: setup data/mnist5k
	@$(BIN)/python -m tests.benchmarks.bench

build/peers: tests/benchmarks/peers.txt | setup
	@$(PIP) --no-deps --upgrade --target $@ --requirement $< && touch $@

bench-data: setup build/peers
	@$(BIN)/python -m tests.benchmarks.bench_data

bench-read: setup
	@$(BIN)/python -m tests.benchmarks.read_runs

equivalence: setup
	@$(BIN)/python -m tests.equivalence

calibrate: setup  # simulated studies of known truth: do the intervals cover what they say?
	@$(BIN)/python -m tests.calibrate

results: setup  # the committed studies' tables, made again from their committed data, must come out bit-equal
	@$(BIN)/python -m analysis.archive check

gpu-check:  # no set-up: that machine may have no network, and brings its own torch
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tests.benchmarks.gpu_check

clean:
	rm -rf .venv build
