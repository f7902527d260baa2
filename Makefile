PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
COMMA = ,

# The number of test processes, each with databases of its own. TESTS runs in one process, because starting more takes
# longer.
WORKERS ?= $(if $(TESTS),0,4)
PYTEST = -m pytest -n $(WORKERS) $(TESTS)

# Examples that are checked one by one, because their modules have the same names.
TYPED = json_api two_databases pipeline

.DEFAULT_GOAL = help
.PHONY: help demo test coverage lint types docs docs-zip screenshots dist bench clean

help: ## list the targets, which is what "make" does
	@sed -n 's/^\([a-z-]*\):.* ## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20
	@echo
	@echo 'The virtual environment is $(VENV) (VENV=...) of $(PYTHON) (PYTHON=python3.12).'

demo: $(VENV)/installed-demo ## serve the guestbook of examples/ until Ctrl-C; on another port: PORT=8080
	PYTHONPATH=examples $(BIN)/python -m guestbook $(if $(PORT),--port $(PORT))

test: $(VENV)/installed-test ## run all tests, or some: TESTS=tests/test_binds.py; in how many processes: WORKERS=4
ifdef COVERAGE
	rm -f .coverage*
	$(BIN)/python -m coverage run $(PYTEST)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report $(if $(TESTS),--fail-under=0)
else
	$(BIN)/python $(PYTEST)
endif

coverage: ## run the tests, and report uncovered code: the same as make test COVERAGE=1
	$(MAKE) test COVERAGE=1

lint: $(VENV)/installed-lint ## check style, with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-lint ## check types, with mypy
	$(BIN)/mypy
	for example in $(TYPED); do $(BIN)/mypy examples/$$example || exit 1; done

# -E: of pages that have not changed, a saved environment forgets the index entries, which the search needs.
docs: $(VENV)/installed-docs ## build the documentation's pages
	$(BIN)/sphinx-build -E -W --keep-going -q docs docs/_build/html
	@echo 'The pages are in docs/_build/html: begin with docs/_build/html/index.html'

docs-zip: docs ## the same pages as one zip, to be read offline
	version=$$($(BIN)/python -c 'import sqlasession_middleware as package; print(package.__version__)'); \
	folder=docs/_build/sqlasession_middleware-$$version-docs; \
	rm -rf $$folder $$folder.zip && cp -r docs/_build/html $$folder && rm -rf $$folder/.doctrees $$folder/.buildinfo* && \
	$(BIN)/python -m zipfile -c $$folder.zip $$folder && rm -rf $$folder && \
	echo "Unpack $$folder.zip, and open index.html"

screenshots: $(VENV)/installed-screenshots ## make the pictures in docs/_static; needs chromium and chromedriver
	$(BIN)/python docs/screenshots.py

dist: $(VENV)/installed-dist ## build the sdist, and the wheel from it, in dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

bench: $(VENV)/installed-test ## measure what the middleware costs a request; takes minutes and needs an idle machine
	$(BIN)/python benchmarks/per_request.py
	$(BIN)/python benchmarks/routing.py
	$(BIN)/python benchmarks/tenants.py
	$(BIN)/python -m pip install --quiet --requirement benchmarks/requirements.txt
	$(BIN)/python benchmarks/transactions.py
	$(BIN)/python benchmarks/streams.py
	$(BIN)/python benchmarks/waits.py
	$(BIN)/python benchmarks/waits.py --time

clean: ## remove everything the targets created
	rm -rf $(VENV) build dist docs/_build .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info

# The virtual environment.
$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'Python 3.11 or newer is needed, and "$(PYTHON)" is not: make PYTHON=python3.12 …'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# A target's dependencies are an extra of setup.cfg, reinstalled when setup.cfg changes. EXTRAS=drivers adds others.
$(VENV)/installed-%: setup.cfg $(VENV)/created
	$(BIN)/python -m pip install --quiet --editable '.[$*$(if $(EXTRAS),$(COMMA)$(EXTRAS))]'
	touch $@
