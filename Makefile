# `make demo`, `make test` and `make docs` set everything up by themselves, in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all lint docs bench clean

demo: $(STAMP)
	$(BIN)/nextstate run configs/quickstart.yaml --out runs/quickstart

test: $(STAMP) lint
	$(BIN)/python -m pytest -n 2

test-all: $(STAMP) lint
	$(BIN)/python -m pytest -n 2 -m "slow or not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,docs]'
	touch $@

# Hours. Also against an earlier checkout, lm-eval and TransformerLens: BEFORE=path LM_EVAL=path LENS=interpreter
bench: export OMP_NUM_THREADS = 1
bench: $(STAMP)
	$(BIN)/python -m benchmarks.replay --out benchmarks/results $(if $(LM_EVAL),--lm-eval $(LM_EVAL))
	$(BIN)/python -m benchmarks.patching --out benchmarks/results $(if $(LENS),--transformer-lens $(LENS))
	$(BIN)/python -m benchmarks.response --out benchmarks/results
	$(BIN)/python -m benchmarks.stepping --out benchmarks/results
	$(BIN)/python -m benchmarks.textworld --out benchmarks/results
	$(BIN)/python -m benchmarks.grammar --out benchmarks/results
	$(BIN)/python -m benchmarks.roads --out benchmarks/results
	$(BIN)/python -m benchmarks.training --out benchmarks/results
	$(BIN)/python -m benchmarks.pipeline --out benchmarks/results $(if $(BEFORE),--before $(BEFORE))
	$(BIN)/python -m benchmarks.page

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache
