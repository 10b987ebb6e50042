# The README's commands. Everything runs in .venv, which the first command makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NOTEBOOKS := $(wildcard htd-*-res.ipynb)
PRESET ?= quick
DATA ?= cifar10
export PYTHONHASHSEED = 0

.DEFAULT_GOAL := help

.PHONY: peers reliability help setup demo row test lint notebooks documents clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(STAMP)  ## make .venv and install the tested versions

$(STAMP): requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed: set PYTHON=python3.11 or the like"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $@

demo: $(STAMP)  ## ResNet18 on scikit-learn's digits: notebook, log, JSON, table and plots under analysis/demo/
	mkdir -p analysis/demo
	$(BIN)/papermill htd-resnet-res.ipynb analysis/demo/htd-resnet-res.ipynb -p PRESET quick -p FOLDER analysis/demo/logs
	$(BIN)/python jsonify_logs.py analysis/demo/logs --out analysis/demo
	$(BIN)/python analyze_results.py analysis/demo --out analysis/demo

row: $(STAMP)  ## ResNet18 on Fashion-MNIST as in results/README.md: 32 px, from $HTD_DATA or downloaded
	mkdir -p logs/row
	$(BIN)/papermill htd-resnet-res.ipynb logs/row/htd-resnet-res.ipynb \
	    -p PRESET cpu -p DATASET fashion-mnist -p BASELINE_EPOCHS 10 -p MAX_LOSS 0.005 -p FOLDER logs/row
	$(BIN)/python analyze_results.py logs/row/*.log --out logs/row --tolerance 0.005

test: $(STAMP)  ## run the tests in two processes of one thread each: more threads than cores fight
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not apart"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m apart

peers: $(STAMP)  ## other methods beside ours, CIFAR-10: CHECKPOINT=resnet20.th DATA=cifar10 or folder:PATH
	@test -n "$(CHECKPOINT)" || { echo "Give CHECKPOINT=, a state dict of CIFAR-10's ResNet-20 or ResNet-56"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch-pruning tensorly-torch
	$(BIN)/python benchmarks/published_networks.py --checkpoints $(CHECKPOINT) --data $(DATA) --budgets 0.5 0.35 \
	    --methods policy uniform "two-factor SVD" torch-pruning "tensorly-torch Tucker" "tensorly-torch CP" \
	    "Tucker-2, VBMF" --seeds 0 --epochs 0 3

reliability: $(STAMP)  ## damage files and kill runs, ten minutes; the counts go into docs/reliability.md
	$(BIN)/python tools/reliability.py
	$(BIN)/python tools/update_docs.py

lint: $(STAMP)  ## ruff, the direction of imports, nothing stray in git, documents made from their files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tools/check_tree.py
	$(BIN)/python tools/update_docs.py --check

notebooks: $(STAMP)  ## run the notebooks with PRESET (quick by default), executed copies under analysis/
	mkdir -p analysis
	for notebook in $(NOTEBOOKS); do $(BIN)/papermill $$notebook analysis/$$notebook -p PRESET $(PRESET) || exit 1; done

documents: $(STAMP)  ## put the measured parts of README and docs/ there anew from results/
	$(BIN)/python tools/update_docs.py

clean:  ## remove what the commands made, .venv included; trained baselines stay
	rm -rf $(VENV) analysis/demo .pytest_cache .import_linter_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
