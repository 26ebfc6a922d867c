# Thin: noxfile.py does the work, in virtual environments of its own.

PYTHON ?= python3
TOOLS := .venvs/tools
NOX := $(TOOLS)/bin/python -m nox
APT_GET := $(shell [ "$$(id -u)" = 0 ] || echo sudo) env DEBIAN_FRONTEND=noninteractive apt-get

.DEFAULT_GOAL := help
.PHONY: help test test-all test-quick test-on test-upstream test-clients test-element-call test-monitoring test-browser coverage docs demo bench build clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

test: $(TOOLS)/bin/nox ## Everything: lint, the documentation, then the suite on the newest and the oldest Synapse
	$(NOX) -s lint docs tests -- $(ARGS)

test-all: $(TOOLS)/bin/nox ## As `make test`, with the tests that only repeat something, and more kills
	$(NOX) -s lint docs javascript clients element_call releases monitoring tests -- --repeats --kills=50 $(ARGS)
	$(NOX) -s browser

test-quick: $(TOOLS)/bin/nox ## The inner loop: lint, then what is quick, on the newest Synapse with SQLite
	$(NOX) -s lint quick -- $(ARGS)

test-on: $(TOOLS)/bin/nox ## The suite on any Synapse: make test-on SYNAPSE=1.155.0 [ARGS="..."]
	@test -n "$(SYNAPSE)" || { echo 'Which one? make test-on SYNAPSE=1.155.0' >&2; exit 2; }
	$(NOX) -s tests_on -- $(SYNAPSE) $(ARGS)

test-upstream: $(TOOLS)/bin/nox ## Synapse's own tests with the module: make test-upstream [SYNAPSE=1.155.0] [ARGS="tests.push"]
	$(NOX) -s test_upstream -- $(or $(SYNAPSE),newest) $(ARGS)

test-clients: $(TOOLS)/bin/nox ## Real clients on the newest and the oldest Synapse, with SQLite, in ten minutes
	$(NOX) -s clients

test-element-call: $(TOOLS)/bin/nox ## Element Call in Chromium on the newest and the oldest Synapse, with SQLite, in a quarter of an hour
	$(NOX) -s element_call

test-monitoring: $(TOOLS)/bin/nox ## Dashboard and alerts, with a real Prometheus, in ten minutes
	$(NOX) -s monitoring

test-browser: $(TOOLS)/bin/nox ## The page for admins in Chromium: make test-browser [ARGS="--update-images"]
	$(NOX) -s browser -- $(ARGS)

coverage: $(TOOLS)/bin/nox ## Which lines and branches the quick tests run: make coverage [ARGS="tests/unit"]
	$(NOX) -s coverage -- $(ARGS)

docs: $(TOOLS)/bin/nox ## Build the documentation as a site, into build/site
	$(NOX) -s docs

demo: $(TOOLS)/bin/nox ## A sticky event on a real Synapse, until Ctrl-C: make demo [ARGS="--federation --once"]
	@$(NOX) -s demo -- $(ARGS)

bench: $(TOOLS)/bin/nox ## Measure what the module costs: make bench [ARGS="..."]
	$(NOX) -s bench -- $(ARGS)

build: $(TOOLS)/bin/nox ## Build the wheel and the source distribution, into dist/
	$(NOX) -s build

clean: ## Remove what the other targets made, the virtual environments too
	rm -rf .venvs .nox build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf tests/javascript/node_modules tests/clients/node_modules tests/element_call/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(TOOLS)/bin/nox:
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
		|| { $(APT_GET) update && $(APT_GET) install --yes --no-install-recommends python3-venv; } \
		|| { echo 'Install Python 3.10 or later with its venv module (Debian: python3-venv).' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo 'Python 3.10 or later is needed: make PYTHON=python3.11 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install nox
