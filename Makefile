# The whole project from one command each; `make` alone lists them.
# Nothing has to be configured: without KESTRA_DATABASE_URL an embedded PostgreSQL is used.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types imports migrations bench bench-check check

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make the virtual environment, if it is missing or out of date

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed and '$(PYTHON)' is not. Name another: make PYTHON=python3.12 …" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(INSTALLED) ## adopt an existing installation and try to cross from one client to another
	@$(BIN)/python examples/demo.py

test: $(INSTALLED) ## run the tests (KESTRA_TEST_DATABASE_URL: on that server instead of an embedded one)
	$(BIN)/python -m pytest $(if $(KESTRA_TEST_DATABASE_URL),,-n auto --maxprocesses 4)

lint: $(INSTALLED) ## style, and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED) ## the type checker
	$(BIN)/mypy

imports: $(INSTALLED) ## which module may import which
	$(BIN)/lint-imports --no-logo

migrations: $(INSTALLED) ## upgrade a throwaway database, compare it with the models, one head
	@data=$$(mktemp -d); trap 'rm -rf "$$data"' EXIT; set -e; \
	unset KESTRA_DATABASE_URL DATABASE_URL DATABASE_CONNECTION_URI; export KESTRA_DATA_DIR="$$data"; \
	$(BIN)/alembic upgrade head; \
	$(BIN)/alembic check; \
	heads=$$($(BIN)/alembic heads); \
	test "$$(echo "$$heads" | wc -l)" -eq 1 || { printf 'More than one head:\n%s\n' "$$heads" >&2; exit 1; }

bench: $(INSTALLED) ## measure here what kestra costs, against what one would write by hand; table, JSON and chart
	@$(BIN)/python -m benchmarks

bench-check: $(INSTALLED) ## the same, and fail when a bound is missed
	@$(BIN)/python -m benchmarks --check

check: lint types imports migrations test ## everything that has to pass
