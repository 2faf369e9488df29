# Every target is a few plain commands; README.md names them.
PYTHON ?= python3
TORCH ?=
# Files of tests that run at a time; most wait for processes of their own.
JOBS ?= 2
VENV := .venv/bin
HERE := not gpu and not multigpu and not slurm and not slow

.PHONY: env demo test test-slurm drills lint gpu clean

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
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(VENV)/python -m pytest -n $(JOBS) --dist loadfile -m "$(HERE)"

# On a machine with slurm-wlm and munge (Debian), not on a cluster: the tests start one of their own.
test-slurm: env
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(VENV)/python -m pytest -m slurm tests/launch

# Kills, full disks and damaged files, DRILLS_COUNT of them (56) from number DRILLS_SEED (1000) on; root may fill a disk.
drills: env
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(VENV)/python -m pytest -m slow -s tests/test_drills.py

# On a machine with GPUs.
gpu: env
	$(VENV)/python -m pytest -m "gpu or multigpu"

# Keeps .venv, runs/ and downloads.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
