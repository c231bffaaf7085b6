# Two commands to know: `make lab` and `make test`. All they need is Python 3.11 or newer with pip.
PYTHON ?= python3
# One version of torch, so that the numbers in the chapters are the numbers that you see.
# Without a GPU this download is smaller: make lab TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
BIN := .venv/bin
READY := .venv/ready
SETTINGS := .venv/share/jupyter/lab/settings
# Extra arguments, say: make test ARGS="-x -k lora", make lab ARGS="--no-browser --port 9000"
ARGS ?=

.PHONY: help lab test demo pretrain results chapters bench clean

help:
	@echo "make lab       open the course in JupyterLab (the first time it sets up .venv)"
	@echo "make test      run the package's tests, then every chapter, comparing all outputs"
	@echo "make demo      fine-tune the shipped model with LoRA, in about a minute"
	@echo "make chapters  run all chapters again and save their outputs"
	@echo "make pretrain  train the base model from nothing"
	@echo "make results   measure again what the chapters show from files"
	@echo "make bench     measure speed and memory"
	@echo "make clean     remove .venv and everything else that was made here"

$(READY): pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'minipeft needs Python 3.11 or newer; say which: make lab PYTHON=python3.12')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
		($(PYTHON) -m pip install --user virtualenv && $(PYTHON) -m virtualenv .venv)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	mkdir -p $(SETTINGS) && cp chapters/.jupyterlab.json $(SETTINGS)/overrides.json
	touch $@

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/chapters/README.md $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal tests $(ARGS)
	$(BIN)/python -m pytest -n 2 --dist loadfile --nbval chapters $(ARGS)

demo: $(READY)
	$(BIN)/python benchmarks/demo.py

pretrain: $(READY)
	$(BIN)/python -m minipeft.lm.pretrain

chapters: $(READY)
	$(BIN)/python -m minipeft.course.notebook chapters/*.ipynb

bench: $(READY)
	$(BIN)/python benchmarks/bench.py

# Every recorded result that depends on the base: after a new one. Hours; each script goes on where it was stopped.
results: $(READY)
	for script in gates spread base_card e2e_nlg chapter01 chapter02 chapter03 chapter04 chapter05 chapter06 chapter07 chapter08 \
		chapter10 chapter11 chapter12 chapter13 chapter14; do $(BIN)/python benchmarks/$$script.py || exit 1; done

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
