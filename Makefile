# Every target sets up what it needs: a virtual environment in .venv with this package and its tools.
SHELL  := /bin/bash
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
ARGS   ?=

export PYTHONWARNINGS=ignore
export TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
# the study: every method of the comparison, and beside it what switches off a part
COMPARED := strlora_prototypes strlora strlora_released lora ewc lwf replay olora moelora smolora smolora_released same branchlora joint zero_shot
ABLATED  := strlora_select strlora_weigh strlora_no_reg strlora_frozen
ROUTED   := strlora_prototypes strlora strlora_released moelora smolora same branchlora
# settings of strlora and the values that are tried beside the tuned one, on seeds that no search has used
SETTINGS := num_experts=2,8,16,32 top_k=3,4 r=16,32,128 ema_decay=0.9,0.999 kl_weight=0.0,0.03,0.3,1.0 sub_top_k=1
# of strlora what may cause forgetting, switched off; of strlora_prototypes other strengths of its springs
SWITCHES := lazy=true freeze_experts_from_chunk=6 freeze_from_chunk=6 kind_weight=0.1,1.0
SPRINGS  := hold_by=level,samples hold_decay=0.8
# the second reads the table that the first writes
CHAIN    := nbs/27b_fig_streams.ipynb nbs/27a_fig_verdict.ipynb
CORES    := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
COMPARE  := $(VENV)/bin/strlora compare
ABLATE   := $(VENV)/bin/strlora ablate
define newline


endef

.PHONY: help setup run test test-all nbtest site widths figures study study-more reproduce lab lint export fresh readme clean

help:  ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@$(PYTHON) tools/hours.py study study-more 2>/dev/null || true

setup: $(READY)  ## create .venv and install the package with its tools (once, and again when the requirements change)

$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "strlora needs Python 3.11 or newer; $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

run: $(READY)  ## the main job: train StrLoRA on the mini benchmark, then table and pictures (ARGS="..." goes to `strlora run`)
	$(VENV)/bin/strlora run $(ARGS)

test: $(READY)  ## the tests: modules, notebooks, house rules (ARGS="..." goes to pytest)
	$(PY) -m pytest -n 2 --dist worksteal $(ARGS)

test-all: $(READY)  ## the tests with the slow ones
	$(PY) -m pytest --slow -n 2 --dist worksteal $(ARGS)

nbtest: $(READY)  ## nbdev_test, what `make test` runs notebook by notebook
	$(VENV)/bin/nbdev_test --n_workers 2 --timing

site: $(READY)  ## build the documentation in _docs and check every link, anchor and picture
	$(PY) tools/build_site.py

widths: $(READY)  ## check in a browser that no page of _docs is wider than a phone or a desk shows it
	$(PY) tools/check_widths.py

figures: $(READY)  ## redraw the figure notebooks (nbs/2*), the front page and the README from the committed artefacts; git diff shows what differs
	printf '%s\n' '$(CHAIN)' $(filter-out $(CHAIN),$(sort $(wildcard nbs/2*_fig_*.ipynb))) nbs/16i_film.ipynb \
	    | xargs -P $(CORES) -L 1 $(PY) tools/run_nbs.py
	$(PY) tools/run_nbs.py nbs/index.ipynb
	$(VENV)/bin/nbdev_clean
	$(PY) tools/make_readme.py

study: $(READY)  ## the main comparison on both named streams, five seeds; goes on where it stopped (ARGS="--jobs 2 ...")
	$(COMPARE) $(COMPARED) --seeds 0,1,2,3,4 $(ARGS)
	$(COMPARE) $(COMPARED) --seeds 0,1,2,3,4 --stream strcvit $(ARGS)

study-more: $(READY)  ## ablations, more seeds, other streams, words and base, models looked into; goes on where it stopped
	$(COMPARE) strlora $(ABLATED) --seeds 0,1,2,3,4 $(ARGS)
	$(COMPARE) strlora_prototypes same ewc lora branchlora strlora strlora_released \
	    --seeds 0,1,2,3,4,5,6,7,8,9,10,11 --reference strlora_prototypes $(ARGS)
	$(foreach stream,abrupt cyclic uniform,$(COMPARE) strlora_prototypes same ewc lora strlora --seeds 0,1,2,3 --stream $(stream) \
	    --reference strlora_prototypes $(ARGS)$(newline))
	$(foreach step,1 2 3 4,$(COMPARE) $(ROUTED) ewc lora --seeds 0,1,2,3,4 --stream alike$(step) $(ARGS)$(newline))
	$(foreach step,1 2 3 4,$(COMPARE) joint --seeds 0 --stream alike$(step) $(ARGS)$(newline))
	$(COMPARE) strlora strlora_no_reg --seeds 0,1,2,3,4 --stream long $(ARGS)
	$(COMPARE) strlora_prototypes strlora strlora_no_reg lora ewc same --seeds 0 --stream long $(ARGS)
	$(COMPARE) strlora_prototypes same ewc lora --seeds 0,1,2,3 --stream windows-gemma3 --reference strlora_prototypes $(ARGS)
	$(ABLATE) strlora share_routers=block --seeds 100,101,102,103,104 $(ARGS)
	$(ABLATE) strlora stage1=straight_through --seeds 102,103,104,105,106 $(ARGS)
	$(foreach setting,sight=-1.0 hold_weight=0.0 lazy=false gate=0.0 gate=4.0 shared=8 geometry=none,\
	    $(ABLATE) strlora_prototypes $(setting) --seeds 102,103,104,105,106 $(ARGS)$(newline))
	$(foreach stream,windows alike4,$(ABLATE) strlora_prototypes oracle_task_id=true --seeds 102,103,104 --stream $(stream) $(ARGS)$(newline))
	$(foreach setting,$(SETTINGS),$(ABLATE) strlora $(setting) --seeds 102,103,104 $(ARGS)$(newline))
	$(foreach size,2:32:64 8:128:256 16:256:512,$(ABLATE) strlora num_experts=$(word 1,$(subst :, ,$(size))) --also r=$(word 2,$(subst :, ,$(size))) \
	    --also lora_alpha=$(word 3,$(subst :, ,$(size))) --seeds 102,103,104 $(ARGS)$(newline))
	$(ABLATE) strlora num_experts=2,8,16 --seeds 102,103,104 --stream few $(ARGS)
	$(foreach setting,$(SWITCHES),$(ABLATE) strlora $(setting) --seeds 102,103,104 $(ARGS)$(newline))
	$(ABLATE) strlora num_experts=32 --also stage1=frozen --seeds 102,103,104 $(ARGS)
	$(ABLATE) strlora num_experts=32 --also oracle_task_id=true --seeds 102,103,104 $(ARGS)
	$(ABLATE) strlora num_experts=32 --also oracle_task_id=true --also lazy=true --seeds 102,103,104 $(ARGS)
	$(ABLATE) strlora num_experts=32 --also r=512 --also lora_alpha=1024 --also oracle_task_id=true --seeds 102,103,104 $(ARGS)
	$(ABLATE) strlora num_experts=32 --also r=512 --also lora_alpha=1024 --seeds 102,103,104 $(ARGS)
	$(ABLATE) strlora num_experts=32 --also r=512 --also lora_alpha=1024 --also stage1=frozen --seeds 102,103,104 $(ARGS)
	$(foreach setting,$(SPRINGS),$(ABLATE) strlora_prototypes $(setting) --seeds 102,103,104 $(ARGS)$(newline))
	$(ABLATE) strlora_prototypes threshold=-1.0 --also sight=-1.0 --seeds 102,103,104,105,106 $(ARGS)
	$(PY) tools/with_model.py interference results/mini/windows/{lora,ewc,moelora,strlora,strlora_prototypes}/seed3 $(ARGS)
	$(COMPARE) strlora_prototypes same joint --seeds 12,13,14 $(ARGS)
	$(PY) tools/with_model.py held_out results/mini/windows/{strlora_prototypes,same,joint}/seed{12,13,14} $(ARGS)
	$(PY) tools/with_model.py routes results/mini/windows/strlora_prototypes/seed{12,13,14} $(ARGS)
	$(PY) tools/with_model.py looks results/mini/windows/{strlora,strlora_prototypes}/seed3 $(ARGS)
	$(PY) tools/keep_features.py

reproduce: $(READY)  ## make a run of the study once more and compare (RUN=results/mini/windows/lora/seed4; none: any; ARGS="--keep ...")
	$(PY) tools/reproduce.py $(RUN) $(ARGS)

lab: $(READY)  ## open the notebooks in JupyterLab
	$(VENV)/bin/jupyter lab --notebook-dir nbs

lint: $(READY)  ## ruff, mypy and the import contracts
	$(VENV)/bin/ruff check nbs tests tools
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

export: $(READY)  ## write the package from the notebooks and clean them
	$(VENV)/bin/nbdev_export
	$(VENV)/bin/nbdev_clean

readme: $(READY)  ## write README.md from nbs/index.ipynb
	$(PY) tools/make_readme.py

fresh: $(READY)  ## check that package, README and notebooks are in step
	$(PY) -m pytest -q tests/test_house.py

clean:  ## remove what was built; keeps .venv
	rm -rf _proc _docs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
