# Two commands for newcomers: `make demo` and `make test`. Both set up .venv first, and only once.
PYTHON ?= python3.11
VENV ?= .venv
ENGINE ?= cpu
BIN := $(VENV)/bin
LOCK := deploy/requirements-$(ENGINE).lock
TORCH := deploy/requirements-torch-cpu.lock
READY := $(VENV)/.ready-$(ENGINE)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps
CHECKED := services envs learners tests benchmarks deploy

.PHONY: demo test check bench soak lock setup clean

demo: setup
	$(BIN)/rollcast demo

test: setup
	$(BIN)/python -m pytest -m "not soak"

check: setup
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/run.py

soak: setup
	$(BIN)/python -m pytest -m soak

lock: setup
	$(BIN)/python deploy/lock.py

setup: $(READY)

$(READY): $(LOCK) $(TORCH) pyproject.toml
	$(PYTHON) -m venv $(VENV)
ifeq ($(ENGINE),cpu)
	@# The CPU build of torch is not in the ordinary index: ask pip as it is configured, then PyTorch's own index.
	$(PIP) -r $(TORCH) || $(PIP) --index-url https://download.pytorch.org/whl/cpu -r $(TORCH)
endif
	@# rouge-score comes as source only: the lock's setuptools builds it, not one that pip would fetch unpinned.
	grep '^setuptools==' $(LOCK) | $(PIP) -r /dev/stdin
	$(PIP) --no-build-isolation -r $(LOCK)
	$(PIP) --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
