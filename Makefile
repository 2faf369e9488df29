# Every target is a few plain commands; README.md names them.
PYTHON ?= python3
TORCH ?=
VENV := .venv/bin
HERE := not gpu and not multigpu and not slurm and not slow

.PHONY: env demo test test-slurm lint gpu clean

env: .venv/.ready

.venv/.ready: setup.cfg pyproject.toml .ci/env.sh
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" bash .ci/env.sh

demo: env
	$(VENV)/python launch/fetch_demo.py
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(VENV)/torchrun --nproc_per_node=2 launch/train.py recipe=demo

lint: env
	$(VENV)/python -m ruff check .
	$(VENV)/lint-imports

test: lint
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(VENV)/python -m pytest -m "$(HERE)"

# On a machine with slurm-wlm and munge (Debian), not on a cluster: the tests start one of their own.
test-slurm: env
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(VENV)/python -m pytest -m slurm tests/launch

# On a machine with GPUs.
gpu: env
	$(VENV)/python -m pytest -m "gpu or multigpu"

# Keeps .venv, runs/ and downloads.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
