# Needs only Python >= 3.10 (with venv) and git; everything else is installed into .venv by pip, which honours the
# machine's own indexes and constraints.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test gpu check format mypy results bench performance recovery faults guiders world scenes students report sprites clean
.DELETE_ON_ERROR:

help:  ## show this list
	@grep -hE '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z]+):.*## /\1|/' | awk -F'|' '{ printf "  make %-11s %s\n", $$1, $$2 }'

install: $(VENV)/.installed-dev  ## make .venv and install fastgen with all that development needs

demo: $(VENV)/.installed-eval  ## distil the emoji teacher into one step, judge it, write runs/demo/report.html
	$(BIN)/fastgen train configs/emoji/demo.yaml
	$(BIN)/fastgen evaluate runs/demo

test: $(VENV)/.installed-dev  ## run all tests (offline, on the CPU); PYTEST="-k NAME" for some
	$(BIN)/pytest $(PYTEST)

gpu: $(VENV)/.installed-dev  ## run what needs a GPU (seven minutes), write docs/gpu.json; GPU="waits" for some
	$(BIN)/python -m tests.gpu.run $(GPU)

check: $(VENV)/.installed-dev  ## formatting, lint, types, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@$(MAKE) --no-print-directory mypy
	$(BIN)/codespell

format: $(VENV)/.installed-dev  ## let ruff format the code and fix what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The folders are laid out by links as they install, so that fastgen.trainers and the others are found by their names.
mypy: $(VENV)/.installed-dev  ## types alone
	@rm -rf build/types && mkdir -p build/types/fastgen
	@ln -s $(CURDIR)/fastgen/* $(addprefix $(CURDIR)/,trainers pipelines evaluation configs) build/types/fastgen/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p fastgen

results: demo  ## make the demo's numbers in README.md and docs/results.md again
	$(BIN)/fastgen report page runs/demo --into docs/results.md --name demo --picture docs/demo.png
	$(BIN)/fastgen report page runs/demo --into README.md --name demo

bench: performance $(VENV)/.installed-eval  ## performance, then train and judge every method on the emoji teacher, write docs/results.json (hours; resumes)
	$(BIN)/fastgen bench methods

performance: $(VENV)/.installed-dev  ## measure what an iteration of each method takes and holds, write docs/performance.md
	$(BIN)/fastgen bench cost --rounds 30 --into docs/performance.md
	$(BIN)/fastgen bench memory emoji/dmd2_prompts --into docs/performance.md

recovery: $(VENV)/.installed-dev  ## distil the two-dimensional mixture by every method, write docs/recovery.md (15 minutes)
	$(BIN)/python -m tests.recovery.plot

faults: $(VENV)/.installed-dev  ## put faults into runs and commands hundreds of times, write docs/reliability.md (half an hour)
	FASTGEN_FAULTS=long $(BIN)/pytest tests/faults/test_bad_input.py
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.faults.campaign

guiders: $(VENV)/.installed-eval  ## judge the guiders on the emoji teacher and its students, write the table of docs/guiders.md
	$(BIN)/python -m tests.bench.guiders

world: $(VENV)/.installed-dev  ## train the emoji world anew: CLIP, autoencoder, teacher (hours; resumes)
	$(BIN)/python -m fastgen.emoji.world clip configs/emoji/clip.yaml
	$(BIN)/python -m fastgen.emoji.world vae configs/emoji/vae.yaml
	test -d runs/emoji/untrained || $(BIN)/python -m fastgen.emoji.world pipeline runs/emoji/clip/clip runs/emoji/vae/vae runs/emoji/untrained
	$(BIN)/fastgen train configs/emoji/teacher.yaml
	$(BIN)/python -m fastgen.emoji.world ship runs/emoji

scenes: $(VENV)/.installed-dev  ## train a CLIP and a teacher of composed scenes, on from the emoji world's (hours; resumes)
	$(BIN)/python -m fastgen.emoji.world clip configs/scenes/clip.yaml
	$(BIN)/python -m fastgen.emoji.world vae configs/scenes/vae.yaml
	test -d runs/scenes/untrained || $(BIN)/python -m fastgen.emoji.world pipeline runs/scenes/clip/clip runs/scenes/vae/vae runs/scenes/untrained fastgen/emoji/assets/teacher/unet
	$(BIN)/fastgen train configs/scenes/teacher.yaml

students: $(VENV)/.installed-eval  ## distil the scenes' teacher into three students (twenty minutes; resumes)
	$(BIN)/fastgen train configs/scenes/scm.yaml
	$(BIN)/fastgen train configs/scenes/dmd2.yaml
	$(BIN)/fastgen train configs/scenes/pcm.yaml

report: $(VENV)/.installed-eval  ## judge the scenes' teacher and students, write runs/scenes/report/report.html (after: make scenes students)
	$(BIN)/fastgen evaluate runs/scenes/scm runs/scenes/dmd2 runs/scenes/pcm --out runs/scenes/report

sprites: $(VENV)/.installed-dev  ## draw the shipped sprites anew from the pinned packages (needs npm)
	$(BIN)/python -m fastgen.emoji.build

clean:  ## remove what was built; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . \( -name .venv -o -name runs -o -name .git \) -prune -o -name __pycache__ -type d -print | xargs rm -rf

# Torch and torchvision are named first, so that one run of pip's resolver picks a pair that fits.
$(VENV)/.installed-eval: pyproject.toml | $(BIN)/python
	@test $(VENV)/.installed-dev -nt pyproject.toml || { set -x; $(BIN)/python -m pip install torch torchvision -e '.[eval]'; }
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install torch torchvision -e '.[eval,dev]'
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { echo "fastgen needs Python 3.10 or newer; '$(PYTHON)' was not found (or: make PYTHON=python3.12 ...)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "fastgen needs Python 3.10 or newer, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "'$(PYTHON) -m venv' failed: install Python's venv module (Debian, Ubuntu: apt install python3-venv; Fedora: dnf install python3-pip) and run make again" >&2; exit 1; }
