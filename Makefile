PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
COMMA = ,

.PHONY: demo test lint types docs dist bench clean

# Serve the guestbook of examples/ until Ctrl-C: make demo PORT=8080 to choose the port.
demo: $(VENV)/installed-demo
	PYTHONPATH=examples $(BIN)/python -m guestbook $(if $(PORT),--port $(PORT))

# Run the tests, the documentation's code among them, with branch coverage.
test: $(VENV)/installed-test
	rm -f .coverage*
	$(BIN)/python -m coverage run -m pytest $(TESTS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-lint
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build/html

# The sdist, and the wheel that is built from it.
dist: $(VENV)/installed-dist
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

# What the middleware costs a request; takes some minutes and wants an idle machine.
bench: $(VENV)/installed-test
	$(BIN)/python benchmarks/per_request.py
	$(BIN)/python benchmarks/routing.py
	$(BIN)/python -m pip install --quiet --requirement benchmarks/requirements.txt
	$(BIN)/python benchmarks/transactions.py
	$(BIN)/python benchmarks/streams.py

clean:
	rm -rf $(VENV) build dist docs/_build .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info

# The virtual environment.
$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'Python 3.11 or newer is needed, and "$(PYTHON)" is not: make PYTHON=python3.12 …'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# What a target needs is an extra of setup.cfg, installed anew when that has changed. EXTRAS=drivers for more.
$(VENV)/installed-%: setup.cfg $(VENV)/created
	$(BIN)/python -m pip install --quiet --editable '.[$*$(if $(EXTRAS),$(COMMA)$(EXTRAS))]'
	touch $@
