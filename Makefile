# ftbook: one line per command with `make help`. Needs make and Python 3.11 to 3.13; everything else comes from the lock files.
PYTHON  ?= python3
BUILDER ?= auto
CH      ?=
PORT    ?= 8000

ALL  := .venv
BOOK := .venv-book
PY   := $(ALL)/bin/python
BPY  := $(BOOK)/bin/python
LOW  := .venv-lowest

.DEFAULT_GOAL := help
.PHONY: help book pdf epub exercises serve lab run models results check test lowest bench export lock clean

help:           ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(ALL)/.installed: requirements/all.lock setup.py settings.ini tools/env.py
	@$(PYTHON) tools/env.py $(ALL) requirements/all.lock --editable
	@touch $@

$(BOOK)/.installed: requirements/book.lock tools/env.py
	@$(PYTHON) tools/env.py $(BOOK) requirements/book.lock
	@touch $@

book: $(BOOK)/.installed   ## build the site from the stored outputs into _docs/ (BUILDER=sphinx|quarto)
	@$(BPY) -m tools.book --builder $(BUILDER)

pdf: $(ALL)/.installed     ## print the whole book into build/ftbook.pdf (needs Chromium)
	@$(PY) -m tools.pdf

epub: $(ALL)/.installed    ## write the whole book into build/ftbook.epub
	@$(PY) -m tools.epub

serve: book     ## build the site and serve it on http://localhost:8000 (PORT=8000)
	@echo "serve: http://localhost:$(PORT) shows _docs/ until Ctrl-C"
	@$(BPY) -m http.server --bind 127.0.0.1 --directory _docs $(PORT)

exercises: $(ALL)/.installed  ## write notebooks with empty key bodies and their checks into recall/
	@$(PY) -m tools.recall

lab: $(ALL)/.installed     ## open JupyterLab on nbs/ with ftbook installed
	@echo "lab: JupyterLab on nbs/"
	@JUPYTER_CONFIG_PATH=$(CURDIR)/tools$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH} $(ALL)/bin/jupyter lab --notebook-dir nbs

run: $(ALL)/.installed     ## re-execute chapters in place, cpu profile, where outputs are stale (CH=05, FORCE=1)
	@$(PY) -m tools.run $(CH) $(if $(FORCE),--force)

models: $(ALL)/.installed  ## fetch the pretrained models of the cpu profile (about 200 MB; 770 MB on disk)
	@$(PY) -m tools.models

results: $(ALL)/.installed ## run a chapter's long studies into results/NN_name.json (CH=11 JOBS=2), resumable
	@$(PY) -m tools.studies $(CH)

check: $(ALL)/.installed   ## what one runs while working: ruff, mypy, the library, changed chapters
	@$(PY) -m tools.check --quick

test: $(ALL)/.installed    ## ruff, mypy, export, every notebook, wheel, site in Chromium, coverage
	@$(PY) -m tools.check

$(LOW)/.installed: requirements/lowest.lock setup.py settings.ini tools/env.py
	@$(PYTHON) tools/env.py $(LOW) requirements/lowest.lock --editable
	@touch $@

lowest: $(LOW)/.installed  ## the library's tests with the oldest packages that settings.ini allows (PYTHON=python3.11)
	@$(LOW)/bin/python -m tools.check --library

bench: $(ALL)/.installed   ## run benchmarks/*.py side by side with their peers; tables in benchmarks/results/
	@$(PY) -m tools.bench $(CH)

export: $(ALL)/.installed  ## write ftbook/, the generated cells and README.md from nbs/
	@$(PY) -m tools.generate
	@$(PY) -m tools.export
	@echo "export: ftbook/ and README.md agree with nbs/"

lock: $(ALL)/.installed    ## resolve settings.ini anew into requirements/*.lock
	@$(PY) -m tools.lock --upgrade

clean:          ## remove what the commands made, except the environments
	@rm -rf _docs build dist .quarto .pytest_cache .ruff_cache .hypothesis .coverage* *.egg-info
	@echo "clean: removed _docs/, build/ and caches; .venv/ and .venv-book/ stay (remove them by hand for a new start)"
