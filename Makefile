# make serve: everything from nothing to a running server.  make test: everything from nothing to green tests.
# Both can be interrupted and run again; what is done is not done twice.

PYTHON ?= python3
VENV   ?= .venv
FLAGS  ?=
JOBS   ?= 2

BIN := $(VENV)/bin
.DEFAULT_GOAL := help
.PHONY: help serve test check install

help:
	@echo "make serve    install, prepare the embedded model, serve it (FLAGS=... go to lutserve serve)"
	@echo "make test     install, check style and types, run all tests"
	@echo "make check    style and types only"

serve: $(VENV)/.runtime
	$(BIN)/lutserve serve --model smollm2-135m --method mix8 --lut nli-4 $(FLAGS)

# A file's tests stay together (they share servers), and files go out in order, the longest of them first.
test: check
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.runtime

$(VENV)/.runtime: pyproject.toml install.sh
	PYTHON="$(PYTHON)" ./install.sh "$(VENV)" cpu,smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	./install.sh "$(VENV)" cpu,smollm2,eval,dev
	@touch $@
