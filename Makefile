PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo serve-demo hospitals test check fmt test-slow clean

demo: $(INSTALLED)  ## train federatedly on digits, test an encrypted model on encrypted images, write report.html
	$(BIN)/tacit demo --report report.html

hospitals: $(INSTALLED)  ## four hospitals train together in processes of their own; needs TACIT_DATA; writes hospitals.html
	$(BIN)/tacit hospitals --report hospitals.html

serve-demo: $(INSTALLED)  ## alice, bob and the provider as three processes, a pushed model, 100 predictions by ten clients at once
	$(BIN)/tacit up --demo

test: $(INSTALLED)  ## the tests that take seconds
	$(BIN)/pytest -m "not slow"

test-slow: $(INSTALLED)  ## the tests that take minutes
	$(BIN)/pytest -m slow

check: $(INSTALLED)  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(INSTALLED)  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:  ## remove what was installed and made
	rm -rf .venv report.html hospitals.html .pytest_cache .mypy_cache .ruff_cache .hypothesis
