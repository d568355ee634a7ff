# `make` alone says what there is. Every target can be run again and again, from any state of .venv and build.
PYTHON ?= python3
PROFILE ?= cpu
JOBS ?= 1
DEVICE ?= cpu
PY := .venv/bin/python
WITH_A_SITE := pages playground site_links

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup course test lint format chapter book pages clean constraints
.PHONY: chapters site notebooks branch colab measure device links audit release

help: ## what there is
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do \
	  printf '  make %-12s %s\n' "$$name" "$$text"; done
	@echo; echo '  PYTHON=python3.12 chooses the Python of setup, PROFILE=smoke|cpu|gpu|paper what is run,'; \
	echo '  JOBS=2 runs two chapters side by side, each with half the cores.'

setup: ## make or renew .venv (no time when nothing changed)
	@command -v $(PYTHON) >/dev/null || { echo 'setup: error: no $(PYTHON) here; name one: make setup PYTHON=...'; exit 1; }
	@$(PYTHON) tools/setup.py

course: setup ## run every chapter in the cpu profile and build the book
	$(PY) book/run.py --profile cpu --jobs $(JOBS)

book: setup ## the same for PROFILE
	$(PY) book/run.py --profile $(PROFILE) --jobs $(JOBS)

chapter: setup ## one chapter, in the book: make chapter ONLY=short-run [SET="n_seeds=1 steps=60"] [PROFILE=...]
	@test -n "$(ONLY)" || { echo 'which one? make chapter ONLY=<chapter>; there are:'; \
	  $(PY) book/run.py --list | grep '^[a-z]'; exit 2; }
	$(PY) book/run.py --profile $(PROFILE) --only $(ONLY) $(foreach setting,$(SET),--set '$(setting)')

test: setup lint ## lint, unit tests, every chapter in the smoke profile, every page in a browser
	$(PY) -m pytest -q -n 2 $(foreach part,$(WITH_A_SITE) colab,--ignore=tests/test_$(part).py)
	$(PY) book/run.py --profile smoke --jobs 2
	BOOK_SITE=build/smoke/html $(PY) -m pytest -q $(foreach part,$(WITH_A_SITE),tests/test_$(part).py)

pages: setup ## open every page of PROFILE's book in headless Chromium, follow its links within
	BOOK_SITE=build/$(PROFILE)/html $(PY) -m pytest -q tests/test_pages.py tests/test_site_links.py

colab: setup ## run a notebook in an environment of its own, as Colab would
	$(PY) -m pytest -q tests/test_colab.py

lint: setup ## ruff over files and the chapters' code cells, spelling
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PY) tools/cells.py check
	.venv/bin/codespell

format: setup ## put the code in shape, code cells too
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	$(PY) tools/cells.py format

chapters: setup ## run every chapter of PROFILE, build nothing
	$(PY) book/run.py --profile $(PROFILE) --jobs $(JOBS) --no-build

site: setup ## PROFILE's book for its readers, from chapters executed before, perhaps elsewhere
	$(PY) book/run.py --profile $(PROFILE) --publish

notebooks: setup ## a notebook a chapter for Colab, in build/notebooks
	$(PY) book/notebooks.py --out build/notebooks

branch: notebooks ## the same in build/branch, in the folder that this release has on the branch of notebooks
	@rm -rf build/branch && mkdir -p build/branch
	cp -R build/notebooks "build/branch/$$($(PY) book/notebooks.py --where)"

measure: setup ## time the loops of DEVICE=cpu|cuda into results/; CHECKOUTS=folder adds those of other codes
	$(PY) benchmarks/budget.py --out results/budget-gpu.json
	$(PY) benchmarks/limits.py --device $(DEVICE) --out results/limits-$(DEVICE).json
	$(PY) benchmarks/langevin_step.py --device $(DEVICE) $(if $(filter cuda,$(DEVICE)),--compile) \
	  --out results/langevin-step-$(DEVICE).json
	$(PY) benchmarks/perturb_step.py --device $(DEVICE) $(call beside,official,AMP-Regularizer/amp.py) \
	  $(call beside,sam,sam/sam.py) --out results/perturb-step-$(DEVICE).json
	$(PY) benchmarks/cifar_step.py --device $(DEVICE) $(call beside,airbench,cifar10-airbench) \
	  $(if $(filter cpu,$(DEVICE)),--batch 256 --batches 2) --out results/cifar-step-$(DEVICE).json
	$(if $(CHECKOUTS),$(PY) benchmarks/side_by_side.py --device $(DEVICE) $(call beside,lsd,LSD) \
	  $(call beside,edp,GraphScoreMatching) $(call beside,dgflow,DGflow) \
	  $(call beside,dcd,Discriminator-Contrastive-Divergence) --out results/side-by-side-$(DEVICE).json)

# --NAME FOLDER for a checkout that is there
beside = $(if $(wildcard $(CHECKOUTS)/$(2)),--$(1) $(CHECKOUTS)/$(2))

device: setup ## say which GPU torch uses; an error where it has none
	$(PY) tools/device.py

links: setup ## ask every external link of the book whether it still leads somewhere
	$(PY) tools/links.py

audit: setup ## known weaknesses of the dependencies, into build/audit.json
	$(PY) tools/audit.py

release: setup ## wheel, source, PROFILE's book and checksums in dist, tried out; TAG=vX.Y.Z is compared
	$(PY) tools/release.py --profile $(PROFILE) $(if $(TAG),--tag '$(TAG)')

constraints: ## renew constraints.txt from a fresh environment
	@$(PYTHON) tools/setup.py --freeze

clean: ## remove what was built; .venv stays
	rm -rf build .pytest_cache .ruff_cache .hypothesis
