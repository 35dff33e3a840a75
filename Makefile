# What a person or CI types. Each target makes .venv by itself; the stamps in it know what is installed, so a second run takes seconds.
#
#   make serve        install and serve models/tiny-moe (ARGS="--port 9000" passes options on)
#   make test         the short lane: a quarter of an hour on 2 cores (TESTS=tests/wire narrows it)
#   make test-slow    the rest that needs no GPU, and property tests with new examples
#   make check        format, lint, types, contracts, house
#   make audit        whether what is installed fits together and has known vulnerabilities (ARGS=--strict: fail where nobody could say)
#   make test-py312   the torch-free tests on Python 3.12, in .venv312
#   make clean        remove what make made, environments included
#
# Variables: PYTHON (3.11 or later), TORCH_INDEX (a CPU wheel index for torch), MODEL, ARGS, TESTS.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

works = $(shell for p in $(1); do "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

PYTHON ?= $(call works,python3.11 python3.12 python3 python3.13)
# A shim that answers "command not found" does not count: it has to run.
PYTHON312 ?= $(call works,python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12))
TORCH_INDEX ?=
MODEL ?= models/tiny-moe
ARGS ?=
TESTS ?=

BIN := .venv/bin
SERVE_STAMP := .venv/.installed-serve
DEV_STAMP := .venv/.installed-dev
# setuptools warns at every editable installation that folders can shadow packages; tests/house/test_doors.py looks at that.
EDITABLE := PYTHONWARNINGS="ignore:Editable installation"
PY312_STAMP := .venv312/.installed
HAS_GPU := $(shell if test -e /dev/nvidia0 || nvidia-smi -L >/dev/null 2>&1; then echo yes; fi)
ENGINE := $(if $(HAS_GPU),gpu,engine)
SHORT_LANE = $(BIN)/python -m pytest -m "not slow and not gpu"
CHECKED := duomo services kernels/duomo_kernels bench tests/house
TORCH_FREE_TESTS = $(wildcard tests/wire tests/grammar tests/telemetry tests/house tests/test_config.py tests/test_errors.py tests/services/router \
	tests/services/*/test_policy.py tests/services/kv_transfer/test_layout.py tests/services/kv_transfer/test_lifetime.py)

.PHONY: serve test test-slow check audit test-py312 print-python312 venv clean

serve: $(SERVE_STAMP)
	@exec $(BIN)/duomo serve $(MODEL) $(ARGS)

# What starts whole systems runs alone; the rest shares the cores, a file at a time, in a folder whose name leaves sockets room for theirs.
test: $(DEV_STAMP)
ifeq ($(TESTS),)
	base=$$(mktemp -d) && $(SHORT_LANE) -n 2 --dist loadfile --basetemp $$base/t tests --ignore tests/system; code=$$?; rm -rf "$$base"; exit $$code
	$(SHORT_LANE) tests/system
else
	$(SHORT_LANE) $(TESTS)
endif

test-slow: $(DEV_STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout=1200 $(TESTS)
	$(BIN)/python -m pytest -m "hypothesis and not slow and not gpu" --hypothesis-profile=drawn --timeout=1200 $(TESTS) || test $$? = 5

check: $(DEV_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(wildcard $(CHECKED))
	PYTHONPATH=.:kernels $(BIN)/lint-imports
	$(BIN)/python -m pytest tests/house

audit: $(DEV_STAMP)
	$(BIN)/python .ci/audit $(ARGS)

test-py312: $(PY312_STAMP)
	.venv312/bin/python -m pytest -m "not slow and not gpu" $(TORCH_FREE_TESTS)

# Empty where no Python 3.12 runs.
print-python312:
	@echo $(PYTHON312)

venv: $(DEV_STAMP)

clean:
	rm -rf .venv .venv312 build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian without python3-venv has the module venv but not ensurepip: there the system's pip installs pip into the environment.
# $(1) interpreter, $(2) folder, $(3) options
define make_venv
	@test -n "$(1)" || { echo "make: no Python 3.11 or later found; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(2)/bin/python || { \
		if "$(1)" -c 'import ensurepip' 2>/dev/null; then "$(1)" -m venv $(3) $(2); \
		else "$(1)" -m venv --without-pip $(3) $(2) && "$(1)" -m pip --python $(2)/bin/python install -q pip; fi; }
endef

# torch from TORCH_INDEX alone: other indexes that pip is configured with are not asked, or the newest torch anywhere would win.
# Without its dependencies, which such an index need not carry; the next installation brings them.
define install_torch
PIP_CERT="$${PIP_CERT:-$$($(BIN)/python -m pip config get global.cert 2>/dev/null || true)}" \
	PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= PIP_EXTRA_INDEX_URL= \
	$(BIN)/python -m pip install -q --no-deps --index-url "$(TORCH_INDEX)" "torch>=2.11"
endef

# The environment of `make serve`. With a GPU it sees the system's packages (their torch and triton were built for that machine).
$(SERVE_STAMP): pyproject.toml constraints.txt
	$(call make_venv,$(PYTHON),.venv,$(if $(HAS_GPU),--system-site-packages))
	$(if $(HAS_GPU)$(TORCH_INDEX),grep -v '^torch==',cat) constraints.txt > .venv/constraints.txt
	$(if $(TORCH_INDEX),$(install_torch))
	$(EDITABLE) $(BIN)/python -m pip install -q -c .venv/constraints.txt -e ".[gateway,$(ENGINE)]"
	touch $@

$(DEV_STAMP): $(SERVE_STAMP)
	$(EDITABLE) $(BIN)/python -m pip install -q -c .venv/constraints.txt -e ".[dev]"
	touch $@

$(PY312_STAMP): pyproject.toml constraints.txt Makefile
	@test -n "$(PYTHON312)" || { echo "make: no Python 3.12 found; name one: make test-py312 PYTHON312=/path/to/python3.12" >&2; exit 1; }
	$(call make_venv,$(PYTHON312),.venv312,)
	$(EDITABLE) .venv312/bin/python -m pip install -q -c constraints.txt -e ".[gateway]" anthropic httpx hypothesis import-linter jsonschema msgpack openai pytest pytest-timeout schemathesis trustme
	touch $@
